// What a thread of a CUDA kernel computes in, reads and writes, and tells other blocks: all that is written in PTX. Whoever
// includes this defines ELEMENT (0 float, 1 bfloat16, 2 float16) and CHANNELS of a thread (1, or 2 of two bytes).

#pragma once

#define WKV_INLINE __device__ __forceinline__

namespace wkv4 {

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
WKV_INLINE bool all_of(bool x) { return x; }

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
WKV_INLINE Both operator<(Real a, float b) { return {a.x < b, a.y < b}; }
WKV_INLINE Both operator>(Real a, float b) { return {a.x > b, a.y > b}; }
WKV_INLINE Both operator==(Real a, float b) { return {a.x == b, a.y == b}; }
WKV_INLINE bool all_of(Both a) { return a.x && a.y; }
WKV_INLINE Real precise_exp(Real a) { return {precise_exp(a.x), precise_exp(a.y)}; }
WKV_INLINE Real exp_(Real a) { return {exp_(a.x), exp_(a.y)}; }
WKV_INLINE Real abs_(Real a) { return {abs_(a.x), abs_(a.y)}; }
WKV_INLINE Real max_(Real a, Real b) { return {max_(a.x, b.x), max_(a.y, b.y)}; }
WKV_INLINE Real min_(Real a, Real b) { return {min_(a.x, b.x), min_(a.y, b.y)}; }
WKV_INLINE Real reciprocal_(Real a) { return {reciprocal_(a.x), reciprocal_(a.y)}; }
WKV_INLINE Real select_(Both c, Real a, Real b) { return {select_(c.x, a.x, b.x), select_(c.y, a.y, b.y)}; }
WKV_INLINE Real select_(bool c, Real a, Real b) { return {select_(c, a.x, b.x), select_(c, a.y, b.y)}; }
#endif

// -- elements: Packed is what a thread reads and writes at once -------------------------------------------------------

#if ELEMENT == 0
typedef float Element;
typedef float Packed;
WKV_INLINE float widen(Packed x) { return x; }
WKV_INLINE Packed narrow(float x) { return x; }
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
#if ELEMENT == 1
WKV_INLINE Packed narrow(Real x) {
    Packed y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(x.y), "f"(x.x));
    return y;
}
#else
WKV_INLINE Packed narrow(Real x) { return narrow(x.x) | Packed(narrow(x.y)) << 16; }
#endif
#endif
#endif

// Of each channel; NaN if one is.
#if ELEMENT == 1
#define WKV_TYPE "bf16"
#else
#define WKV_TYPE "f16"
#endif
WKV_INLINE Packed larger(Packed x, Packed y) {
    Packed z;
#if ELEMENT == 0
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
#elif CHANNELS == 1
    asm("max.NaN." WKV_TYPE " %0, %1, %2;" : "=h"(z) : "h"(x), "h"(y));
#else
    asm("max.NaN." WKV_TYPE "x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
#endif
    return z;
}
WKV_INLINE Packed smaller(Packed x, Packed y) {
    Packed z;
#if ELEMENT == 0
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
#elif CHANNELS == 1
    asm("min.NaN." WKV_TYPE " %0, %1, %2;" : "=h"(z) : "h"(x), "h"(y));
#else
    asm("min.NaN." WKV_TYPE "x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
#endif
    return z;
}

// What was computed from x before is computed anew after this, instead of taking registers in between.
WKV_INLINE void forget(Packed& x) {
#if ELEMENT == 0
    asm volatile("" : "+f"(x));
#elif CHANNELS == 2
    asm volatile("" : "+r"(x));
#else
    asm volatile("" : "+h"(x));
#endif
}

// Token i after `from`, `stride` elements apart. One instruction, where the compiler would take three.
template <class T> WKV_INLINE T* after(T* from, int i, int stride) {
    T* to;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(i), "r"(stride * int(sizeof(Element))), "l"(from));
    return to;
}

// Brings what is there nearer, for whoever reads it later.
WKV_INLINE void prefetch(const Element* x) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(x));
}

// What blocks of threads tell each other. Until a number is there, its place holds NOTHING, which is a NaN that no
// arithmetic of a GPU results in.
constexpr int NOTHING = -1;
#if CHANNELS == 1
WKV_INLINE void tell(float* to, Real x) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}
WKV_INLINE Real hear(const float* from) {
    float x;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
}
WKV_INLINE bool is_there(Real x) { return __float_as_int(x) != NOTHING; }
#else
WKV_INLINE void tell(float* to, Real x) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x.x), "f"(x.y) : "memory");
}
WKV_INLINE Real hear(const float* from) {
    Real x;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
    return x;
}
WKV_INLINE bool is_there(Real x) { return __float_as_int(x.x) != NOTHING && __float_as_int(x.y) != NOTHING; }
#endif

}  // namespace wkv4
