// WKV-4 on an NVIDIA GPU, compiled by NVRTC. wkv4_cuda.py defines what cuda_numbers.h asks for, and the sizes of tiles.
//
// Symbols: N sequences of tokens laid end to end, C channels, S pieces that each sequence is cut into.
//
// A block of threads has the channels of a warp, of one piece, and walks its time in tiles. A tile is read from memory
// once, into registers: warp i holds its i-th STEPS tokens. Each warp adds up its own, they tell each other the sums,
// and each computes its results from its true start. The backward pass does the same again from the states that the
// forward pass kept, and then for adjoints, from last to first. So keys and values are read once and outputs written
// once; backwards, keys, values and the outputs' gradients are read once and two gradients written once.
//
// Where whole sequences would not fill the GPU (`is_cut` in wkv4_cuda.py), each tile is a piece of its own, with a block
// of threads of its own, which tells the others what it adds up to and waits for what those before it say (Merrill and
// Garland 2016, "Single-pass parallel prefix scan with decoupled look-back"). It relies on GPUs beginning blocks in the
// order of their numbers. So there, too, everything is read once.
//
// Results depend on nothing but the arguments: every sum has a fixed order.

#include "cuda_numbers.h"

namespace wkv4 {

// Exponents are powers of 2, which is what the hardware computes: e^x is here 2^(x log2 e).
constexpr float EMPTY_EXPONENT = -1.4426950e38f, LOG2E = 1.4426950408889634f;
constexpr float FASTEST = 1e6f;  // of a decay: e^-1e6 a step is nothing, and many steps of it are still a number
constexpr int LANES = 32;

// How a pass goes through a sequence: tiles of STEPS tokens for each of WARPS; the whole in turn, or CUT into tiles. It
// reads the first TENSORS of key, value, grad_output.
template <int TENSORS_, int WARPS_, int STEPS_, bool CUT_> struct Plan {
    static constexpr int TENSORS = TENSORS_, WARPS = WARPS_, STEPS = STEPS_, TOKENS = WARPS * STEPS;
    static constexpr bool CUT = CUT_;
    static_assert(TOKENS % TILE == 0 && TILE % STEPS == 0, "a kept state must be the first of a warp");
};

}  // namespace wkv4

#include "wkv4_step.h"

namespace wkv4 {

typedef long long Int;

// (B, T, C), or (1, tokens, C) with bounds: channels lie side by side, all else at any distance, counted in elements.
struct Sequences {
    const Element* data;
    Int batch_stride, time_stride;
};

// The arguments of all kernels, as wkv4_cuda.py fills them in. What is not const is written, and lies without gaps.
struct Arguments {
    int time, channels, groups, pieces;  // groups of channels, those of a warp each
    const Int* bounds;  // (N + 1) or null: then every sequence is a row of `time` tokens
    const float *time_decay, *time_first;  // (C)
    Sequences key, value;
    const float* state;  // (N, 3, C)
    float* tiles;        // (tokens / TILE + N, 3, C) or null: the states that the backward pass starts from
    float* told;         // (N, groups, S, 3, LANES * CHANNELS), all NOTHING, where pieces tell others what they add up to
    Element* output;     // (tokens, C)
    float* final_state;  // (N, 3, C)
    Sequences grad_output;
    const float* grad_state;             // (N, 3, C)
    Element *grad_key, *grad_value;      // (tokens, C)
    float *grad_initial, *grad_vectors;  // (N, 3, C); (N * S, 2, C): of u and w, a piece at a time
};

typedef State<Real> Item;  // what warps tell each other: a state, or an adjoint beside what is left of the one after it

// The channels and the piece of a thread.
struct Strand {
    const Arguments& all;
    int sequence, piece, pieces, channel, begin, time, from, to;
    float* told;  // of this sequence and these channels
    int warp, lane;
    Real w, u, lead;  // a step of decay, the bonus, and e^(u + w)

