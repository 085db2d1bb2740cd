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
// Most of the time goes into arithmetic. So the tokens of a warp share one exponent where their keys allow it, which
// takes half of it; then a token's last bits may depend on those beside it and after it.
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
    int time, channels, sequences, groups, pieces;  // groups of channels, those of a warp each
    int ahead;  // of a piece, the one to be brought nearer meanwhile
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
    float *grad_initial, *grad_pieces;   // (N, 3, C); (N * S, 2, C): of u and w, a piece at a time
    float *grad_first, *grad_decay;      // (C): the sums of these
};

typedef State<Real> Item;  // what warps tell each other: a state, or an adjoint beside what is left of the one after it

// The channels and the piece of a thread.
struct Strand {
    const Arguments& all;
    int sequence, piece, pieces, channel, begin, time, from, to;
    float* told;  // of this sequence and these channels
    int warp, lane;
    Real w, u, decay, lead;  // a step of decay, the bonus, e^w and e^u
    bool mild;               // whether e^u is neither too large nor too small for `weigh_level`

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
        decay = precise_exp(w * (1 / LOG2E));
        lead = exp_(u);
        mild = all_of(u > LEAST * LOG2E) && all_of(u < MOST * LOG2E);
    }
    WKV_INLINE int rank() const { return pieces - 1 - piece; }  // of a piece in the backward pass
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

WKV_INLINE bool everywhere(bool x) { return __all_sync(0xffffffff, x); }  // in the warp

// A warp's tokens of a tile. FULL: the tile has STEPS for each of the WARPS; otherwise some warps may have fewer, and repeat
// the last one without effect. LEVEL: all share one exponent, see `weigh_level`.
template <bool FULL, class Plan> struct Share {
    static constexpr int STEPS = Plan::STEPS, WARPS = Plan::WARPS, TOKENS = Plan::TOKENS;
    const Strand& strand;
    int tokens, first, count;  // of the tile, before this warp's, and its own
    int t;                     // this warp's first token
    const Element* from[Plan::TENSORS];
    Packed x[Plan::TENSORS][STEPS];
    Real top;   // the largest key
    bool even;  // whether all are less than RANGE below it

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
            const auto* at = reinterpret_cast<const Packed*>(after(from[j], row(i), int(tensor(j).time_stride)));
            x[j][i] = Plan::CUT ? __ldcs(at) : __ldg(at);
        }
    }
    // Let the piece that is `pieces` after this one, or before, be near when its turn comes.
    WKV_INLINE void prefetch(int pieces) const {
        const int thread = threadIdx.x, j = thread / TOKENS, t = strand.from + pieces * TOKENS + thread % TOKENS;
        if (j < Plan::TENSORS && t >= 0 && t < strand.time) wkv4::prefetch(strand.at(tensor(j), t));
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
        if (!has(i)) return;
        Packed* to = reinterpret_cast<Packed*>(after(x, row(i), int(strand.all.channels)));
        if (Plan::CUT) __stcs(to, narrow(y));
        else __stcg(to, narrow(y));
    }

    WKV_INLINE Real key(int i) const { return widen(x[0][i]) * LOG2E; }
    WKV_INLINE Real value(int i) const { return widen(x[1][i]); }
    WKV_INLINE Real grad(int i) const { return widen(x[2][i]); }
    // Whether the warp's tokens can share one exponent, to which the state before them then moves.
    WKV_INLINE bool settle(State<Real>& s) const {
        if (!FULL || !even || !everywhere(all_of(s.p - top < RANGE * LOG2E))) return false;
        const Real level = max_(s.p, top), scale = exp_(s.p - level);
        s = {s.a * scale, s.b * scale, level};
        return true;
    }
    // The weights of token i; p moves from before it to after it.
    template <bool LEVEL> WKV_INLINE Weights<Real> weigh(int i, Real& p) const {
        return LEVEL ? weigh_level(strand.decay, strand.lead, key(i), p) : wkv4::weigh(strand.w, strand.u, key(i), p);
    }
    // The state after token i; returns its weights.
    template <bool LEVEL> WKV_INLINE Weights<Real> advance(State<Real>& s, int i) const {
        State<Real> next = s;
        const Weights<Real> weights = weigh<LEVEL>(i, next.p);
        absorb(next, weights, value(i));
        s = {select_(has(i), next.a, s.a), select_(has(i), next.b, s.b), select_(has(i), next.p, s.p)};
        return weights;
    }
    // The exponents before each token, of which the first is p.
    template <bool LEVEL> WKV_INLINE void follow(Real p, Real (&exponents)[STEPS]) const {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            exponents[i] = p;
            if (!LEVEL) p = select_(has(i), max_(p + strand.w, key(i)), p);
        }
    }
    // The adjoint before token i.
    WKV_INLINE void retire(Adjoint<Real>& adjoint, const State<Real>& s, const Weights<Real>& weights, int i, Real gy) const {
        Adjoint<Real> next = adjoint;
        retreat(s, weights, value(i), gy, next);
        adjoint = {select_(has(i), next.a, adjoint.a), select_(has(i), next.b, adjoint.b)};
    }

    // What each warp's tokens add up to.
    WKV_INLINE const Board<WARPS>& publish(Exchange<WARPS>& exchange) {
        Packed most = x[0][0], least = most;
#pragma unroll
        for (int i = 1; i < STEPS; ++i) most = larger(most, x[0][i]), least = smaller(least, x[0][i]);
        top = widen(most) * LOG2E;
        even = FULL && everywhere(strand.mild && all_of(top - widen(least) * LOG2E < RANGE * LOG2E));
        const auto sum = add_up<STEPS>(
            strand.w, count, [&](int i) { return key(i); }, [&](int i) { return value(i); });
        return exchange.publish(sum, strand);
    }
    // The state after the tokens of warp i.
    WKV_INLINE State<Real> after_warp(const State<Real>& before, int i, const Board<WARPS>& runs) const {
        return join(before, strand.w * float(count_of(i)), runs[i][strand.lane]);
    }
    // From the state before the tile, or before any tokens, to that before this warp's.
    WKV_INLINE void enter(State<Real>& s, const Board<WARPS>& runs) const {
#pragma unroll
        for (int i = 0; i < WARPS - 1; ++i) {
            if (i < strand.warp) s = after_warp(s, i, runs);
        }
    }
};

