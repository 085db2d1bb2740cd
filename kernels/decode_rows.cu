// What is between the matrix products of one token of an RWKV-4, for any number of rows of a batch: a block of threads
// for each row, or part of one. Compiled by NVRTC; decode_cuda.py defines what decode_cuda.h asks for, ROWS as 1.
//
// Symbols: B rows of the batch, C hidden size, A attention hidden size, I intermediate size.

#include "decode_cuda.h"

namespace decode {

// What comes before the matrices of a half of a block, or before the head, which mixes nothing.
struct Entering {
    Norm norm, pre_ln;
    Numbers mixes[3];
    Table embeddings;                    // of no rows but at the beginning
    const Element *delta, *receptance;   // (B, C), by which the residual stream grows, gated unless null
    float* stream;                       // (B, C)
    const Element* before;               // (B, C), the norm at the token before
    Element *after, *out;                // (B, C), which may be `before`; (mixes, B, C)
    Int channels;
};
struct Attending {
    Numbers time_decay, time_first;
    const Element *key, *value, *receptance;  // (B, A)
    const float* before;                      // (B, 3, A)
    float* after;                             // which may be `before`
    Element* out;                             // (B, A)
    Int channels;
};
struct Squaring {
    Element* x;  // becomes the square of its positive part
    Int count;
};

template <int N> class Entrance : Stream {
    const Entering& all;
    const int at;

  public:
    WKV_INLINE Entrance(const Entering& all, float* room) : Stream(all.channels, room), all(all), at(blockIdx.x * channels) {}

    WKV_INLINE void run() {
        const Ahead<N> ahead = look<N>(all.norm, all.mixes, all.before + at);
        if (all.embeddings.rows > 0) {
            each([&](int n, int i) { x[0][n] = all.embeddings.read(blockIdx.x, i, channels); });
            norm(all.pre_ln);
        } else {
            each([&](int n, int i) { x[0][n] = far_four(all.stream + at + i) + growth(at + i); });
        }
        each([&](int n, int i) { *reinterpret_cast<float4*>(all.stream + at + i) = x[0][n]; });
        norm(all.norm, ahead.weight, ahead.bias);
        each([&](int n, int i) {
            const float4 now = x[0][n];
            if (N == 0) {
                put_four(all.out, at + i, now);
            } else {
                const float4 before = Elements::widen(ahead.before[0][n]);
                put_four(all.after, at + i, now);
                for (int m = 0; m < N; ++m) {
                    const float4 mixed = before + Vectors::widen(ahead.mix[m][n]) * (now - before);
                    put_four(all.out + Int(m) * gridDim.x * channels, at + i, mixed);
                }
            }
        });
    }

  private:
    WKV_INLINE float4 growth(int i) const {
        const float4 delta = Elements::widen(four<Elements::Four>(all.delta, i));
        if (!all.receptance) return delta;
        const float4 gate = Elements::widen(four<Elements::Four>(all.receptance, i));
        return delta * float4{sigmoid(gate.x), sigmoid(gate.y), sigmoid(gate.z), sigmoid(gate.w)};
    }
};

template <int N> WKV_INLINE void enter(const Entering& all) {
    __shared__ float room[2 * ROWS * WARPS];
    Entrance<N>(all, room).run();
}

WKV_INLINE void attend(const Attending& all) {
    const int i = blockIdx.y * THREADS + threadIdx.x;
    if (i >= all.channels) return;
    const Int at = Int(blockIdx.x) * all.channels + i, state = Int(3) * blockIdx.x * all.channels + i;
    const float* const from = all.before + state;
    const wkv4::State<float> before{from[0], from[all.channels], from[2 * all.channels]};
    const float x = wkv(read_time(all.time_decay, i), read_time(all.time_first, i), widen(all.key[at]), widen(all.value[at]),
                        before, all.after + state, all.channels);
    all.out[at] = narrow(sigmoid(widen(all.receptance[at])) * x);
}

WKV_INLINE void square(const Squaring& all) {
    const Int i = 4 * (Int(blockIdx.x) * THREADS + threadIdx.x);
    if (i >= all.count) return;
    float4 x = Elements::widen(*reinterpret_cast<const Elements::Four*>(all.x + i));
    x = {x.x < 0 ? 0 : x.x, x.y < 0 ? 0 : x.y, x.z < 0 ? 0 : x.z, x.w < 0 ? 0 : x.w};
    *reinterpret_cast<Elements::Four*>(all.x + i) = narrow_four(x * x);
}

}  // namespace decode

extern "C" __global__ void __launch_bounds__(decode::THREADS)
    enter_attention(const __grid_constant__ decode::Entering arguments) { decode::enter<3>(arguments); }
extern "C" __global__ void __launch_bounds__(decode::THREADS)
    enter_feed_forward(const __grid_constant__ decode::Entering arguments) { decode::enter<2>(arguments); }
extern "C" __global__ void __launch_bounds__(decode::THREADS)
    enter_head(const __grid_constant__ decode::Entering arguments) { decode::enter<0>(arguments); }
extern "C" __global__ void __launch_bounds__(decode::THREADS)
    attend(const __grid_constant__ decode::Attending arguments) { decode::attend(arguments); }
extern "C" __global__ void __launch_bounds__(decode::THREADS)
    square(const __grid_constant__ decode::Squaring arguments) { decode::square(arguments); }