    // Blocks begin with the groups of channels of a piece, which are neighbours in memory; then come other sequences.
    WKV_INLINE Strand(const Arguments& all, int block, int piece, int length) : all(all), piece(piece) {
        const int group = block % all.groups;
        sequence = block / all.groups;
        warp = threadIdx.x / LANES;
        lane = threadIdx.x % LANES;
        channel = min((group * LANES + lane) * CHANNELS, all.channels - CHANNELS);  // some do the last ones together
        told = all.told + (Int(block) * all.pieces * 3 * LANES + lane) * CHANNELS;
        begin = all.bounds ? int(all.bounds[sequence]) : sequence * all.time;
        time = all.bounds ? int(all.bounds[sequence + 1]) - begin : all.time;
        from = min(piece * length, time);
        to = length ? min(from + length, time) : time;  // a length of 0 is that of the whole
        pieces = length ? (time + length - 1) / length : 1;
        w = -min_(precise_exp(row(all.time_decay, 0)) * LOG2E, Real{} + FASTEST);
        u = row(all.time_first, 0) * LOG2E;
        lead = exp_(u + w);
    }
    WKV_INLINE int rank() const { return pieces - 1 - piece; }  // of a piece in the backward pass
    // Whether one exponential a token will do in all channels of the warp.
    WKV_INLINE bool is_near() const {
        const Real ahead = u + w;
        return __all_sync(0xffffffff, all_of(ahead > LEAST * LOG2E) && all_of(ahead < MOST * LOG2E));
    }
    WKV_INLINE bool opening() const { return piece == 0; }
    WKV_INLINE bool closing() const { return to == time; }
    WKV_INLINE int tile(int t) const { return begin / TILE + sequence + t / TILE; }

