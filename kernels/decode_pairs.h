// A matrix of bfloat16 times a few rows of a batch by instructions that add up products of pairs (AVX-512 BF16), for
// decode_cpu.cpp. The floats that weights meet are rounded to bfloat16, as PyTorch rounds them. To these instructions,
// subnormal bfloat16 are zeros.

#pragma once

#include "decode_products.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

namespace decode {

// (B, columns) bfloat16. There are zeros after the end of a row, to a multiple of a vector.
struct Rounded {
    typedef Vector<uint32_t, VECTOR_BYTES / 4> Pairs;  // two in each

    std::vector<Pairs> all;
    int64_t stride = 0;  // vectors

    void take(int64_t rows, const Rows& in) {
        stride = (in.columns + 2 * LANES - 1) / (2 * LANES);
        all.resize(rows * stride);
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t k = 0; k < stride; ++k) {
                const Halves halves[] = {narrow(in.get(b, 2 * k * LANES), BFloat16{}),
                                         narrow(in.get(b, (2 * k + 1) * LANES), BFloat16{})};
                std::memcpy(&all[b * stride + k], halves, sizeof halves);
            }
        }
    }
};

#if HAS_PAIRS

// A way to multiply, as ByFloats is.
struct ByPairs {
    typedef BFloat16 Weight;
    typedef Rounded Input;
    static constexpr int WIDE = decode::WIDE;
    static constexpr int64_t DEEP = 2048;

    template <int B, int N> static ALWAYS_INLINE void band(const Tiles& it, int64_t row, const Rounded& in, Rows& out) {
        const int64_t stride = in.stride;
        const Rounded::Pairs* const batch = in.all.data() + it.batch * stride;
        Floats totals[B][N]{};
        each_group<BFloat16, N>(it, row, [&](int64_t i, const Words* words) ALWAYS_INLINED {
            unrolled<B>([&](auto b) ALWAYS_INLINED {
                const __m512bh x = bitcast<__m512bh>(batch[b * stride + i / (2 * LANES)]);
                unrolled<N>([&](auto n) ALWAYS_INLINED {
                    __m512 total = bitcast<__m512>(totals[b][n]);
                    total = _mm512_dpbf16_ps(total, bitcast<__m512bh>(words[n]), x);
                    totals[b][n] = bitcast<Floats>(total);
                });
            });
        });
        unrolled<B>([&](auto b) ALWAYS_INLINED { put<N>(it, row, b, totals[b], 1, out); });
    }
};

inline void by_pairs(const Matrix& matrix, int64_t batch, Range range, const Rounded& in, Rows& out) {
    product<ByPairs>(matrix, batch, range, in, out);
}

#else

inline void by_pairs(const Matrix&, int64_t, Range, const Rounded&, Rows&) {}  // which nobody is offered

#endif

}  // namespace decode
