// What the CUDA kernels of WKV-4 work on: the channels of a thread (Strand), the tokens of a warp (Share), and what
// warps and blocks tell each other (Exchange, Strand::tell). Whoever includes this includes cuda_numbers.h before.

#pragma once

namespace wkv4 {

// Exponents are powers of 2, which is what the hardware computes: e^x is here 2^(x log2 e).
constexpr float EMPTY_EXPONENT = -1.4426950e38f, LOG2E = 1.4426950408889634f;
constexpr float FASTEST = 1e6f;  // of a decay: e^-1e6 a step is nothing, and many steps of it are still a number
constexpr int LANES = 32;

// How a pass goes through a sequence: tiles of STEPS tokens for each of WARPS; the whole in turn, or CUT into tiles.
// It reads the first TENSORS of key, value, grad_output.
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
    float* told;         // (N, groups, S, 3, LANES * CHANNELS), all NOTHING: for what pieces tell each other
    Element* output;     // (tokens, C)
    float* final_state;  // (N, 3, C)
    Sequences grad_output;
    const float* grad_state;             // (N, 3, C)
    Element *grad_key, *grad_value;      // (tokens, C)
    float *grad_initial, *grad_pieces;   // (N, 3, C); (N * S, 2, C): of u and w, a piece at a time
    float *grad_first, *grad_decay;      // (C): the sums of these
};

// What warps tell each other: a state, or an adjoint beside what is left of the one after it.
typedef State<Real> Item;

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
        wkv4::tell(to, item.a);
        wkv4::tell(to + LANES * CHANNELS, item.b);
        wkv4::tell(to + 2 * LANES * CHANNELS, item.p);
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

// A warp's tokens of a tile. FULL: the tile has STEPS for each of the WARPS; otherwise some warps may have fewer, and
// repeat the last one without effect. LEVEL: all share one exponent, see `weigh_level`.
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
    WKV_INLINE void retire(Adjoint<Real>& adjoint, const State<Real>& s, const Weights<Real>& weights, int i,
                           Real gy) const {
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

}  // namespace wkv4