    // Row i of a tensor (..., C) of real numbers.
    WKV_INLINE Real row(const float* x, int i) const {
        return *reinterpret_cast<const Real*>(x + Int(i) * all.channels + channel);
    }
    WKV_INLINE void set_row(float* x, int i, Real y) const {
        *reinterpret_cast<Real*>(x + Int(i) * all.channels + channel) = y;
    }
    WKV_INLINE State<Real> state(const float* x, int i) const {
        return {row(x, 3 * i), row(x, 3 * i + 1), row(x, 3 * i + 2)};
    }
    WKV_INLINE void set_state(float* x, int i, const State<Real>& s) const {
        set_row(x, 3 * i, s.a), set_row(x, 3 * i + 1, s.b), set_row(x, 3 * i + 2, s.p);
    }
    WKV_INLINE void tell(int i, const Item& item) const {
        float* to = told + Int(i) * (3 * LANES * CHANNELS);
        wkv4::tell(to, item.a), wkv4::tell(to + LANES * CHANNELS, item.b), wkv4::tell(to + 2 * LANES * CHANNELS, item.p);
    }
    WKV_INLINE Item hear(int i) const {
        const float* from = told + Int(i) * (3 * LANES * CHANNELS);
        return {wkv4::hear(from), wkv4::hear(from + LANES * CHANNELS), wkv4::hear(from + 2 * LANES * CHANNELS)};
    }
    WKV_INLINE bool is_there(const Item& x) const {
        return wkv4::is_there(x.a) && wkv4::is_there(x.b) && wkv4::is_there(x.p);
    }
    WKV_INLINE State<Real> initial() const {
        State<Real> s = state(all.state, sequence);
        s.p = s.p * LOG2E;
        return adopt(s);
    }
    // Token t of a tensor.
    WKV_INLINE Element* at(Element* x, int t) const { return x + Int(begin + t) * all.channels + channel; }
    WKV_INLINE const Element* at(const Sequences& x, int t) const {
        const Int row = all.bounds ? 0 : sequence * x.batch_stride, token = all.bounds ? begin + t : t;
        return x.data + row + token * x.time_stride + channel;
    }
};

// What the warps of a block tell each other, on boards used in turn. Each is read before the next is published, so two
// would do; with three, the compiler finds registers for all of a forward pass.
template <int WARPS> using Board = Item[WARPS][LANES];
template <int WARPS> struct Exchange {
    Board<WARPS>* shared;
    int turn = 0;

    WKV_INLINE explicit Exchange(Board<WARPS>* shared) : shared(shared) {}
    // Returns what all warps have published.
    WKV_INLINE const Board<WARPS>& publish(const Item& item, const Strand& strand) {
        turn = (turn + 1) % 3;
        shared[turn][strand.warp][strand.lane] = item;
        __syncthreads();
        return shared[turn];
    }
};

// A warp's tokens of a tile. FULL: the tile has STEPS for each of the WARPS, and channels are near; otherwise some warps
// may have fewer, and repeat the last one without effect.
template <bool FULL, class Plan> struct Share {
    static constexpr int STEPS = Plan::STEPS, WARPS = Plan::WARPS, TOKENS = Plan::TOKENS;
    const Strand& strand;
    int tokens, first, count;  // of the tile, before this warp's, and its own
    int t;                     // this warp's first token
    const Element* from[Plan::TENSORS];
    Packed x[Plan::TENSORS][STEPS];

    WKV_INLINE Share(const Strand& strand, int tile) : strand(strand) {
        tokens = FULL ? TOKENS : min(TOKENS, strand.to - tile);
        first = FULL ? strand.warp * STEPS : min(strand.warp * STEPS, tokens);
        count = FULL ? STEPS : min(STEPS, tokens - first);
        t = tile + (FULL ? first : min(first, tokens - 1));
#pragma unroll
        for (int j = 0; j < Plan::TENSORS; ++j) from[j] = strand.at(tensor(j), t);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) fetch(i);
    }
    WKV_INLINE const Sequences& tensor(int j) const {
        return j == 0 ? strand.all.key : j == 1 ? strand.all.value : strand.all.grad_output;
    }
    WKV_INLINE void move(int tokens) {
        t += tokens;
#pragma unroll
        for (int j = 0; j < Plan::TENSORS; ++j) from[j] = after(from[j], tokens, int(tensor(j).time_stride));
    }
    WKV_INLINE void fetch(int i) {
#pragma unroll
        for (int j = 0; j < Plan::TENSORS; ++j) {
            x[j][i] = __ldg(reinterpret_cast<const Packed*>(after(from[j], row(i), int(tensor(j).time_stride))));
        }
    }
    WKV_INLINE void forget() {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
#pragma unroll
            for (int j = 0; j < Plan::TENSORS; ++j) wkv4::forget(x[j][i]);
        }
    }
    WKV_INLINE bool has(int i) const { return FULL || i < count; }
    WKV_INLINE int row(int i) const { return FULL ? i : max(0, min(i, count - 1)); }
    WKV_INLINE int count_of(int warp) const { return FULL ? STEPS : max(0, min(STEPS, tokens - warp * STEPS)); }

    WKV_INLINE void write(Element* x, int i, Real y) const {
        if (has(i)) __stcg(reinterpret_cast<Packed*>(after(x, row(i), int(strand.all.channels))), narrow(y));
    }

    WKV_INLINE Real key(int i) const { return widen(x[0][i]) * LOG2E; }
    WKV_INLINE Real value(int i) const { return widen(x[1][i]); }
    WKV_INLINE Real grad(int i) const { return widen(x[2][i]); }
    // The weights of token i; p moves from before it to after it.
    WKV_INLINE Weights<Real> weigh(int i, Real& p) const {
        return FULL ? weigh_near(strand.w, strand.lead, key(i), p) : wkv4::weigh(strand.w, strand.u, key(i), p);
    }
    WKV_INLINE Weights<Real> weights(int i, Real p) const { return weigh(i, p); }

    // The state after token i; returns its weights.
    WKV_INLINE Weights<Real> advance(State<Real>& s, int i) const {
        State<Real> next = s;
        const Weights<Real> weights = weigh(i, next.p);
        absorb(next, weights, value(i));
        s = {select_(has(i), next.a, s.a), select_(has(i), next.b, s.b), select_(has(i), next.p, s.p)};
        return weights;
    }
    // The adjoint before token i.
    WKV_INLINE void retire(Adjoint<Real>& adjoint, const State<Real>& s, const Weights<Real>& weights, int i, Real gy) const {
        Adjoint<Real> next = adjoint;
        retreat(s, weights, value(i), gy, next);
        adjoint = {select_(has(i), next.a, adjoint.a), select_(has(i), next.b, adjoint.b)};
    }

    // What each warp's tokens add up to.
    WKV_INLINE const Board<WARPS>& publish(Exchange<WARPS>& exchange) const {
        const auto sum = add_up<STEPS>(
            strand.w, count, [&](int i) { return key(i); }, [&](int i) { return value(i); });
        return exchange.publish(sum, strand);
    }
    // The state after the tokens of warp i.
    WKV_INLINE State<Real> after_warp(const State<Real>& before, int i, const Board<WARPS>& runs) const {
        return join(before, strand.w * float(count_of(i)), runs[i][strand.lane]);
    }
    // The state before this warp's tokens, from that before the tile; `carry` moves to after it.
    WKV_INLINE State<Real> enter(State<Real>& carry, const Board<WARPS>& runs) const {
        State<Real> start = carry;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            if (i == strand.warp) start = carry;
            carry = after_warp(carry, i, runs);
        }
        return start;
    }
};

