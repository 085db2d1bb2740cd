// The arithmetic of WKV-4, one token or one run of tokens at a time: the CPU and the CUDA kernels run these formulas.
//
// R is what one instruction works on: a float on a GPU, a vector of floats or doubles, one per channel, on a CPU.
// A state (a, b, p) stands for A = a e^p and B = b e^p (Peng et al. 2023, arXiv:2305.13048, equations 16-18 and
// appendix D). Before including this, a kernel defines WKV_INLINE, the constants EMPTY_EXPONENT, BONUS_LIMIT and LN2,
// and for its R: exp_, abs_, max_, min_ (which keep NaN), select_(condition, x, y), reciprocal_ and exponent_ (the whole part
// of log2 |x|). The unit of exponents need not be that of e, as long as exp_ and the constants agree.

#pragma once

namespace wkv4 {

template <class R> struct State {
    R a, b, p;
};

// What a token does, relative to the exponent of the state before it (bonus) or after it (past, now):
//     output = (a + bonus v) / (b + bonus),   a' = past a + now v,   b' = past b + now.
template <class R> struct Weights {
    R past, now, bonus;
};

// The gradient of the loss in the a and b of a state. Scaled as these are, it needs no exponent of its own: each factor
// of the recurrences below is at most 1.
template <class R> struct Adjoint {
    R a, b;
};

// One token's share of the gradients; `first` of the bonus u, `decay` of w.
template <class R> struct Gradient {
    R key, value, first, decay;
};

template <class R> WKV_INLINE State<R> empty() { return {R{}, R{}, R{} + EMPTY_EXPONENT}; }

// A state as somebody else wrote it. Without a denominator there is no history, whatever p says. One far from 1 would
// meet BONUS_LIMIT: `scale`, elsewhere 1 (and 0 without a history), is what a and b were multiplied by.
template <class R> WKV_INLINE State<R> adopt(State<R> state, R& scale) {
    const R zero = R{}, none = zero + EMPTY_EXPONENT, size = exponent_(state.b);
    const R far = select_(abs_(size) > 30, min_(max_(size, zero - 100), zero + 100) * LN2, zero);
    scale = select_(state.b == 0, zero, exp_(-far));
    return {state.a * scale, state.b * scale, select_(state.b == 0, none, state.p + far)};
}

// The weights of two terms with exponents p and k, of which the larger is 1; p becomes the larger exponent.
template <class R> WKV_INLINE Weights<R> balance(R& p, R k) {
    const R one = R{} + 1, gap = k - p, smaller = exp_(-abs_(gap));
    p = max_(p, k);
    return {select_(gap > 0, smaller, one), select_(gap > 0, one, smaller), R{}};
}

// The weights of a token with key k; p moves from before it to after it. Beyond BONUS_LIMIT the past no longer shows.
template <class R> WKV_INLINE Weights<R> weigh(R w, R u, R k, R& p) {
    const R bonus = exp_(min_(u + k - p, R{} + BONUS_LIMIT));
    p = p + w;
    Weights<R> weights = balance(p, k);
    weights.bonus = bonus;
    return weights;
}

template <class R> WKV_INLINE R output(const State<R>& before, R bonus, R v) {
    return (before.a + bonus * v) * reciprocal_(before.b + bonus);
}

template <class R> WKV_INLINE void absorb(State<R>& state, const Weights<R>& weights, R v) {
    state.a = weights.past * state.a + weights.now * v;
    state.b = weights.past * state.b + weights.now;
}

// The state after a run of tokens that began at `before`: `run` is what the run adds up to from an empty start,
// `decay` is its number of steps times w.
template <class R> WKV_INLINE State<R> join(State<R> before, R decay, const State<R>& run) {
    before.p = before.p + decay;
    const Weights<R> weights = balance(before.p, run.p);
    return {weights.past * before.a + weights.now * run.a, weights.past * before.b + weights.now * run.b, before.p};
}

// What the first `count` of up to STEPS tokens add up to, from an empty start: weighed against the heaviest, so that no
// step waits for the one before it. key(i) and value(i) are token i's.
template <int STEPS, class R, class Key, class Value>
WKV_INLINE State<R> add_up(R w, int count, const Key& key, const Value& value) {
    const R none = R{} + EMPTY_EXPONENT;
    R exponent[STEPS], p = none;
    for (int i = 0; i < STEPS; ++i) {
        exponent[i] = i < count ? key(i) + w * float(count - 1 - i) : none;
        p = max_(p, exponent[i]);
    }
    State<R> run{R{}, R{}, p};
    for (int i = 0; i < STEPS; ++i) {
        const R weight = exp_(exponent[i] - p);
        run.a = run.a + weight * value(i);
        run.b = run.b + weight;
    }
    return run;
}

// The adjoint before a run that ends with adjoint `after`: `run` is that of a run which ends with none, `past` the
// product of its weights of the past.
template <class R> WKV_INLINE Adjoint<R> join(const Adjoint<R>& run, R past, const Adjoint<R>& after) {
    return {run.a + past * after.a, run.b + past * after.b};
}

// The adjoint moves from after a token to before it: only what the output's gradient gy and the past contribute.
template <class R>
WKV_INLINE void retreat(const State<R>& before, const Weights<R>& weights, R v, R gy, Adjoint<R>& adjoint) {
    const R over = reciprocal_(before.b + weights.bonus), g = gy * over;
    const R y = (before.a + weights.bonus * v) * over;
    adjoint.a = weights.past * adjoint.a + g;
    adjoint.b = weights.past * adjoint.b - g * y;
}

// The token's gradients from the adjoint after it.
template <class R>
WKV_INLINE Gradient<R> differentiate(const State<R>& before, const Weights<R>& weights, R v, R gy,
                                     const Adjoint<R>& after) {
    const R over = reciprocal_(before.b + weights.bonus), bonus = weights.bonus * (gy * over);
    const R first = bonus * ((before.b * v - before.a) * over);  // v - y, without the cancellation
    return {first + weights.now * (v * after.a + after.b), bonus + weights.now * after.a, first,
            weights.past * (before.a * after.a + before.b * after.b)};
}

}  // namespace wkv4
