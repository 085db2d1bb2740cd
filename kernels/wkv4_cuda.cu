// WKV-4 on an NVIDIA GPU, compiled by NVRTC. wkv4_cuda.py defines ELEMENT (0 float, 1 bfloat16, 2 float16), CHANNELS of
// a thread (1 or 2) and the sizes of tiles.
//
// Symbols: N sequences of tokens laid end to end, C channels, S pieces that each sequence is cut into.
//
// A block of threads has the channels of a warp, of one piece, and walks its time in tiles. A tile is read from memory
// once, into registers: warp i holds its i-th STEPS tokens. Each warp adds up its own, they tell each other the sums,
// and each computes its results from its true start. The backward pass does the same again from the states that the
// forward pass kept, and then for adjoints, from last to first. So keys and values are read once and outputs written
// once; backwards, keys, values and the outputs' gradients are read once and two gradients written once.
//
// Where whole sequences would not fill the GPU (`pieces` in wkv4_cuda.py), S > 1: another kernel has found what each
// piece adds up to, and a block first joins those before its own.
//
// Results depend on nothing but the arguments: every sum has a fixed order.

#define WKV_INLINE __device__ __forceinline__

namespace wkv4 {

// Exponents are powers of 2, which is what the hardware computes: e^x is here 2^(x log2 e).
constexpr float EMPTY_EXPONENT = -1.4426950e38f, LOG2E = 1.4426950408889634f;
constexpr float FASTEST = 1e6f;  // of a decay: e^-1e6 a step is nothing, and many steps of it are still a number
constexpr int LANES = 32;
static_assert(TILE == BACKWARD_STEPS * BACKWARD_WARPS && FORWARD_STEPS * FORWARD_WARPS % TILE == 0 &&
                  TILE % FORWARD_STEPS == 0,
              "a kept state must be the first of a warp");

// -- what a thread computes in: the numbers of one or two channels ----------------------------------------------------

WKV_INLINE float exp_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
WKV_INLINE float max_(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
WKV_INLINE float min_(float x, float y) {
    float z;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
WKV_INLINE float reciprocal_(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Of the decay, whose error many steps multiply.
WKV_INLINE float precise_exp(float x) { return expf(x); }
WKV_INLINE float abs_(float x) { return fabsf(x); }
WKV_INLINE float select_(bool condition, float x, float y) { return condition ? x : y; }

#if CHANNELS == 1
typedef float Real;
#else
struct Real {
    float x, y;
};
struct Both {
    bool x, y;
};
WKV_INLINE Real operator+(Real a, Real b) { return {a.x + b.x, a.y + b.y}; }
WKV_INLINE Real operator-(Real a, Real b) { return {a.x - b.x, a.y - b.y}; }
WKV_INLINE Real operator*(Real a, Real b) { return {a.x * b.x, a.y * b.y}; }
WKV_INLINE Real operator+(Real a, float b) { return {a.x + b, a.y + b}; }
WKV_INLINE Real operator-(Real a, float b) { return {a.x - b, a.y - b}; }
WKV_INLINE Real operator*(Real a, float b) { return {a.x * b, a.y * b}; }
WKV_INLINE Real operator-(Real a) { return {-a.x, -a.y}; }
WKV_INLINE Both operator>(Real a, float b) { return {a.x > b, a.y > b}; }
WKV_INLINE Both operator==(Real a, float b) { return {a.x == b, a.y == b}; }
WKV_INLINE Real precise_exp(Real a) { return {precise_exp(a.x), precise_exp(a.y)}; }
WKV_INLINE Real exp_(Real a) { return {exp_(a.x), exp_(a.y)}; }
WKV_INLINE Real abs_(Real a) { return {abs_(a.x), abs_(a.y)}; }
WKV_INLINE Real max_(Real a, Real b) { return {max_(a.x, b.x), max_(a.y, b.y)}; }
WKV_INLINE Real min_(Real a, Real b) { return {min_(a.x, b.x), min_(a.y, b.y)}; }
WKV_INLINE Real reciprocal_(Real a) { return {reciprocal_(a.x), reciprocal_(a.y)}; }
WKV_INLINE Real select_(Both c, Real a, Real b) { return {select_(c.x, a.x, b.x), select_(c.y, a.y, b.y)}; }
WKV_INLINE Real select_(bool c, Real a, Real b) { return {select_(c, a.x, b.x), select_(c, a.y, b.y)}; }
#endif

}  // namespace wkv4

#include "wkv4_step.h"

namespace wkv4 {

// -- elements: Packed is what a thread reads and writes at once -------------------------------------------------------

#if ELEMENT == 0
typedef float Element;
#if CHANNELS == 1
typedef float Packed;
WKV_INLINE Real widen(Packed x) { return x; }
WKV_INLINE Packed narrow(Real x) { return x; }
#else
typedef float2 Packed;
WKV_INLINE Real widen(Packed x) { return {x.x, x.y}; }
WKV_INLINE Packed narrow(Real x) { return {x.x, x.y}; }
#endif
#else
typedef unsigned short Element;
#if ELEMENT == 1
WKV_INLINE float widen(Element x) { return __int_as_float(int(x) << 16); }
WKV_INLINE Element narrow(float x) {
    Element y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#else
WKV_INLINE float widen(Element x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
WKV_INLINE Element narrow(float x) {
    Element y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif
#if CHANNELS == 1
typedef Element Packed;
#else
typedef unsigned int Packed;
WKV_INLINE Real widen(Packed x) { return {widen(Element(x)), widen(Element(x >> 16))}; }
WKV_INLINE Packed narrow(Real x) { return narrow(x.x) | Packed(narrow(x.y)) << 16; }
#endif
#endif

typedef long long Int;

// (B, T, C), or (1, tokens, C) with bounds: channels lie side by side, all else at any distance, counted in elements.
struct Sequences {
    const Element* data;
    Int batch_stride, time_stride;
};

// Token i after `from`, `stride` elements apart. One instruction, where the compiler would take three.
template <class T> WKV_INLINE T* after(T* from, int i, int stride) {
    T* to;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(i), "r"(stride * int(sizeof(Element))), "l"(from));
    return to;
}

// The arguments of all kernels, as wkv4_cuda.py fills them in. What is not const is written, and lies without gaps.
// Piece n * pieces + i is the tokens i * length .. (i + 1) * length of sequence n.
struct Arguments {
    Int time, channels, pieces, length;
    const Int* bounds;  // (N + 1) or null: then every sequence is a row of `time` tokens
    const float *time_decay, *time_first;  // (C)
    Sequences key, value;
    const float* state;  // (N, 3, C)
    float* tiles;        // (tokens / TILE + N, 3, C) or null: the states that the backward pass starts from
    float* sums;         // (N * S, 3, C): what pieces add up to; in the backward pass of adjoints
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
    Int sequence, piece, channel, begin, time, from, to;
    int warp, lane;
    Real w, u;

    WKV_INLINE Strand(const Arguments& all, Int block) : all(all) {
        const Int width = LANES * CHANNELS, blocks = (all.channels + width - 1) / width, i = block / blocks;
        warp = threadIdx.x / LANES;
        lane = threadIdx.x % LANES;
        channel = min(block % blocks * width + lane * CHANNELS, all.channels - CHANNELS);  // some do the last ones together
        sequence = i / all.pieces;
        piece = i % all.pieces;
        begin = all.bounds ? all.bounds[sequence] : sequence * all.time;
        time = all.bounds ? all.bounds[sequence + 1] - begin : all.time;
        from = min(piece * all.length, time);
        to = min(from + all.length, time);
        w = -min_(precise_exp(row(all.time_decay, 0)) * LOG2E, Real{} + FASTEST);
        u = row(all.time_first, 0) * LOG2E;
    }
    WKV_INLINE Int pieces() const { return max(Int(1), (time + all.length - 1) / all.length); }
    WKV_INLINE bool opening() const { return piece == 0; }
    WKV_INLINE bool closing() const { return piece == pieces() - 1; }
    WKV_INLINE Int tile(Int t) const { return begin / TILE + sequence + t / TILE; }

    // Row i of a tensor (..., C) of real numbers.
    WKV_INLINE Real row(const float* x, Int i) const {
        return *reinterpret_cast<const Real*>(x + i * all.channels + channel);
    }
    WKV_INLINE void set_row(float* x, Int i, Real y) const {
        *reinterpret_cast<Real*>(x + i * all.channels + channel) = y;
    }
    WKV_INLINE State<Real> state(const float* x, Int i) const {
        return {row(x, 3 * i), row(x, 3 * i + 1), row(x, 3 * i + 2)};
    }
    WKV_INLINE void set_state(float* x, Int i, const State<Real>& s) const {
        set_row(x, 3 * i, s.a), set_row(x, 3 * i + 1, s.b), set_row(x, 3 * i + 2, s.p);
    }
    WKV_INLINE State<Real> initial() const {
        State<Real> s = state(all.state, sequence);
        s.p = s.p * LOG2E;
        return adopt(s);
    }
    // Token t of a tensor.
    WKV_INLINE Element* at(Element* x, Int t) const { return x + (begin + t) * all.channels + channel; }
    WKV_INLINE const Element* at(const Sequences& x, Int t) const {
        return x.data + (all.bounds ? (begin + t) * x.time_stride : sequence * x.batch_stride + t * x.time_stride) + channel;
    }
};

// What the warps of a block tell each other. There are two places, used in turn: one is read while the other is written.
template <int WARPS> struct Exchange {
    Item (*shared)[WARPS][LANES];
    int turn = 0;

    WKV_INLINE explicit Exchange(Item (*shared)[WARPS][LANES]) : shared(shared) {}
    WKV_INLINE void publish(const Item& item, const Strand& strand) {
        turn ^= 1;
        shared[turn][strand.warp][strand.lane] = item;
        __syncthreads();
    }
    WKV_INLINE const Item& of(int warp, const Strand& strand) const { return shared[turn][warp][strand.lane]; }
};

// A warp's tokens of a tile. FULL: the tile has STEPS for each of the WARPS; otherwise some warps have fewer, and repeat
// the last one without effect.
template <bool FULL, int STEPS, int WARPS> struct Share {
    static constexpr int TOKENS = STEPS * WARPS;
    const Strand& strand;
    int tokens, first, count;  // of the tile, before this warp's, and its own
    Int t;                     // this warp's first token
    const Element *keys, *values;
    Packed k[STEPS], v[STEPS];

    WKV_INLINE Share(const Strand& strand, Int tile) : strand(strand) {
        tokens = FULL ? TOKENS : int(strand.to - tile);
        first = FULL ? strand.warp * STEPS : min(strand.warp * STEPS, tokens);
        count = FULL ? STEPS : min(STEPS, tokens - first);
        t = tile + (FULL ? first : min(first, tokens - 1));
        keys = strand.at(strand.all.key, t), values = strand.at(strand.all.value, t);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) fetch(i);
    }
    WKV_INLINE void move(int tokens) {
        t += tokens;
        keys = after(keys, tokens, int(strand.all.key.time_stride));
        values = after(values, tokens, int(strand.all.value.time_stride));
    }
    WKV_INLINE void fetch(int i) {
        k[i] = read(keys, strand.all.key, i);
        v[i] = read(values, strand.all.value, i);
    }
    WKV_INLINE bool has(int i) const { return FULL || i < count; }
    WKV_INLINE int row(int i) const { return FULL ? i : max(0, min(i, count - 1)); }
    WKV_INLINE int count_of(int warp) const { return FULL ? STEPS : max(0, min(STEPS, tokens - warp * STEPS)); }

    // Token i of a tensor that begins at `x` with this warp's first token.
    WKV_INLINE Packed read(const Element* x, const Sequences& tensor, int i) const {
        return __ldg(reinterpret_cast<const Packed*>(after(x, row(i), int(tensor.time_stride))));
    }
    WKV_INLINE void write(Element* x, int i, Real y) const {
        if (has(i)) __stcg(reinterpret_cast<Packed*>(after(x, row(i), int(strand.all.channels))), narrow(y));
    }

    WKV_INLINE Real key(int i) const { return widen(k[i]) * LOG2E; }
    WKV_INLINE Real value(int i) const { return widen(v[i]); }
    WKV_INLINE Weights<Real> weights(int i, Real p) const { return weigh(strand.w, strand.u, key(i), p); }

    // The state after token i; returns its weights.
    WKV_INLINE Weights<Real> advance(State<Real>& s, int i) const {
        State<Real> next = s;
        const Weights<Real> weights = weigh(strand.w, strand.u, key(i), next.p);
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

    // The state before this warp's tokens, from that before the tile; `carry` moves to after it.
    WKV_INLINE State<Real> enter(State<Real>& carry, Exchange<WARPS>& exchange) const {
        exchange.publish(add_up<STEPS>(
                             strand.w, count, [&](int i) { return key(i); }, [&](int i) { return value(i); }),
                         strand);
        State<Real> start = carry;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            if (i == strand.warp) start = carry;
            carry = join(carry, strand.w * float(count_of(i)), exchange.of(i, strand));
        }
        return start;
    }
};

// One tile of the forward pass. Tokens of the next one, if there is `more`, are asked for as soon as those of this one
// are done with.
template <bool OUTPUT, class Tile>
WKV_INLINE void forward_tile(Tile& tile, State<Real>& carry, Exchange<FORWARD_WARPS>& exchange, bool more) {
    const Strand& strand = tile.strand;
    const Arguments& all = strand.all;
    State<Real> s = tile.enter(carry, exchange);
    if (OUTPUT && all.tiles && tile.t % TILE == 0 && tile.count > 0) strand.set_state(all.tiles, strand.tile(tile.t), s);
    Element* y = OUTPUT ? strand.at(all.output, tile.t) : nullptr;
    if (more) tile.move(tile.TOKENS);
#pragma unroll
    for (int i = 0; i < FORWARD_STEPS; ++i) {
        if (OUTPUT) {
            const State<Real> before = s;
            const Weights<Real> weights = tile.advance(s, i);
            tile.write(y, i, output(before, weights, tile.value(i)));
        }
        if (more) tile.fetch(i);
    }
}

// Outputs of a piece, or, without OUTPUT, what it adds up to.
template <bool OUTPUT> WKV_INLINE void forward(const Arguments& all) {
    __shared__ Item shared[2][FORWARD_WARPS][LANES];
    Exchange<FORWARD_WARPS> exchange(shared);
    const Strand strand(all, OUTPUT ? gridDim.x - 1 - blockIdx.x : blockIdx.x);  // begin with what was read last
    if (strand.from >= strand.to && !strand.opening()) return;
    if (!OUTPUT && strand.closing()) return;

    State<Real> carry = empty<Real>();
    if (OUTPUT) {
        carry = strand.initial();
        for (Int i = 0; i < strand.piece; ++i) {
            carry = join(carry, strand.w * float(all.length), strand.state(all.sums, strand.sequence * all.pieces + i));
        }
    }
    constexpr int TOKENS = FORWARD_STEPS * FORWARD_WARPS;
    Int t = strand.from;
    if (t + TOKENS <= strand.to) {
        Share<true, FORWARD_STEPS, FORWARD_WARPS> tile(strand, t);
        for (; t + TOKENS <= strand.to; t += TOKENS) {
            forward_tile<OUTPUT>(tile, carry, exchange, t + 2 * TOKENS <= strand.to);
        }
    }
    if (t < strand.to) {
        Share<false, FORWARD_STEPS, FORWARD_WARPS> tile(strand, t);
        forward_tile<OUTPUT>(tile, carry, exchange, false);
    }
    if (strand.warp > 0) return;
    if (!OUTPUT) {
        strand.set_state(all.sums, strand.sequence * all.pieces + strand.piece, carry);
    } else if (strand.closing()) {
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
template <bool OUTPUT, class Tile>
WKV_INLINE void backward_tile(Tile& tile, Packed (&gy)[BACKWARD_STEPS], const Element*& grads, Item& carry,
                              Exchange<BACKWARD_WARPS>& exchange, Item& sums, bool more) {
    constexpr int STEPS = BACKWARD_STEPS;
    const Strand& strand = tile.strand;
    const Arguments& all = strand.all;
    State<Real> start = strand.state(all.tiles, strand.tile(tile.t));
    State<Real> s = tile.enter(start, exchange), before[STEPS];
    Item run{Real{}, Real{}, Real{} + 1};  // what this warp's tokens add to the adjoint, and what they leave of it
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        before[i] = s;
        run.p = run.p * select_(tile.has(i), tile.advance(s, i).past, Real{} + 1);
    }
    Adjoint<Real> adjoint{Real{}, Real{}};
#pragma unroll
    for (int i = STEPS - 1; i >= 0; --i) {
        tile.retire(adjoint, before[i], tile.weights(i, before[i].p), i, widen(gy[i]));
    }
    run.a = adjoint.a, run.b = adjoint.b;
    exchange.publish(run, strand);
#pragma unroll
    for (int i = BACKWARD_WARPS - 1; i >= 0; --i) {
        if (i == strand.warp) adjoint = {carry.a, carry.b};
        carry = link(carry, exchange.of(i, strand));
    }

    Element *gk = OUTPUT ? strand.at(all.grad_key, tile.t) : nullptr, *gv = OUTPUT ? strand.at(all.grad_value, tile.t) : nullptr;
    if (more) tile.move(-tile.TOKENS), grads = after(grads, -tile.TOKENS, int(all.grad_output.time_stride));
#pragma unroll
    for (int i = STEPS - 1; i >= 0; --i) {
        if (OUTPUT) {
            const Weights<Real> weights = tile.weights(i, before[i].p);
            const Gradient<Real> gradient = differentiate(before[i], weights, tile.value(i), widen(gy[i]), adjoint);
            tile.write(gk, i, gradient.key);
            tile.write(gv, i, gradient.value);
            sums.a = sums.a + select_(tile.has(i), gradient.first, Real{});
            sums.b = sums.b + select_(tile.has(i), gradient.decay, Real{});
            tile.retire(adjoint, before[i], weights, i, widen(gy[i]));
        }
        if (more) tile.fetch(i), gy[i] = tile.read(grads, all.grad_output, i);
    }
}

// A tile and the `rest` before it.
template <bool OUTPUT, class Tile>
WKV_INLINE void backward_tiles(Tile& tile, Int rest, Item& carry, Exchange<BACKWARD_WARPS>& exchange, Item& sums) {
    Packed gy[BACKWARD_STEPS];
    const Element* grads = tile.strand.at(tile.strand.all.grad_output, tile.t);
#pragma unroll
    for (int i = 0; i < BACKWARD_STEPS; ++i) gy[i] = tile.read(grads, tile.strand.all.grad_output, i);
    for (; rest >= 0; --rest) backward_tile<OUTPUT>(tile, gy, grads, carry, exchange, sums, rest > 0);
}

// Gradients of a piece, or, without OUTPUT, the adjoint before it if that after it is 0, and what is left of one.
template <bool OUTPUT> WKV_INLINE void backward(const Arguments& all) {
    __shared__ Item shared[2][BACKWARD_WARPS][LANES];
    Exchange<BACKWARD_WARPS> exchange(shared);
    const Strand strand(all, OUTPUT ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    const Int this_piece = strand.sequence * all.pieces + strand.piece;
    if (!OUTPUT && (strand.from >= strand.to || strand.opening())) return;

    Item carry{Real{}, Real{}, Real{} + 1}, sums{Real{}, Real{}, Real{}};
    if (OUTPUT) {
        carry = strand.state(all.grad_state, strand.sequence);
        for (Int i = strand.pieces() - 1; i > strand.piece; --i) {
            carry = link(carry, strand.state(all.sums, strand.sequence * all.pieces + i));
        }
    }
    const Int whole = (strand.to - strand.from) / TILE, end = strand.from + whole * TILE;
    if (end < strand.to) {
        Share<false, BACKWARD_STEPS, BACKWARD_WARPS> tile(strand, end);
        backward_tiles<OUTPUT>(tile, 0, carry, exchange, sums);
    }
    if (whole > 0) {
        Share<true, BACKWARD_STEPS, BACKWARD_WARPS> tile(strand, end - TILE);
        backward_tiles<OUTPUT>(tile, whole - 1, carry, exchange, sums);
    }
    if (!OUTPUT) {
        if (strand.warp == 0) strand.set_state(all.sums, this_piece, carry);
        return;
    }
    exchange.publish(sums, strand);
    if (strand.warp > 0) return;
    for (int i = 1; i < BACKWARD_WARPS; ++i) {
        sums.a = sums.a + exchange.of(i, strand).a;
        sums.b = sums.b + exchange.of(i, strand).b;
    }
    strand.set_row(all.grad_vectors, 2 * this_piece, sums.a);
    strand.set_row(all.grad_vectors, 2 * this_piece + 1, sums.b * strand.w * (1 / LOG2E));
    if (strand.opening()) {
        const Real b = strand.state(all.state, strand.sequence).b;  // of 0: no history, so no gradient
        if (strand.time > 0) carry = {select_(b == 0, Real{}, carry.a), select_(b == 0, Real{}, carry.b), Real{}};
        strand.set_state(all.grad_initial, strand.sequence, {carry.a, carry.b, Real{}});
    }
}

}  // namespace wkv4

#define WKV_KERNEL(name, pass, warps, blocks)                                                       \
    extern "C" __global__ void __launch_bounds__(warps * wkv4::LANES, blocks)                       \
    wkv4_##name(const __grid_constant__ wkv4::Arguments all) { wkv4::pass(all); }

WKV_KERNEL(sums, forward<false>, FORWARD_WARPS, FORWARD_BLOCKS)
WKV_KERNEL(forward, forward<true>, FORWARD_WARPS, FORWARD_BLOCKS)
WKV_KERNEL(adjoints, backward<false>, BACKWARD_WARPS, BACKWARD_BLOCKS)
WKV_KERNEL(backward, backward<true>, BACKWARD_WARPS, BACKWARD_BLOCKS)