// What is before a piece, in the order of a pass, where its place is `rank`. Pieces make groups of LOOK: the last one of a
// group tells what is after it, the others only what they add up to, so that a block listens to few. `first` is what is
// before the first group, `sum` what this piece adds up to, and join(before, n, run) what is after a run of n pieces.
template <class Join>
WKV_INLINE Item look_back(const Strand& strand, int rank, const Item& first, const Item& sum, const Join& join) {
    const int others = rank % LOOK, group = rank - others;
    const bool last = others == LOOK - 1, awaited = rank + 1 < strand.pieces;
    if (awaited && !last) strand.tell(rank, sum);

    Item before = first, heard[LOOK - 1], run;  // all asked for before any is waited for
    if (group > 0) before = strand.hear(group - 1);
#pragma unroll
    for (int i = 0; i < LOOK - 1; ++i) {
        if (i < others) heard[i] = strand.hear(group + i);
    }
#pragma unroll
    for (int i = 0; i < LOOK - 1; ++i) {
        if (i >= others) break;
        while (!strand.is_there(heard[i])) heard[i] = strand.hear(group + i);
        run = i == 0 ? heard[0] : join(run, 1, heard[i]);
    }
    while (group > 0 && !strand.is_there(before)) before = strand.hear(group - 1);
    if (others > 0) before = join(before, others, run);
    if (awaited && last) strand.tell(rank, join(before, 1, sum));
    return before;
}

// One tile of the forward pass; `carry` moves from before it to after it. Tokens of the next one, if there is `more`,
// are asked for as soon as those of this one are done with.
template <class Plan, class Tile>
WKV_INLINE void forward_tile(Tile& tile, State<Real>& carry, Exchange<Plan::WARPS>& exchange, bool more) {
    const Strand& strand = tile.strand;
    const Arguments& all = strand.all;
    const Board<Plan::WARPS>& runs = tile.publish(exchange);
    State<Real> s;
    if (Plan::CUT) {
        State<Real> before = empty<Real>();
#pragma unroll
        for (int i = 0; i < Plan::WARPS; ++i) {
            if (i < strand.warp) before = tile.after_warp(before, i, runs);
        }
        State<Real> sum;
        if (strand.warp == Plan::WARPS - 1) {
            sum = tile.after_warp(before, strand.warp, runs);
            const auto after = [&](const Item& past, int n, const Item& run) {
                return join(past, strand.w * float(n * Plan::TOKENS), run);
            };
            carry = look_back(strand, strand.piece, carry, sum, after);
        }
        tile.forget();
        carry = exchange.publish(carry, strand)[Plan::WARPS - 1][strand.lane];
        s = join(carry, strand.w * float(tile.first), before);
        carry = join(carry, strand.w * float(tile.tokens), sum);  // of the last warp
    } else {
        s = tile.enter(carry, runs);
    }
    if (all.tiles && tile.t % TILE == 0 && tile.count > 0) strand.set_state(all.tiles, strand.tile(tile.t), s);
    Element* y = strand.at(all.output, tile.t);
    if (more) tile.move(Plan::TOKENS);
#pragma unroll
    for (int i = 0; i < Plan::STEPS; ++i) {
        const State<Real> before = s;
        const Weights<Real> weights = tile.advance(s, i);
        tile.write(y, i, output(before, weights, tile.value(i)));
        if (more) tile.fetch(i);
    }
}

