// What RWKV-4 does between its matrix products, on a CPU: token shift and mixing, squared ReLU, gates. Each is one pass
// over memory; in half precision it is computed in float and rounded once.
//
// Symbols: N sequences of tokens laid end to end, C channels, E the type of an element, R the type that is computed in.
//
// A token is mixed with nothing but the one before it, and sums over tokens are taken a piece at a time, in order: bits
// depend neither on what else is in the batch nor on the number of threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu_vectors.h"

#define INLINED __attribute__((always_inline))  // after the parameters of a lambda

namespace mixing {

using namespace cpu;

constexpr int MIXES = 3;            // at most
constexpr int PIECE = 64;           // tokens that one thread takes at a time
constexpr int64_t BLOCK = 1 << 12;  // elements, likewise
constexpr int64_t GRAIN = 1 << 15;  // elements that are worth waking a thread for

// As mixing.py fills it in. All tensors lie without gaps. What is not const is written.
struct Arguments {
    int64_t sequences, time, channels, threads;
    const int64_t* bounds;  // (N + 1) of `time` tokens; or null: then every sequence is a row of as many
    const void *x, *previous;  // (tokens, C) E; (N, C) E or null, which stands for zeros
    const void* mix[MIXES];  // (C) E, each
    void* output[MIXES];  // (tokens, C) E, each
    const void* grad_output[MIXES];
    void *grad_x, *grad_previous;  // as x; as previous
    void* grad_mix[MIXES];  // (C) R, each
};

// Elements side by side, as two vectors of real numbers.
template <class E> struct Pair {
    static constexpr int SIZE = 2 * LANES<RealOf<E>>;
    V<RealOf<E>> half[2];
};

// `count` of them: as many as a pair holds, known when compiling, or the fewer at the end.
template <class E> ALWAYS_INLINE Pair<E> load_pair(const E* from, int count) {
    constexpr int LENGTH = LANES<RealOf<E>>;
    return {load(from, std::min(count, LENGTH)), load(from + LENGTH, std::max(count - LENGTH, 0))};
}

template <class E> ALWAYS_INLINE void store_pair(E* to, const Pair<E>& y, int count) {
    constexpr int LENGTH = LANES<RealOf<E>>;
    store(to, y.half[0], std::min(count, LENGTH));
    store(to + LENGTH, y.half[1], std::max(count - LENGTH, 0));
}

// Of two bfloat16 in a word, each is a float when the other is zeros: one half takes the elements at even places, the
// other those at odd ones, which is half the work of widening and narrowing neighbours.
ALWAYS_INLINE Pair<BFloat16> load_pair(const BFloat16* from, int count) {
    Words words{};
    std::memcpy(&words, from, count * sizeof(BFloat16));
    return {bitcast<Floats>(words << 16), bitcast<Floats>(words & 0xffff0000)};
}

ALWAYS_INLINE Words rounded(Floats x) {  // as `narrow` does, into the upper half of each word
    const Words bits = bitcast<Words>(x);
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}

ALWAYS_INLINE void store_pair(BFloat16* to, const Pair<BFloat16>& y, int count) {
    const Words words = rounded(y.half[0]) >> 16 | (rounded(y.half[1]) & 0xffff0000);
    std::memcpy(to, &words, count * sizeof(BFloat16));
}

// body(i, size) for all pairs of `count` elements; `size` is known when compiling, but for the fewer at the end.
template <class E, class Body> ALWAYS_INLINE void each_pair(int64_t count, const Body& body) {
    constexpr int SIZE = Pair<E>::SIZE;
    int64_t i = 0;
    for (; i + SIZE <= count; i += SIZE) body(i, std::integral_constant<int, SIZE>{});
    if (i < count) body(i, int(count - i));
}

// body(i, lanes) for all vectors of `count` elements; `lanes` is known when compiling, but for the fewer at the end.
template <class R, class Body> ALWAYS_INLINE void each_vector(int64_t count, const Body& body) {
    int64_t i = 0;
    for (; i + LANES<R> <= count; i += LANES<R>) body(i, std::integral_constant<int, LANES<R>>{});
    if (i < count) body(i, int(count - i));
}

ALWAYS_INLINE int threads_for(int64_t elements, int64_t threads) {
    return int(std::min(threads, 1 + elements / GRAIN));
}

// -- token shift and mixing -------------------------------------------------------------------------------------------

// Tokens from..to of a sequence, among all tokens; the sequence itself is begin..end.
struct Piece {
    int64_t sequence, from, to, begin, end;
};

bool fits(const Arguments& all) {
    if (!all.bounds) return true;
    if (all.bounds[0] != 0 || all.bounds[all.sequences] != all.time) return false;
    return std::is_sorted(all.bounds, all.bounds + all.sequences + 1);
}

std::vector<Piece> cut(const Arguments& all) {
    std::vector<Piece> pieces;
    for (int64_t n = 0; n < all.sequences; ++n) {
        const int64_t begin = all.bounds ? all.bounds[n] : n * all.time;
        const int64_t end = all.bounds ? all.bounds[n + 1] : begin + all.time;
        for (int64_t t = begin; t < end; t += PIECE) {
            pieces.push_back({n, t, std::min<int64_t>(t + PIECE, end), begin, end});
        }
    }
    return pieces;
}

template <class E> struct Tokens {
    const Arguments& all;
    const std::vector<E> zeros;

    explicit Tokens(const Arguments& all) : all(all), zeros(all.channels) {}

    const E* row(const void* x, int64_t t) const { return static_cast<const E*>(x) + t * all.channels; }
    E* row(void* x, int64_t t) const { return static_cast<E*>(x) + t * all.channels; }
    const E* before(const Piece& piece, int64_t t) const {
        if (t > piece.begin) return row(all.x, t - 1);
        return all.previous ? row(all.previous, piece.sequence) : zeros.data();
    }
    const E* after(const Piece& piece, const void* x, int64_t t) const {
        return t + 1 < piece.end ? row(x, t + 1) : zeros.data();
    }
};

// work(i, pieces[i]) in any order, on several threads.
template <class Work> void each(const Arguments& all, const std::vector<Piece>& pieces, const Work& work) {
    const int64_t tokens = pieces.empty() ? 0 : pieces.back().end;
    const int threads = threads_for(tokens * all.channels, all.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < int64_t(pieces.size()); ++i) work(i, pieces[i]);
}

// From `before` to `now`, by `mix`: starting from the nearer, so that 0 and 1 give the one or the other exactly.
template <class X> ALWAYS_INLINE X interpolate(X now, X before, X mix) {
    const auto near = mix < 0.5f;
    return (near ? before : now) + (near ? mix : mix - 1) * (now - before);
}

template <class E, int N> void forward(const Arguments& all) {
    const Tokens<E> tokens(all);
    const int64_t channels = all.channels;
    const E* mixes[N];
    for (int i = 0; i < N; ++i) mixes[i] = tokens.row(all.mix[i], 0);
    each(all, cut(all), [&](int64_t, const Piece& piece) {
        for (int64_t t = piece.from; t < piece.to; ++t) {
            const E *now = tokens.row(all.x, t), *before = tokens.before(piece, t);
            E* to[N];
            for (int i = 0; i < N; ++i) to[i] = tokens.row(all.output[i], t);
            each_pair<E>(channels, [=](int64_t c, auto size) INLINED {
                const Pair<E> x = load_pair(now + c, size), shifted = load_pair(before + c, size);
                for (int i = 0; i < N; ++i) {
                    Pair<E> y = load_pair(mixes[i] + c, size);
                    for (int h = 0; h < 2; ++h) y.half[h] = interpolate(x.half[h], shifted.half[h], y.half[h]);
                    store_pair(to[i] + c, y, size);
                }
            });
        }
    });
}

template <class E, int N> void backward(const Arguments& all) {
    typedef RealOf<E> R;
    const Tokens<E> tokens(all);
    const std::vector<Piece> pieces = cut(all);
    const int64_t channels = all.channels;
    std::vector<R> sums(pieces.size() * N * channels);  // gradients of the mixes, a piece at a time
    each(all, pieces, [&](int64_t index, const Piece& piece) {
        for (int64_t t = piece.from; t < piece.to; ++t) {
            const E *now = tokens.row(all.x, t), *before = tokens.before(piece, t);
            each_vector<R>(channels, [&](int64_t c, auto lanes) INLINED {
                const V<R> difference = load(now + c, lanes) - load(before + c, lanes);
                V<R> gradient{}, passed{};  // of this token, and of the one before it
                for (int i = 0; i < N; ++i) {
                    const V<R> mix = load(static_cast<const E*>(all.mix[i]) + c, lanes);
                    const V<R> gy = load(tokens.row(all.grad_output[i], t) + c, lanes);
                    gradient += mix * gy + (1 - mix) * load(tokens.after(piece, all.grad_output[i], t) + c, lanes);
                    passed += (1 - mix) * gy;
                    R* sum = &sums[(index * N + i) * channels + c];
                    store(sum, load(sum, lanes) + difference * gy, lanes);
                }
                store(tokens.row(all.grad_x, t) + c, gradient, lanes);
                if (t == piece.begin && all.previous) {
                    store(tokens.row(all.grad_previous, piece.sequence) + c, passed, lanes);
                }
            });
        }
    });
    for (int i = 0; i < N; ++i) {
        R* total = static_cast<R*>(all.grad_mix[i]);
        std::fill(total, total + channels, R(0));
        for (size_t index = 0; index < pieces.size(); ++index) {
            const R* sum = &sums[(index * N + i) * channels];
            for (int64_t c = 0; c < channels; ++c) total[c] += sum[c];
        }
    }
}

template <class E> void run(int mixes, bool backwards, const Arguments& all) {
    void (*const passes[MIXES][2])(const Arguments&) = {
        {forward<E, 1>, backward<E, 1>}, {forward<E, 2>, backward<E, 2>}, {forward<E, 3>, backward<E, 3>}};
    passes[mixes - 1][backwards](all);
}

// -- one element at a time --------------------------------------------------------------------------------------------

// The arguments of these kernels: `count` elements of a and b, and of their gradients from that of the output y.
struct Elements {
    int64_t count, threads;
    double scale;
    const void *a, *b;
    void* y;
    const void* grad_y;
    void *grad_a, *grad_b;
};

// work(i, size) for all pairs of elements, on several threads.
template <class E, class Work> void each_element(const Elements& all, const Work& work) {
    const int64_t count = all.count;
    const int threads = threads_for(count, all.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t from = 0; from < count; from += BLOCK) {
        each_pair<E>(std::min(BLOCK, count - from), [&](int64_t i, auto size) INLINED { work(from + i, size); });
    }
}

template <class X> ALWAYS_INLINE X positive(X x) { return x < 0 ? X{} : x; }  // NaN stays

template <class R> ALWAYS_INLINE V<R> sigmoid(V<R> x) {
    const V<R> size = -x, most = V<R>{} - Real<R>::lowest;
    return 1 / (1 + exponential<R>(size > most ? most : size));
}

// y = scale relu(a)^2
template <class E> void squared_relu(const Elements& all) {
    const E* a = static_cast<const E*>(all.a);
    E* y = static_cast<E*>(all.y);
    const RealOf<E> scale = RealOf<E>(all.scale);
    each_element<E>(all, [=](int64_t i, auto size) INLINED {
        Pair<E> pair = load_pair(a + i, size);
        for (auto& x : pair.half) x = positive(x) * scale * positive(x);
        store_pair(y + i, pair, size);
    });
}

template <class E> void squared_relu_backward(const Elements& all) {
    const E *a = static_cast<const E*>(all.a), *grad_y = static_cast<const E*>(all.grad_y);
    E* grad_a = static_cast<E*>(all.grad_a);
    const RealOf<E> scale = RealOf<E>(2 * all.scale);
    each_element<E>(all, [=](int64_t i, auto size) INLINED {
        const Pair<E> x = load_pair(a + i, size);
        Pair<E> gradient = load_pair(grad_y + i, size);
        for (int h = 0; h < 2; ++h) gradient.half[h] *= scale * positive(x.half[h]);
        store_pair(grad_a + i, gradient, size);
    });
}

// y = scale sigmoid(a) b
template <class E> void gate(const Elements& all) {
    typedef RealOf<E> R;
    const E *a = static_cast<const E*>(all.a), *b = static_cast<const E*>(all.b);
    E* y = static_cast<E*>(all.y);
    const R scale = R(all.scale);
    each_element<E>(all, [=](int64_t i, auto size) INLINED {
        const Pair<E> receptance = load_pair(a + i, size);
        Pair<E> x = load_pair(b + i, size);
        for (int h = 0; h < 2; ++h) x.half[h] *= scale * sigmoid<R>(receptance.half[h]);
        store_pair(y + i, x, size);
    });
}

template <class E> void gate_backward(const Elements& all) {
    typedef RealOf<E> R;
    const E *a = static_cast<const E*>(all.a), *b = static_cast<const E*>(all.b);
    const E* grad_y = static_cast<const E*>(all.grad_y);
    E *grad_a = static_cast<E*>(all.grad_a), *grad_b = static_cast<E*>(all.grad_b);
    const R scale = R(all.scale);
    each_element<E>(all, [=](int64_t i, auto size) INLINED {
        const Pair<E> receptance = load_pair(a + i, size), x = load_pair(b + i, size);
        Pair<E> of_a, of_b = load_pair(grad_y + i, size);
        for (int h = 0; h < 2; ++h) {
            const V<R> open = sigmoid<R>(receptance.half[h]);
            of_b.half[h] *= scale * open;
            of_a.half[h] = of_b.half[h] * x.half[h] * (1 - open);
        }
        store_pair(grad_a + i, of_a, size);
        store_pair(grad_b + i, of_b, size);
    });
}

}  // namespace mixing