// What is before a piece, in the order of a pass, where its place is `rank`. Pieces make groups, of one for each warp: the
// last one of a group tells what is after it, the others only what they add up to. `first` is what is before the first
// group, `sum` what this piece adds up to, known to warp `teller`, and join(before, piece) what is after a piece. Each warp
// listens to one other piece.
template <class Plan, class Join>
WKV_INLINE Item look_back(const Strand& strand, int rank, const Item& first, const Item& sum, int teller,
                          Exchange<Plan::WARPS>& exchange, const Join& join) {
    constexpr int LAST = Plan::WARPS - 1;
    const int others = rank % Plan::WARPS, group = rank - others;
    const bool tells = strand.warp == teller && rank + 1 < strand.pieces;
    if (tells && others < LAST) strand.tell(rank, sum);

    Item heard = first;
    const int other = strand.warp == LAST ? group - 1 : strand.warp < others ? group + strand.warp : -1;
    if (other >= 0) {
        do heard = strand.hear(other);
        while (!strand.is_there(heard));
    }
    const Board<Plan::WARPS>& runs = exchange.publish(heard, strand);
    Item before = runs[LAST][strand.lane];
#pragma unroll
    for (int i = 0; i < LAST; ++i) {
        if (i < others) before = join(before, runs[i][strand.lane]);
    }
    if (tells && others == LAST) strand.tell(rank, join(before, sum));
    return before;
}

// From the state before a warp's tokens. Those of the next tile, if there is `more`, are asked for as soon as these are
// done with.
template <bool LEVEL, class Plan, class Tile>
WKV_INLINE void write_outputs(Tile& tile, State<Real> s, Element* y, bool more) {
#pragma unroll
    for (int i = 0; i < Plan::STEPS; ++i) {
        const State<Real> before = s;
        const Weights<Real> weights = tile.template advance<LEVEL>(s, i);
        const Real v = tile.value(i);
        tile.write(y, i, LEVEL ? output_level(before, weights.now, tile.strand.lead, v) : output(before, weights, v));
        if (more) tile.fetch(i);
    }
}