// Outputs of a piece. Tokens are asked for before it is known whether channels are near, which takes some loads, too.
template <class Plan> WKV_INLINE void forward(const Arguments& all) {
    __shared__ Board<Plan::WARPS> shared[3];
    Exchange<Plan::WARPS> exchange(shared);
    const Strand strand(all, blockIdx.x, blockIdx.y, Plan::CUT ? Plan::TOKENS : 0);
    if (strand.from >= strand.to && !strand.opening()) return;

    State<Real> carry = empty<Real>();
    if (strand.piece < LOOK) carry = strand.initial();  // otherwise others tell
    int t = strand.from;
    if (t + Plan::TOKENS <= strand.to) {
        Share<true, Plan> tile(strand, t);
        for (const bool near = strand.is_near(); near && t + Plan::TOKENS <= strand.to; t += Plan::TOKENS) {
            forward_tile<Plan>(tile, carry, exchange, !Plan::CUT && t + 2 * Plan::TOKENS <= strand.to);
        }
    }
    for (; t < strand.to; t += Plan::TOKENS) {
        Share<false, Plan> tile(strand, t);
        forward_tile<Plan>(tile, carry, exchange, false);
    }
    if (strand.warp == Plan::WARPS - 1 && strand.closing()) {
        carry.p = carry.p * (1 / LOG2E);
        strand.set_state(all.final_state, strand.sequence,
                         strand.time > 0 ? carry : strand.state(all.state, strand.sequence));
    }
}

// The adjoint before a run, of which `run` is (a, b) if the adjoint after it is 0, and what is left of that one.
WKV_INLINE Item link(const Item& after, const Item& run) {
    const Adjoint<Real> before = join(Adjoint<Real>{run.a, run.b}, run.p, Adjoint<Real>{after.a, after.b});
    return {before.a, before.b, run.p * after.p};
}

// One tile of the backward pass; as in the forward pass, those of the next one are asked for.
template <class Plan, class Tile>
WKV_INLINE void backward_tile(Tile& tile, Item& carry, Exchange<Plan::WARPS>& exchange, Item& sums, bool more) {
    static_assert(Plan::TOKENS == TILE, "a tile must begin with a kept state");
    constexpr int STEPS = Plan::STEPS;
    const Strand& strand = tile.strand;
    const Arguments& all = strand.all;
    State<Real> start = strand.state(all.tiles, strand.tile(tile.t));
    State<Real> s = tile.enter(start, tile.publish(exchange)), before[STEPS];
    Item run{Real{}, Real{}, Real{} + 1};  // what this warp's tokens add to the adjoint, and what they leave of it
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        before[i] = s;
        run.p = run.p * select_(tile.has(i), tile.advance(s, i).past, Real{} + 1);
    }
    Adjoint<Real> adjoint{Real{}, Real{}};
#pragma unroll
    for (int i = STEPS - 1; i >= 0; --i) {
        tile.retire(adjoint, before[i], tile.weights(i, before[i].p), i, tile.grad(i));
    }
    run.a = adjoint.a, run.b = adjoint.b;
    const Board<Plan::WARPS>& runs = exchange.publish(run, strand);
    if (Plan::CUT) {
        Item after{Real{}, Real{}, Real{} + 1};
#pragma unroll
        for (int i = Plan::WARPS - 1; i >= 0; --i) {
            if (i > strand.warp) after = link(after, runs[i][strand.lane]);
        }
        Item sum;
        if (strand.warp == 0) {
            sum = link(after, runs[0][strand.lane]);
            const auto past = [](const Item& later, int, const Item& earlier) { return link(later, earlier); };
            carry = look_back(strand, strand.rank(), carry, sum, past);
        }
        tile.forget();
        carry = exchange.publish(carry, strand)[0][strand.lane];
        after = link(carry, after);
        adjoint = {after.a, after.b};
        carry = link(carry, sum);  // of the first warp
    } else {
#pragma unroll
        for (int i = Plan::WARPS - 1; i >= 0; --i) {
            if (i == strand.warp) adjoint = {carry.a, carry.b};
            carry = link(carry, runs[i][strand.lane]);
        }
    }

    Element *gk = strand.at(all.grad_key, tile.t), *gv = strand.at(all.grad_value, tile.t);
    if (more) tile.move(-Plan::TOKENS);
