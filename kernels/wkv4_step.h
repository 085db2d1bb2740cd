// The arithmetic of WKV-4, one token or one run of tokens at a time: the CPU and the CUDA kernels run these formulas.
//
// R is what one instruction works on: a float on a GPU, a vector of floats or doubles, one per channel, on a CPU.
// A state (a, b, p) stands for A = a e^p and B = b e^p (Peng et al. 2023, arXiv:2305.13048, equations 16-18 and
// appendix D). Before including this, a kernel defines WKV_INLINE, the constant EMPTY_EXPONENT, and for its R: exp_,
// abs_, max_ (which keeps NaN), select_(condition, x, y) and reciprocal_. The unit of exponents need not be that of e, as
// long as exp_ agrees.

#pragma once

namespace wkv4 {

template <class R> struct State {
    R a, b, p;
};

// The weights of the past and of a token in the state after it and in its output:
//     a' = past a + now v,   b' = past b + now,   output = (old a + bonus v) / (old b + bonus).
// The larger of past and now is 1; old and bonus matter by their ratio.
template <class R> struct Weights {
    R past, now, old, bonus;
};

// The gradient of the loss in the a and b of a state. Scaled as these are, it needs no exponent of its own: each factor
// of the recurrences below is at most 1.
template <class R> struct Adjoint {
    R a, b;
};

// One token's share of the gradients; `first` of the bonus u, `decay`, times the weight of the past, of w.
template <class R> struct Gradient {
    R key, value, first, decay;
};

template <class R> WKV_INLINE State<R> empty() { return {R{}, R{}, R{} + EMPTY_EXPONENT}; }

// A state as somebody else wrote it: without a denominator there is no history, whatever p says.
template <class R> WKV_INLINE State<R> adopt(const State<R>& state) {
    const R zero = R{}, none = zero + EMPTY_EXPONENT;
    return {select_(state.b == 0, zero, state.a), state.b, select_(state.b == 0, none, state.p)};
}

// The weights of two terms with exponents p and k, of which the larger is 1; p becomes the larger exponent.
template <class R> WKV_INLINE void balance(R& p, R k, R& of_p, R& of_k) {
    const R one = R{} + 1, gap = k - p, smaller = exp_(-abs_(gap));
    p = max_(p, k);
    of_p = select_(gap > 0, smaller, one);
    of_k = select_(gap > 0, one, smaller);
}

// The weights of a token with key k; p moves from before it to after it.
template <class R> WKV_INLINE Weights<R> weigh(R w, R u, R k, R& p) {
    Weights<R> weights;
    R scale = p;
    balance(scale, u + k, weights.old, weights.bonus);
    p = p + w;
    balance(p, k, weights.past, weights.now);
    return weights;
}

// The same at the cost of one exponential, given lead = e^(u + w), by which a token counts more in its output than in the
// state after it. For FAR < u + w < MOST: then a past that rounds to nothing is less than e^-47 of the output, and no value
// is too large for float32 that is less than 1e36.
constexpr float FAR = -40, MOST = 4;
template <class R> WKV_INLINE Weights<R> weigh_near(R w, R lead, R k, R& p) {
    Weights<R> weights;
    p = p + w;
    balance(p, k, weights.past, weights.now);
    weights.old = weights.past, weights.bonus = weights.now * lead;
    return weights;
}

// The same where the exponent stays at `level`, given decay = e^w and lead = e^u. For keys that are at most 2 RANGE below
// it and none above, and LEAST < u < MOST: then no denominator is less than e^-64, and a past that rounds to nothing is
// nothing beside it.
constexpr float RANGE = 22, LEAST = -20;
template <class R> WKV_INLINE Weights<R> weigh_level(R decay, R lead, R k, R level) {
    const R now = exp_(k - level);
    return {decay, now, R{} + 1, now * lead};
}

template <class R> WKV_INLINE R output(const State<R>& before, const Weights<R>& weights, R v) {
    return (weights.old * before.a + weights.bonus * v) * reciprocal_(weights.old * before.b + weights.bonus);
}

// The same from `weigh_level`, with a product less.
template <class R> WKV_INLINE R output_level(const State<R>& before, R now, R lead, R v) {
    return (before.a + lead * (now * v)) * reciprocal_(before.b + lead * now);
}

template <class R> WKV_INLINE void absorb(State<R>& state, const Weights<R>& weights, R v) {
    state.a = weights.past * state.a + weights.now * v;
    state.b = weights.past * state.b + weights.now;
}

// The state after a run of tokens that began at `before`: `run` is what the run adds up to from an empty start,
// `decay` is its number of steps times w.
template <class R> WKV_INLINE State<R> join(const State<R>& before, R decay, const State<R>& run) {
    R past, now, p = before.p + decay;
    balance(p, run.p, past, now);
    return {past * before.a + now * run.a, past * before.b + now * run.b, p};
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
    const R over = reciprocal_(weights.old * before.b + weights.bonus), g = weights.old * (gy * over);
    const R y = (weights.old * before.a + weights.bonus * v) * over;
    adjoint.a = weights.past * adjoint.a + g;
    adjoint.b = weights.past * adjoint.b - g * y;
}

// The token's gradients from the adjoint after it.
template <class R>
WKV_INLINE Gradient<R> differentiate(const State<R>& before, const Weights<R>& weights, R v, R gy,
                                     const Adjoint<R>& after) {
    const R over = reciprocal_(weights.old * before.b + weights.bonus), bonus = weights.bonus * (gy * over);
    const R first = bonus * (weights.old * (before.b * v - before.a) * over);  // v - y, without the cancellation
    return {first + weights.now * (v * after.a + after.b), bonus + weights.now * after.a, first,
            before.a * after.a + before.b * after.b};
}

}  // namespace wkv4
