// Vectors on a CPU, shared by the kernels in this folder: plain C++17 with the vector extensions of GCC and Clang,
// which become AVX-512, AVX, SSE or NEON instructions, whatever the target has.
//
// Symbols: E the type of an element in memory, R the type that is computed in.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace cpu {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// -- vectors ----------------------------------------------------------------------------------------------------------

template <class T, int N> struct VectorOf { typedef T type __attribute__((vector_size(N * sizeof(T)))); };
template <class T, int N> using Vector = typename VectorOf<T, N>::type;

template <class R> struct Real;
template <> struct Real<float> {
    typedef int32_t Bits;
    static constexpr int fraction = 23, bias = 127, degree = 7;
    static constexpr float lowest = -80;  // e^-80 times a number near 1 is still a normal number, and fast
};
template <> struct Real<double> {
    typedef int64_t Bits;
    static constexpr int fraction = 52, bias = 1023, degree = 13;
    static constexpr double lowest = -700;
};

template <class R> constexpr int LANES = VECTOR_BYTES / sizeof(R);
template <class R> using V = Vector<R, LANES<R>>;
template <class R> using Bits = Vector<typename Real<R>::Bits, LANES<R>>;
typedef V<float> Floats;
typedef V<double> Doubles;

template <class To, class From> ALWAYS_INLINE To bitcast(const From& x) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

template <class R> struct Powers {  // the Taylor series of 2^f: (ln 2)^i / i!
    R term[Real<R>::degree + 1];
    constexpr Powers() : term{} {
        double x = 1;
        for (int i = 0; i <= Real<R>::degree; ++i, x *= 0.69314718055994530942 / i) term[i] = R(x);
    }
};

// e^x for x up to 88: 2^n 2^f with n whole and |f| <= 1/2. In float the relative error is at most 1.3e-7. Below
// `lowest` x counts as `lowest`; NaN gives NaN.
template <class R> ALWAYS_INLINE V<R> exponential(V<R> x) {
    constexpr Powers<R> powers;
    constexpr long double exact = 1.44269504088896340735992468100189214L;
    constexpr R log2e = R(exact), rest = R(exact - log2e), round = R(3) * (int64_t(1) << (Real<R>::fraction - 1));
    const V<R> low = V<R>{} + Real<R>::lowest;
    x = low > x ? low : x;
    const V<R> whole = x * log2e + round;  // its last bits are n
    const V<R> f = (x * log2e - (whole - round)) + x * rest;
    V<R> y = V<R>{} + powers.term[Real<R>::degree];
    for (int i = Real<R>::degree - 1; i >= 0; --i) y = y * f + powers.term[i];
    typedef typename Real<R>::Bits B;
    return y * bitcast<V<R>>((bitcast<Bits<R>>(whole) << Real<R>::fraction) + (B(Real<R>::bias) << Real<R>::fraction));
}

// x * y + sum, rounded once where there is an instruction for it. (Left to choose, GCC 13 takes it in some loops and in
// others two instructions, with other bits.)
ALWAYS_INLINE Floats multiply_add(Floats x, Floats y, Floats sum) {
#if defined(__AVX512F__)
    return bitcast<Floats>(_mm512_fmadd_ps(bitcast<__m512>(x), bitcast<__m512>(y), bitcast<__m512>(sum)));
#elif defined(__AVX__) && defined(__FMA__)
    return bitcast<Floats>(_mm256_fmadd_ps(bitcast<__m256>(x), bitcast<__m256>(y), bitcast<__m256>(sum)));
#else
    return x * y + sum;
#endif
}

// x, read once for all that it meets. Where a product may take an operand from memory, compilers would rather read it anew
// for each, which is one instruction less and slower: a core loads no more vectors than it multiplies.
ALWAYS_INLINE Floats in_register(Floats x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#endif
    return x;
}