// `dtype`: 0 float, 1 bfloat16, 2 float16, 3 double. Returns whether the bounds fit; where not, nothing was done.
extern "C" bool shift_and_mix_cpu(int dtype, bool backwards, int mixes, const mixing::Arguments* all) {
    using namespace mixing;
    if (!fits(*all)) return false;
    void (*const of[4])(int, bool, const Arguments&) = {run<float>, run<BFloat16>, run<Float16>, run<double>};
    of[dtype](mixes, backwards, *all);
    return true;
}

extern "C" void squared_relu_cpu(int dtype, bool backwards, const mixing::Elements* all) {
    using namespace mixing;
    void (*const passes[4][2])(const Elements&) = {{squared_relu<float>, squared_relu_backward<float>},
                                                   {squared_relu<BFloat16>, squared_relu_backward<BFloat16>},
                                                   {squared_relu<Float16>, squared_relu_backward<Float16>},
                                                   {squared_relu<double>, squared_relu_backward<double>}};
    passes[dtype][backwards](*all);
}

extern "C" void gate_cpu(int dtype, bool backwards, const mixing::Elements* all) {
    using namespace mixing;
    void (*const passes[4][2])(const Elements&) = {{gate<float>, gate_backward<float>},
                                                   {gate<BFloat16>, gate_backward<BFloat16>},
                                                   {gate<Float16>, gate_backward<Float16>},
                                                   {gate<double>, gate_backward<double>}};
    passes[dtype][backwards](*all);
}
