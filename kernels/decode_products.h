// A matrix times a few rows, for decode_cpu.cpp: each weight is read once, as it lies in memory, and meets all rows.
// Plain C++17 with the vector extensions of GCC and Clang.
//
// Symbols: E the type of a weight; N rows of a matrix times B of a batch are a tile, whose sums stay in registers.

#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_vectors.h"

#define ALWAYS_INLINED __attribute__((always_inline))

namespace decode {

using namespace cpu;

constexpr int LANES = cpu::LANES<float>;
constexpr int TALL = 4;  // rows of a matrix in a tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDE = 6;  // rows of a batch, at most: the sums take 24 of 32 registers, or 8 of 16
#else
constexpr int WIDE = 2;
#endif
constexpr int64_t CACHED = 1 << 18;  // bytes of a matrix, in the second cache until all tiles have met them
constexpr int64_t AHEAD = 1 << 14;  // of one tile: bytes from what is read to what is on its way from memory, or more

constexpr int64_t SIZES[] = {4, 2, 2, 1};  // of numbers, by `dtype`: 0 float, 1 bfloat16, 2 float16, 3 int8

// As decode_weights.py fills it in.
struct Matrix {
    const void* data;  // (rows, columns), without gaps
    const float* scales;  // (rows), by which int8 are to be multiplied, or null
    int64_t dtype, rows, columns;

    // Without the first rows.
    Matrix from(int64_t row) const {
        const void* rest = static_cast<const char*>(data) + row * columns * SIZES[dtype];
        return {rest, scales ? scales + row : nullptr, dtype, rows - row, columns};
    }
};

// -- vectors ----------------------------------------------------------------------------------------------------------

typedef Vector<float, 4> Quarter;

// What one thread does of many columns or rows: whole vectors, so that no two threads write side by side.
struct Range {
    int64_t begin, end;
};

// body(i, lanes) for the vectors of a range; `lanes` is known when compiling, but for the fewer at the end.
template <class Body> ALWAYS_INLINE void each_vector(Range range, const Body& body) {
    int64_t i = range.begin;
    for (; i + LANES <= range.end; i += LANES) body(i, std::integral_constant<int, LANES>{});
    if (i < range.end) body(i, int(range.end - i));
}

// (B, columns) floats. A row begins with a vector, and there are zeros after its end, to a multiple of four vectors.
class Rows {
    struct alignas(VECTOR_BYTES) Piece {
        float lane[LANES];
    };
    std::vector<Piece> pieces;

    static int64_t pieces_of(int64_t columns) { return (columns + 4 * LANES - 1) / (4 * LANES) * 4; }

  public:
    const int64_t columns, stride;