// -- elements ---------------------------------------------------------------------------------------------------------

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
typedef Vector<uint16_t, LANES<float>> Halves;
typedef Vector<uint32_t, LANES<float>> Words;

ALWAYS_INLINE Floats widen(Halves x, BFloat16) { return bitcast<Floats>(__builtin_convertvector(x, Words) << 16); }

// To the nearest, ties to even; NaN stays NaN.
ALWAYS_INLINE Halves narrow(Floats x, BFloat16) {
    const Words bits = bitcast<Words>(x), rounded = bits + 0x7fff + (bits >> 16 & 1), nan = bits | 0x400000;
    return __builtin_convertvector(((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded) >> 16, Halves);
}

#if defined(__AVX512F__)  // no compiler finds these instructions by itself
ALWAYS_INLINE Floats widen(Halves x, Float16) { return bitcast<Floats>(_mm512_maskz_cvtph_ps(-1, bitcast<__m256i>(x))); }
#elif defined(__AVX__) && defined(__F16C__)
ALWAYS_INLINE Floats widen(Halves x, Float16) { return bitcast<Floats>(_mm256_cvtph_ps(bitcast<__m128i>(x))); }
#else
// What is subnormal in float16 comes from a sum of normal numbers, since a CPU may be told to flush subnormal ones.
ALWAYS_INLINE Floats widen(Halves x, Float16) {
    const Words word = __builtin_convertvector(x, Words), size = (word & 0x7fff) << 13, least = Words{} + (113u << 23);
    const Words normal = size + (112u << 23), special = size | 0x7f800000u;
    const Words subnormal = bitcast<Words>(bitcast<Floats>(size + least) - bitcast<Floats>(least));
    const Words value = size >= (31u << 23) ? special : size < (1u << 23) ? subnormal : normal;
    return bitcast<Floats>(value | (word & 0x8000) << 16);
}
#endif

ALWAYS_INLINE Halves narrow(Floats x, Float16) {
    const Words bits = bitcast<Words>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    const Words half = Words{} + (126u << 23);  // 0.5, whose last place is the smallest float16
    const Words normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    const Words subnormal = bitcast<Words>(bitcast<Floats>(size) + bitcast<Floats>(half)) - half;
    const Words infinity = Words{} + 0x7c00, nan = Words{} + 0x7e00;
    const Words finite = size < (113u << 23) ? subnormal : normal;
    return __builtin_convertvector((size > 0x7f800000 ? nan : size >= 0x477ff000 ? infinity : finite) | sign, Halves);
}

// How an element lies in memory (Lanes: a vector of them) and what it is computed in (Real).
template <class E> struct Element {
    typedef E Real;
    typedef V<E> Lanes;
    static ALWAYS_INLINE Lanes widened(Lanes x) { return x; }
    static ALWAYS_INLINE Lanes narrowed(Lanes x) { return x; }
};
template <class E> struct Half {
    typedef float Real;
    typedef Halves Lanes;
    static ALWAYS_INLINE Floats widened(Lanes x) { return widen(x, E{}); }
    static ALWAYS_INLINE Lanes narrowed(Floats x) { return narrow(x, E{}); }
};
template <> struct Element<BFloat16> : Half<BFloat16> {};
template <> struct Element<Float16> : Half<Float16> {};
template <class E> using RealOf = typename Element<E>::Real;

// `lanes` channels of a token: as many as a vector holds, known when compiling, or the fewer at the end of a row.
template <class E> ALWAYS_INLINE V<RealOf<E>> load(const E* from, int lanes) {
    typename Element<E>::Lanes x{};
    std::memcpy(&x, from, lanes * sizeof(E));
    return Element<E>::widened(x);
}

template <class E> ALWAYS_INLINE void store(E* to, V<RealOf<E>> y, int lanes) {
    const typename Element<E>::Lanes x = Element<E>::narrowed(y);
    std::memcpy(to, &x, lanes * sizeof(E));
}

}  // namespace cpu
