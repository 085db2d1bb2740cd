// What the CUDA kernels of the next token have in common: where weights are, numbers of several kinds, four at once.
// Whoever includes this defines what cuda_numbers.h asks for, ROWS of the batch that a block of WARPS has, FOURS of
// channels that a thread has at most, and what norms and mixes (VECTOR) and time_decay and time_first (TIME) are of,
// numbered as ELEMENT.

#pragma once

#include "cuda_numbers.h"

namespace wkv4 {

// Exponents are powers of 2, as in cuda_tiles.h.
constexpr float EMPTY_EXPONENT = -1.4426950e38f, LOG2E = 1.4426950408889634f;

}  // namespace wkv4

#include "wkv4_step.h"

namespace decode {

using namespace wkv4;

typedef long long Int;

constexpr int LANES = 32, THREADS = LANES * WARPS;

// As decode_weights.py fills them in.
struct Numbers {
    const void* data;
    Int dtype;
};
struct Matrix {
    const Element* data;  // (rows, columns), without gaps
    const float* scales;
    Int dtype, rows, columns;

    WKV_INLINE const Element* row(int i) const { return data + i * columns; }
};
struct Norm {
    Numbers weight, bias;
    double epsilon;
};
struct Block {
    Norm ln1, ln2;
    Numbers time_decay, time_first;
    Numbers attention_mix[3], feed_forward_mix[2];  // of key, value, receptance; of key, receptance
    Matrix key, value, receptance, output;
    Matrix feed_forward_key, feed_forward_receptance, feed_forward_value;
};
struct Model {
    Int layers;
    const Block* blocks;
    Norm pre_ln, ln_out;
    Matrix head;
};

// -- numbers ----------------------------------------------------------------------------------------------------------

WKV_INLINE float half_to_float(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// Numbers of one of the three kinds, one or four at once.
template <int KIND> struct Kind {
    typedef unsigned short One;
    typedef uint2 Four;
    static WKV_INLINE float widen(One x) { return KIND == 1 ? __int_as_float(int(x) << 16) : half_to_float(x); }
    static WKV_INLINE float4 widen(Four x) { return {widen(One(x.x)), widen(One(x.x >> 16)), widen(One(x.y)), widen(One(x.y >> 16))}; }
};
template <> struct Kind<0> {
    typedef float One;
    typedef float4 Four;
    static WKV_INLINE float widen(One x) { return x; }
    static WKV_INLINE float4 widen(Four x) { return x; }
};
typedef Kind<ELEMENT> Elements;
typedef Kind<VECTOR> Vectors;
typedef Kind<TIME> Times;

WKV_INLINE float read_time(const Numbers& from, int i) { return Times::widen(static_cast<const Times::One*>(from.data)[i]); }
template <class Four> WKV_INLINE Four four(const void* from, int i) {
    return *reinterpret_cast<const Four*>(static_cast<const char*>(from) + Int(i) * (sizeof(Four) / 4));
}
#if ELEMENT == 0
WKV_INLINE float4 narrow_four(float4 x) { return x; }
#else
WKV_INLINE unsigned two(float x, float y) { return narrow(x) | unsigned(narrow(y)) << 16; }
WKV_INLINE uint2 narrow_four(float4 x) { return {two(x.x, x.y), two(x.z, x.w)}; }
#endif
WKV_INLINE void put_four(Element* to, int i, float4 x) {
    *reinterpret_cast<Elements::Four*>(to + i) = narrow_four(x);
}
WKV_INLINE float4 far_four(const float* from) { return __ldcg(reinterpret_cast<const float4*>(from)); }

WKV_INLINE float4 operator+(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
WKV_INLINE float4 operator-(float4 a, float4 b) { return {a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w}; }
WKV_INLINE float4 operator*(float4 a, float4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
WKV_INLINE float4 all_four(float x) { return {x, x, x, x}; }
WKV_INLINE float sum(float4 a) { return (a.x + a.y) + (a.z + a.w); }

WKV_INLINE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// -- threads ----------------------------------------------------------------------------------------------------------

WKV_INLINE int lane() { return threadIdx.x % LANES; }

WKV_INLINE float warp_sum(float x) {
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) x += __shfl_xor_sync(~0u, x, other);
    return x;
}

// The embeddings of the token: of each row of the batch, row `ids` of `data`.
struct Table {
    const Int* ids;       // (B)
    const Element* data;  // (rows, C)
    Int rows;

    WKV_INLINE float4 read(int b, int i, int channels) const {
        const Int id = ids[b];
        if (id < 0 || id >= rows) __trap();
        return Elements::widen(four<Elements::Four>(data + id * channels, i));
    }
};

// What a thread needs of a norm and of N mixes, but for the residual stream; read while it waits for that.
template <int N> struct Ahead {
    Vectors::Four weight[FOURS], bias[FOURS], mix[N > 0 ? N : 1][FOURS];
    Elements::Four before[ROWS][FOURS];
};

// The residual stream of ROWS tokens, in the registers of a block of threads, and what is made of it.
class Stream {
  protected:
    const int channels;
    float* const room;      // in shared memory: (2, ROWS, WARPS), for sums
    float4 x[ROWS][FOURS];  // the residual stream, then its norm
    unsigned sums = 0;

    WKV_INLINE Stream(int channels, float* room) : channels(channels), room(room) {}

    // body(n, channel) for the first of this thread's n-th four channels.
    template <class Body> WKV_INLINE void each(const Body& body) const {
#pragma unroll
        for (int n = 0; n < FOURS; ++n) {
            const int i = 4 * (n * THREADS + threadIdx.x);
            if (i < channels) body(n, i);
        }
    }

    // Sums over the threads of a block.
    WKV_INLINE void add_up(float (&x)[ROWS]) {
        float* const here = room + sums++ % 2 * ROWS * WARPS;
#pragma unroll
        for (int b = 0; b < ROWS; ++b) {
            x[b] = warp_sum(x[b]);
            if (lane() == 0) here[b * WARPS + threadIdx.x / LANES] = x[b];
        }
        __syncthreads();
#pragma unroll
        for (int b = 0; b < ROWS; ++b) {
            x[b] = 0;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) x[b] += here[b * WARPS + i];
        }
    }

    WKV_INLINE void norm(const Norm& norm, const Vectors::Four (&weight)[FOURS], const Vectors::Four (&bias)[FOURS]) {
        float mean[ROWS]{}, scale[ROWS]{};
        each([&](int n, int) {
            for (int b = 0; b < ROWS; ++b) mean[b] += sum(x[b][n]);
        });
        add_up(mean);
        each([&](int n, int) {
            for (int b = 0; b < ROWS; ++b) {
                x[b][n] = x[b][n] - all_four(mean[b] / channels);
                scale[b] += sum(x[b][n] * x[b][n]);
            }
        });
        add_up(scale);
        each([&](int n, int) {
            for (int b = 0; b < ROWS; ++b) {
                const float4 even = x[b][n] * all_four(rsqrtf(scale[b] / channels + float(norm.epsilon)));
                x[b][n] = even * Vectors::widen(weight[n]) + Vectors::widen(bias[n]);
            }
        });
    }

    WKV_INLINE void norm(const Norm& of) {
        Vectors::Four weight[FOURS], bias[FOURS];
        each([&](int n, int i) {
            weight[n] = four<Vectors::Four>(of.weight.data, i), bias[n] = four<Vectors::Four>(of.bias.data, i);
        });
        norm(of, weight, bias);
    }

    // mixes: N of them; before: (ROWS, C), the norm at the token before.
    template <int N> WKV_INLINE Ahead<N> look(const Norm& norm, const Numbers* mixes, const Element* before) const {
        Ahead<N> ahead;
        each([&](int n, int i) {
            ahead.weight[n] = four<Vectors::Four>(norm.weight.data, i);
            ahead.bias[n] = four<Vectors::Four>(norm.bias.data, i);
            for (int m = 0; m < N; ++m) ahead.mix[m][n] = four<Vectors::Four>(mixes[m].data, i);
            for (int b = 0; b < (N > 0 ? ROWS : 0); ++b) {
                ahead.before[b][n] = four<Elements::Four>(before, b * channels + i);
            }
        });
        return ahead;
    }
};

// One token of a channel: the output, from a state `stride` numbers apart, which `to` becomes.
WKV_INLINE float wkv(float decay, float first, float key, float value, wkv4::State<float> state, float* to, int stride) {
    const float w = -precise_exp(min_(decay, 30)) * LOG2E;
    state = adopt(wkv4::State<float>{state.a, state.b, state.p * LOG2E});
    wkv4::State<float> next = state;
    const Weights<float> weights = weigh(w, first * LOG2E, key * LOG2E, next.p);
    absorb(next, weights, value);
    to[0] = next.a;
    to[stride] = next.b;
    to[2 * stride] = next.p * (1 / LOG2E);
    return output(state, weights, value);
}

}  // namespace decode