// One tile of the forward pass; `carry` moves from before it to after it.
template <class Plan, class Tile>
WKV_INLINE void forward_tile(Tile& tile, State<Real>& carry, Exchange<Plan::WARPS>& exchange, bool more) {
    const Strand& strand = tile.strand;
    const Arguments& all = strand.all;
    const Board<Plan::WARPS>& runs = tile.publish(exchange);
    State<Real> s;
    if (Plan::CUT) {
        State<Real> before = empty<Real>();
        tile.enter(before, runs);
        constexpr int LAST = Plan::WARPS - 1;
        State<Real> sum;
        if (strand.warp == LAST) sum = tile.after_warp(before, LAST, runs);
        const auto after = [&](const Item& past, const Item& run) { return join(past, strand.w * float(Plan::TOKENS), run); };
        carry = look_back<Plan>(strand, strand.piece, carry, sum, LAST, exchange, after);
        tile.forget();
        s = join(carry, strand.w * float(tile.first), before);
        if (strand.closing()) carry = join(carry, strand.w * float(tile.tokens), sum);  // of the last warp
    } else {
#pragma unroll
        for (int i = 0; i < Plan::WARPS; ++i) {
            if (i == strand.warp) s = carry;
            carry = tile.after_warp(carry, i, runs);
        }
    }
    if (all.tiles && tile.t % TILE == 0 && tile.count > 0) strand.set_state(all.tiles, strand.tile(tile.t), s);
    Element* y = strand.at(all.output, tile.t);
    if (more) tile.move(Plan::TOKENS);
    if (tile.settle(s)) write_outputs<true, Plan>(tile, s, y, more);
    else write_outputs<false, Plan>(tile, s, y, more);
}