    Rows(int64_t rows, int64_t columns)
        : pieces(rows * pieces_of(columns)), columns(columns), stride(pieces_of(columns) * LANES) {}
    ALWAYS_INLINE float* at(int64_t row, int64_t i) { return pieces[0].lane + row * stride + i; }
    ALWAYS_INLINE const float* at(int64_t row, int64_t i) const { return pieces[0].lane + row * stride + i; }
    ALWAYS_INLINE Floats get(int64_t row, int64_t i) const { return load(at(row, i), LANES); }
    ALWAYS_INLINE void set(int64_t row, int64_t i, Floats x) { store(at(row, i), x, LANES); }
};

// Its sum, in four parts.
template <int N> ALWAYS_INLINE Quarter fold(const Vector<float, N>& x) {
    if constexpr (N == 4) {
        return x;
    } else {
        struct Halves {
            Vector<float, N / 2> low, high;
        } const half = bitcast<Halves>(x);
        return fold<N / 2>(half.low + half.high);
    }
}

ALWAYS_INLINE float sum(Floats x) {
    const Quarter part = fold<LANES>(x);
    return (part[0] + part[2]) + (part[1] + part[3]);
}

// The sums of four vectors.
ALWAYS_INLINE Quarter sums(const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
#if defined(__AVX512F__)
    const auto merge = [](const Floats& x, const Floats& y) ALWAYS_INLINED {  // of every four lanes: x, y, x, y
        const __m512 low = _mm512_unpacklo_ps(bitcast<__m512>(x), bitcast<__m512>(y));
        return bitcast<__m512d>(low + _mm512_unpackhi_ps(bitcast<__m512>(x), bitcast<__m512>(y)));
    };
    const __m512d ab = merge(a, b), cd = merge(c, d);
    const Floats first = bitcast<Floats>(_mm512_unpacklo_pd(ab, cd));
    return fold<LANES>(first + bitcast<Floats>(_mm512_unpackhi_pd(ab, cd)));
#else
    const Quarter x[] = {fold<LANES>(a), fold<LANES>(b), fold<LANES>(c), fold<LANES>(d)};
    const auto lane = [&](int i) ALWAYS_INLINED { return Quarter{x[0][i], x[1][i], x[2][i], x[3][i]}; };
    return (lane(0) + lane(2)) + (lane(1) + lane(3));
#endif
}

// -- products ---------------------------------------------------------------------------------------------------------

struct Int8 {
    int8_t bits;
};

// A vector of weights is read as words of 32 bits, PARTS weights in each: part p are every PARTS-th weight, from weight p
// on. To take them apart by shifts is faster than to move weights from lane to lane; what they meet is moved instead, by
// `arrange`. Compilers turn conversions of vectors of bytes into code for one byte at a time.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first weight lies in the lowest bits of a word");
typedef Vector<int32_t, LANES> Integers;

template <class E> constexpr int PARTS = sizeof(float) / sizeof(E);
ALWAYS_INLINE Floats part(Words x, int, float) { return bitcast<Floats>(x); }
ALWAYS_INLINE Floats part(Words x, int p, BFloat16) { return bitcast<Floats>(p == 0 ? x << 16 : x & 0xffff0000); }
ALWAYS_INLINE Floats part(Words x, int p, Float16) {  // neighbours, for which there are instructions
    struct Parts {
        Halves of[2];
    };
    return widen(bitcast<Parts>(x).of[p], Float16{});
}
ALWAYS_INLINE Floats part(Words x, int p, Int8) {  // times 2^24, for which one instruction is enough
    return __builtin_convertvector(bitcast<Integers>(x << (24 - 8 * p) & 0xff000000), Floats);
}
template <class E> constexpr float UNIT = std::is_same_v<E, Int8> ? 1.0f / (1 << 24) : 1;

// What meets the same part of a vector of words is a vector. Moves columns within rows.
template <int PARTS> void arrange(int64_t rows, const Rows& in, Rows& out) {
    constexpr int GROUP = PARTS * LANES;
    for (int64_t b = 0; b < rows; ++b) {
        for (int64_t i = 0; i < in.columns; i += GROUP) {
            float group[GROUP];
            for (int lane = 0; lane < LANES; ++lane) {
                for (int p = 0; p < PARTS; ++p) group[p * LANES + lane] = in.at(b, i)[lane * PARTS + p];
            }
            std::memcpy(out.at(b, i), group, sizeof group);
        }
    }
}

// Rows of a matrix, some of their columns, times rows of a batch, from `batch` on. Meanwhile as many rows of the matrix
// from `next` on come closer: one tile of `tiles` fetches its share.
struct Tiles {
    const Matrix& matrix;
    Range rows, columns;
    int64_t batch, next, tile, tiles;
};

// body(0) to body(N - 1), each number known when compiling: only so do all compilers keep arrays in registers.
template <int N, class Body> ALWAYS_INLINE void unrolled(const Body& body) {
    if constexpr (N > 0) {
        unrolled<N - 1>(body);
        body(std::integral_constant<int, N - 1>{});
    }
}

// Goes over the weights of N rows of a matrix, from `row` on: body(column, vectors), each with as many columns as a vector
// of E holds. There are zeros after the end of a row.
template <class E, int N, class Body> ALWAYS_INLINE void each_group(const Tiles& it, int64_t row, const Body& body) {
    constexpr int64_t GROUP = VECTOR_BYTES / sizeof(E);
    const int64_t stride = it.matrix.columns, begin = it.columns.begin, end = it.columns.end;
    const E* const from = static_cast<const E*>(it.matrix.data) + row * stride;
    const E *const below = from + N * stride, *const next = from + (it.next - it.rows.begin) * stride;
    const int64_t tile = it.tile, tiles = it.tiles;
    const auto read = [&](int64_t i, auto bytes) ALWAYS_INLINED {
        Words words[N]{};
        unrolled<N>([&](auto n) ALWAYS_INLINED { std::memcpy(&words[n], from + n * stride + i, bytes); });
        if (tiles == 1) {
            unrolled<N>([&](auto n) ALWAYS_INLINED { __builtin_prefetch(next + n * stride + i, 0, 2); });
        } else {
            if (tile < N) __builtin_prefetch(next + tile * stride + i, 0, 2);
            if constexpr (sizeof(E) < sizeof(float)) {  // floats would drive others out of the first cache
                unrolled<N>([&](auto n) ALWAYS_INLINED { __builtin_prefetch(below + n * stride + i, 0, 3); });
            }
        }
        body(i, words);
    };
    int64_t i = begin;
    for (; i + GROUP <= end; i += GROUP) read(i, std::integral_constant<int, VECTOR_BYTES>{});
    if (i < end) read(i, int(end - i) * int(sizeof(E)));
}

// Leaves in `out` what N rows of a matrix, from `row` on, times row b of the batch are: so many units for each lane.
template <int N> ALWAYS_INLINE void put(const Tiles& it, int64_t row, int64_t b, const Floats* totals, float unit, Rows& out) {
    float total[4];
    if constexpr (N == 4) {
        const Quarter all = sums(totals[0], totals[1], totals[2], totals[3]);
        std::memcpy(total, &all, sizeof total);
    } else {
        for (int n = 0; n < N; ++n) total[n] = sum(totals[n]);
    }
    float* const to = out.at(it.batch + b, row);
    for (int n = 0; n < N; ++n) {
        const float exact = unit * total[n], x = it.matrix.scales ? it.matrix.scales[row + n] * exact : exact;
        to[n] = it.columns.begin == 0 ? x : to[n] + x;
    }
}

// A way to multiply: by floats, to which weights of type E are converted. `Rows` of a batch are arranged as E asks for.
template <class E> struct ByFloats {
    typedef E Weight;
    typedef Rows Input;
    static constexpr int WIDE = decode::WIDE;
    static constexpr int64_t DEEP = 1024;  // columns, a multiple of any vector's: in the first cache, a tile's of a batch
    static constexpr bool HAS_ROOM = WIDE > 2 || PARTS<E> == 1;  // among 16 registers, words that have parts left take it

    // N rows of a matrix, from `row` on, times B rows of `in`.
    template <int B, int N> static ALWAYS_INLINE void band(const Tiles& it, int64_t row, const Rows& in, Rows& out) {
        const int64_t in_stride = in.stride;
        const float* const batch = in.at(it.batch, 0);
        Floats totals[B][N]{};
        each_group<E, N>(it, row, [&](int64_t i, const Words* words) ALWAYS_INLINED {
            unrolled<PARTS<E>>([&](auto p) ALWAYS_INLINED {
                Floats weights[N];
                unrolled<N>([&](auto n) ALWAYS_INLINED { weights[n] = part(words[n], p, E{}); });
                unrolled<B>([&](auto b) ALWAYS_INLINED {
                    Floats x = load(batch + b * in_stride + i + p * LANES, LANES);
                    if constexpr (HAS_ROOM) x = in_register(x);
                    unrolled<N>([&](auto n) ALWAYS_INLINED {
                        totals[b][n] = multiply_add(weights[n], x, totals[b][n]);
                    });
                });
            });
        });
        unrolled<B>([&](auto b) ALWAYS_INLINED { put<N>(it, row, b, totals[b], UNIT<E>, out); });
    }
};

template <class Way, int B>
void multiply_tile(const Tiles& it, const typename Way::Input& in, Rows& out) {
    int64_t row = it.rows.begin;
    for (; row + TALL <= it.rows.end; row += TALL) Way::template band<B, TALL>(it, row, in, out);
    for (; row < it.rows.end; ++row) Way::template band<B, 1>(it, row, in, out);
}

template <class Way, int... B> constexpr auto tiles_of(std::integer_sequence<int, B...>) {
    using Multiply = void (*)(const Tiles&, const typename Way::Input&, Rows&);
    return std::array<Multiply, sizeof...(B)>{multiply_tile<Way, B + 1>...};
}

// Rows `range` of a matrix times `batch` rows of `in` to the same columns of `out`. In a batch of many tiles, each part
// of the matrix meets all of them before the next part is read.
template <class Way>
void product(const Matrix& matrix, int64_t batch, Range range, const typename Way::Input& in, Rows& out) {
    static constexpr auto multiply = tiles_of<Way>(std::make_integer_sequence<int, Way::WIDE>{});
    const int64_t tiles = (batch + Way::WIDE - 1) / Way::WIDE, deep = std::min(Way::DEEP, matrix.columns);
    const int64_t band_bytes = TALL * deep * sizeof(typename Way::Weight);
    const int64_t together = ((tiles == 1 ? AHEAD : CACHED) / band_bytes + 1) * TALL;
    for (int64_t row = range.begin; row < range.end; row += together) {
        const Range rows{row, std::min(range.end, row + together)};
        const int64_t next = tiles == 1 || rows.end < range.end ? rows.end : row;  // past it may be the next matrix
        for (int64_t i = 0; i < matrix.columns; i += deep) {
            const Range columns{i, std::min(matrix.columns, i + deep)};
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = batch * tile / tiles, end = batch * (tile + 1) / tiles;
                multiply[end - first - 1]({matrix, rows, columns, first, next, tile, tiles}, in, out);
            }
        }
    }
}

}  // namespace decode