#pragma unroll
    for (int i = STEPS - 1; i >= 0; --i) {
        const Weights<Real> weights = tile.weights(i, before[i].p);
        const Gradient<Real> gradient = differentiate(before[i], weights, tile.value(i), tile.grad(i), adjoint);
        tile.write(gk, i, gradient.key);
        tile.write(gv, i, gradient.value);
        sums.a = sums.a + select_(tile.has(i), gradient.first, Real{});
        sums.b = sums.b + select_(tile.has(i), gradient.decay, Real{});
        tile.retire(adjoint, before[i], weights, i, tile.grad(i));
        if (more) tile.fetch(i);
    }
}

// Gradients of a piece.
template <class Plan> WKV_INLINE void backward(const Arguments& all) {
    __shared__ Board<Plan::WARPS> shared[3];
    Exchange<Plan::WARPS> exchange(shared);
    const int last = gridDim.x - 1, last_piece = gridDim.y - 1;
    const Strand strand(all, last - blockIdx.x, last_piece - blockIdx.y, Plan::CUT ? Plan::TOKENS : 0);

    Item carry{Real{}, Real{}, Real{}}, sums = carry;
    if (strand.rank() < LOOK) carry = strand.state(all.grad_state, strand.sequence);  // otherwise others tell
    for (int t = strand.to; t > strand.from;) {
        int tokens = (t - strand.from) % Plan::TOKENS;
        if (tokens == 0) {
            tokens = Plan::TOKENS;
            Share<true, Plan> tile(strand, t - tokens);
            if (strand.is_near()) {
                for (; t > strand.from; t -= tokens) {
                    backward_tile<Plan>(tile, carry, exchange, sums, !Plan::CUT && t - tokens > strand.from);
                }
                break;
            }
        }
        t -= tokens;
        Share<false, Plan> tile(strand, t);
        backward_tile<Plan>(tile, carry, exchange, sums, false);
    }
    const Board<Plan::WARPS>& parts = exchange.publish(sums, strand);
    if (strand.warp > 0) return;
    for (int i = 1; i < Plan::WARPS; ++i) {
        sums.a = sums.a + parts[i][strand.lane].a;
        sums.b = sums.b + parts[i][strand.lane].b;
    }
    const int this_piece = strand.sequence * all.pieces + strand.piece;
    strand.set_row(all.grad_vectors, 2 * this_piece, sums.a);
    strand.set_row(all.grad_vectors, 2 * this_piece + 1, sums.b * strand.w * (1 / LOG2E));
    if (strand.opening()) {
        const Real b = strand.state(all.state, strand.sequence).b;  // of 0: no history, so no gradient
        if (strand.time > 0) carry = {select_(b == 0, Real{}, carry.a), select_(b == 0, Real{}, carry.b), Real{}};
        strand.set_state(all.grad_initial, strand.sequence, {carry.a, carry.b, Real{}});
    }
}

}  // namespace wkv4

#define WKV_KERNEL(name, pass, plan, tensors, cut)                                                  \
    extern "C" __global__ void __launch_bounds__(plan##_WARPS * wkv4::LANES, plan##_BLOCKS)         \
    wkv4_##name(const __grid_constant__ wkv4::Arguments all) {                                      \
        wkv4::pass<wkv4::Plan<tensors, plan##_WARPS, plan##_STEPS, cut>>(all);                      \
    }

WKV_KERNEL(forward, forward, FORWARD, 2, false)
WKV_KERNEL(backward, backward, BACKWARD, 3, false)
WKV_KERNEL(forward_cut, forward, FORWARD_CUT, 2, true)
WKV_KERNEL(backward_cut, backward, BACKWARD_CUT, 3, true)