// Outputs of a piece.
template <class Plan> WKV_INLINE void forward(const Arguments& all) {
    __shared__ Board<Plan::WARPS> shared[3];
    Exchange<Plan::WARPS> exchange(shared);
    const Strand strand(all, blockIdx.x, blockIdx.y, Plan::CUT ? Plan::TOKENS : 0);
    if (strand.from >= strand.to && !strand.opening()) return;

    State<Real> carry = empty<Real>();
    if (strand.piece < Plan::WARPS) carry = strand.initial();  // otherwise others tell
    int t = strand.from;
    if (t + Plan::TOKENS <= strand.to) {
        Share<true, Plan> tile(strand, t);
        if (Plan::CUT) tile.prefetch(all.ahead);
        for (; t + Plan::TOKENS <= strand.to; t += Plan::TOKENS) {
            forward_tile<Plan>(tile, carry, exchange, !Plan::CUT && t + 2 * Plan::TOKENS <= strand.to);
        }
    }
    if (t < strand.to) {
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

// The adjoint before a warp's tokens if that after them is 0. Keeps the states before each; s moves to that after all.
template <bool LEVEL, class Plan, class Tile>
WKV_INLINE Adjoint<Real> adjoint_before(const Tile& tile, State<Real>& s, State<Real> (&before)[Plan::STEPS]) {
#pragma unroll
    for (int i = 0; i < Plan::STEPS; ++i) {
        before[i] = s;
        tile.template advance<LEVEL>(s, i);
    }
    Adjoint<Real> adjoint{Real{}, Real{}};
#pragma unroll
    for (int i = Plan::STEPS - 1; i >= 0; --i) {
        Real p = before[i].p;
        tile.retire(adjoint, before[i], tile.template weigh<LEVEL>(i, p), i, tile.grad(i));
    }
    return adjoint;
}

// From the adjoint after a warp's tokens; adds up the gradients of u and w. The states' exponents begin with p.
template <bool LEVEL, class Plan, class Tile>
WKV_INLINE void write_gradients(Tile& tile, const State<Real> (&before)[Plan::STEPS], Real p, Adjoint<Real> adjoint,
                                Element* gk, Element* gv, Item& sums, bool more) {
    Real exponents[Plan::STEPS];
    tile.template follow<LEVEL>(p, exponents);
#pragma unroll
    for (int i = Plan::STEPS - 1; i >= 0; --i) {
        const Weights<Real> weights = tile.template weigh<LEVEL>(i, exponents[i]);
        const Gradient<Real> gradient = differentiate(before[i], weights, tile.value(i), tile.grad(i), adjoint);
        tile.write(gk, i, gradient.key);
        tile.write(gv, i, gradient.value);
        sums.a = sums.a + select_(tile.has(i), gradient.first, Real{});
        sums.b = sums.b + select_(tile.has(i), weights.past * gradient.decay, Real{});
        tile.retire(adjoint, before[i], weights, i, tile.grad(i));
        if (more) tile.fetch(i);
    }
}

// One tile of the backward pass; as in the forward pass, those of the next one are asked for.
template <class Plan, class Tile>
WKV_INLINE void backward_tile(Tile& tile, Item& carry, Exchange<Plan::WARPS>& exchange, Item& sums, bool more) {
    static_assert(Plan::TOKENS == TILE, "a tile must begin with a kept state");
    constexpr int STEPS = Plan::STEPS;
    const Strand& strand = tile.strand;
    const Arguments& all = strand.all;
    State<Real> s = strand.state(all.tiles, strand.tile(tile.t)), before[STEPS];
    const Board<Plan::WARPS>& states = tile.publish(exchange);
    tile.enter(s, states);
    // The exponents before and after this warp's tokens, as other warps have them.
    const Real opened = s.p, closed = tile.after_warp(s, strand.warp, states).p;
    const bool level = tile.settle(s);
    const Real first = s.p, entered = exp_(opened - first);
    Adjoint<Real> adjoint = level ? adjoint_before<true, Plan>(tile, s, before) : adjoint_before<false, Plan>(tile, s, before);
    const Real left = exp_(s.p - closed);
    // What these tokens add to the adjoint, and what they leave of it.
    const Item run{adjoint.a * entered, adjoint.b * entered, exp_(opened + strand.w * float(tile.count) - closed)};
    const Board<Plan::WARPS>& runs = exchange.publish(run, strand);
    if (Plan::CUT) {
        Item after{Real{}, Real{}, Real{} + 1};
#pragma unroll
        for (int i = Plan::WARPS - 1; i >= 0; --i) {
            if (i > strand.warp) after = link(after, runs[i][strand.lane]);
        }
        Item sum;
        if (strand.warp == 0) sum = link(after, runs[0][strand.lane]);
        carry = look_back<Plan>(strand, strand.rank(), carry, sum, 0, exchange, link);
        tile.forget();
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
    adjoint = {adjoint.a * left, adjoint.b * left};
    if (level) write_gradients<true, Plan>(tile, before, first, adjoint, gk, gv, sums, more);
    else write_gradients<false, Plan>(tile, before, first, adjoint, gk, gv, sums, more);
}

// Gradients of a piece.
template <class Plan> WKV_INLINE void backward(const Arguments& all) {
    __shared__ Board<Plan::WARPS> shared[3];
    Exchange<Plan::WARPS> exchange(shared);
    const int last = gridDim.x - 1, last_piece = gridDim.y - 1;
    const Strand strand(all, last - blockIdx.x, last_piece - blockIdx.y, Plan::CUT ? Plan::TOKENS : 0);

    Item carry{Real{}, Real{}, Real{}}, sums = carry;
    if (strand.rank() < Plan::WARPS) carry = strand.state(all.grad_state, strand.sequence);  // otherwise others tell
    for (int t = strand.to; t > strand.from;) {
        const int rest = (t - strand.from) % Plan::TOKENS;
        if (rest > 0) {
            t -= rest;
            Share<false, Plan> tile(strand, t);
            backward_tile<Plan>(tile, carry, exchange, sums, false);
        } else {
            Share<true, Plan> tile(strand, t - Plan::TOKENS);
            if (Plan::CUT) tile.prefetch(-all.ahead);
            for (; t > strand.from; t -= Plan::TOKENS) {
                backward_tile<Plan>(tile, carry, exchange, sums, !Plan::CUT && t - Plan::TOKENS > strand.from);
            }
        }
    }
    const Board<Plan::WARPS>& parts = exchange.publish(sums, strand);
    if (strand.warp > 0) return;
    for (int i = 1; i < Plan::WARPS; ++i) {
        sums.a = sums.a + parts[i][strand.lane].a;
        sums.b = sums.b + parts[i][strand.lane].b;
    }
    const int this_piece = strand.sequence * all.pieces + strand.piece;
    strand.set_row(all.grad_pieces, 2 * this_piece, sums.a);
    strand.set_row(all.grad_pieces, 2 * this_piece + 1, sums.b * strand.w * (1 / LOG2E));
    if (strand.opening()) {
        const Real b = strand.state(all.state, strand.sequence).b;  // of 0: no history, so no gradient
        if (strand.time > 0) carry = {select_(b == 0, Real{}, carry.a), select_(b == 0, Real{}, carry.b), Real{}};
        strand.set_state(all.grad_initial, strand.sequence, {carry.a, carry.b, Real{}});
    }
}

// The gradients of u and w: sums over all pieces, each thread's first, then those of all warps.
WKV_INLINE void sum_pieces(const Arguments& all) {
    __shared__ float shared[SUM_WARPS][LANES];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int columns = 2 * all.channels, column = min(int(blockIdx.x) * LANES + lane, columns - 1);
    float sum = 0;
#pragma unroll 8
    for (int i = warp; i < all.sequences * all.pieces; i += SUM_WARPS) sum += all.grad_pieces[Int(i) * columns + column];
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp > 0) return;
    for (int i = 1; i < SUM_WARPS; ++i) sum += shared[i][lane];
    if (column < all.channels) all.grad_first[column] = sum;
    else all.grad_decay[column - all.channels] = sum;
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

extern "C" __global__ void __launch_bounds__(SUM_WARPS * wkv4::LANES)
wkv4_sum_pieces(const __grid_constant__ wkv4::Arguments all) {
    wkv4::sum_pieces(all);
}
