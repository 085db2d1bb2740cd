// The steps of wkv4_step.h on vectors of channels, shared by the CPU kernels in this folder.

#pragma once

#include "cpu_vectors.h"

#define WKV_INLINE ALWAYS_INLINE

namespace wkv4 {

using namespace cpu;

constexpr float EMPTY_EXPONENT = -1e38f;

WKV_INLINE Floats exp_(Floats x) { return exponential<float>(x); }
WKV_INLINE Doubles exp_(Doubles x) { return exponential<double>(x); }
template <class Condition, class X> WKV_INLINE X select_(Condition condition, X x, X y) { return condition ? x : y; }
template <class X> WKV_INLINE X max_(X x, X y) { return ((x > y) | (x != x)) ? x : y; }
template <class X> WKV_INLINE X abs_(X x) { return x > 0 ? x : -x; }
template <class X> WKV_INLINE X reciprocal_(X x) { return 1 / x; }

}  // namespace wkv4

#include "wkv4_step.h"
