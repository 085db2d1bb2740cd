// WKV-4 on a CPU: vectors of channels, threads over sequences and groups of channels. Plain C++17 with the vector
// extensions of GCC and Clang, which become AVX-512, AVX, SSE or NEON instructions, whatever the target has.
//
// Symbols: N sequences of tokens laid end to end, C channels, E the type of an element, R the type that is computed in.
//
// Within a sequence a channel is computed from first token to last, so that its bits do not depend on what else is in
// the batch. Only where there are fewer groups of channels than threads, whatever N is, time is cut into segments: what
// each adds up to is found first, then all start from their true states.

#include <cstdint>
#include <vector>

#include "wkv4_vectors.h"

namespace wkv4 {

constexpr int TILE = 64;        // tokens between two states that the forward pass keeps for the backward pass
constexpr int GROUP = 4;        // vectors of channels that one thread takes at a time
constexpr int TURN = 8;         // tokens that each of them then takes in turn
constexpr int SEGMENT = 1024;   // tokens of a segment, a multiple of TILE
constexpr int AHEAD = 6;        // tokens to fetch ahead of use
constexpr int64_t GRAIN = 1 << 15;  // elements that are worth waking a thread for

// -- the problem ------------------------------------------------------------------------------------------------------

// (B, T, C), or (1, tokens, C) with bounds: channels lie side by side, all else at any distance, counted in elements.
struct Sequences {
    const void* data;
    int64_t batch_stride, time_stride;
};

// The arguments of both passes, as wkv4_cpu.py fills them in. What is not const is written, and lies without gaps.
struct Arguments {
    int64_t sequences, time, channels, threads;
    const int64_t* bounds;  // (N + 1) or null: then every sequence is a row of `time` tokens
    const void *time_decay, *time_first;  // (C) R
    Sequences key, value;
    const void* state;  // (N, 3, C) R
    void* tiles;  // (tokens / TILE + N, 3, C) R: written by the forward pass, read by the backward pass; or null
    void *output, *final_state;  // (tokens, C) E; (N, 3, C) R
    Sequences grad_output;
    const void* grad_state;  // (N, 3, C) R
    void *grad_decay, *grad_first, *grad_key, *grad_value, *grad_initial;  // (C) R twice, (tokens, C) E twice, as state
};

// A vector of channels of one sequence. E is an element; WHOLE, whether all lanes are in use.
template <class E, bool WHOLE> struct Strand {
    typedef RealOf<E> R;
    typedef V<R> X;
    const Arguments& all;
    const int64_t sequence, channel;
    int64_t begin, time;  // where the sequence begins among all tokens, and its length
    X w, u, lead;  // a step of decay, the bonus, and e^(u + w)
    bool is_near;  // whether one exponential a token will do

    WKV_INLINE Strand(const Arguments& all, int64_t sequence, int64_t channel)
        : all(all), sequence(sequence), channel(channel) {
        begin = all.bounds ? all.bounds[sequence] : sequence * all.time;
        time = all.bounds ? all.bounds[sequence + 1] - begin : all.time;
        const X decay = row(all.time_decay, 0), most = X{} + 30;
        w = -exp_(decay > most ? most : decay);
        u = row(all.time_first, 0);
        lead = exp_(u + w);
        const auto far = (u + w <= FAR) | (u + w >= MOST) | (u != u);
        is_near = true;
        for (int i = 0; i < LANES<R>; ++i) is_near &= !far[i];
    }

    WKV_INLINE int lanes() const { return WHOLE ? LANES<R> : int(all.channels - channel); }

    // Row i of a tensor (..., C) of real numbers.
    WKV_INLINE X row(const void* x, int64_t i) const {
        return load(static_cast<const R*>(x) + i * all.channels + channel, lanes());
    }
    WKV_INLINE void set_row(void* x, int64_t i, X y) const {
        store(static_cast<R*>(x) + i * all.channels + channel, y, lanes());
    }
    WKV_INLINE State<X> state(const void* x, int64_t i) const {
        return {row(x, 3 * i), row(x, 3 * i + 1), row(x, 3 * i + 2)};
    }
    WKV_INLINE void set_state(void* x, int64_t i, const State<X>& s) const {
        set_row(x, 3 * i, s.a), set_row(x, 3 * i + 1, s.b), set_row(x, 3 * i + 2, s.p);
    }
    WKV_INLINE State<X> initial() const {
        return adopt(state(all.state, sequence));
    }
    WKV_INLINE int64_t tile(int64_t t) const { return begin / TILE + sequence + t / TILE; }

    // Where token t of the sequence is. Reading asks for tokens to come; those of a step are too far apart to be guessed.
    WKV_INLINE const E* at(const Sequences& x, int64_t t) const {
        const int64_t token = all.bounds ? (begin + t) * x.time_stride : sequence * x.batch_stride + t * x.time_stride;
        return static_cast<const E*>(x.data) + token + channel;
    }
    template <int DIRECTION> WKV_INLINE X read(const Sequences& x, int64_t t) const {
        const E* from = at(x, t);
        __builtin_prefetch(from + DIRECTION * AHEAD * x.time_stride);
        return load(from, lanes());
    }
    WKV_INLINE void write(void* x, int64_t t, X y) const {
        store(static_cast<E*>(x) + (begin + t) * all.channels + channel, y, lanes());
    }

    // What the tokens from..to add up to.
    State<X> sum(int64_t from, int64_t to) const {
        constexpr int STEPS = 8;
        State<X> s = empty<X>();
        for (int64_t t = from; t < to; t += STEPS) {
            const int count = int(to - t < STEPS ? to - t : STEPS);
            const auto key = [&](int i) { return read<1>(all.key, t + i); };
            const auto value = [&](int i) { return i < count ? read<1>(all.value, t + i) : X{}; };
            s = join(s, w * R(count), add_up<STEPS>(w, count, key, value));
        }
        return s;
    }

    // Outputs, and states at the beginning of tiles, of the tokens from..to; the state after them.
    State<X> forward(const State<X>& s, int64_t from, int64_t to) const {
        return is_near ? forward_as<true>(s, from, to) : forward_as<false>(s, from, to);
    }
    template <bool NEAR> State<X> forward_as(State<X> s, int64_t from, int64_t to) const {
        for (int64_t t = from; t < to; ++t) {
            if (all.tiles && t % TILE == 0) set_state(all.tiles, tile(t), s);
            const X k = read<1>(all.key, t), v = read<1>(all.value, t);
            const Weights<X> weights = NEAR ? weigh_near(w, lead, k, s.p) : weigh(w, u, k, s.p);
            write(all.output, t, output(s, weights, v));
            absorb(s, weights, v);
        }
        return s;
    }

    struct Before {
        State<X> state;
        Weights<X> weights;
    };
    // The states before tokens of a tile, and their weights.
    WKV_INLINE void replay(int64_t from, int64_t to, Before* before) const {
        State<X> s = state(all.tiles, tile(from));
        for (int64_t t = from; t < to; ++t, ++before) {
            before->state = s;
            before->weights = weigh(w, u, read<1>(all.key, t), s.p);
            absorb(s, before->weights, read<1>(all.value, t));
        }
    }

    // What a run adds to the adjoint before it, and (as p) what it leaves of the one after it: here nothing yet.
    static WKV_INLINE State<X> no_run() { return {X{}, X{}, X{} + 1}; }

    // `run` grows by the tokens from..to before it, of which from begins a tile.
    void retreat_over(State<X>& run, int64_t from, int64_t to) const {
        Before before[TILE];
        for (int64_t start = (to - 1) / TILE * TILE, end = to; start >= from; end = start, start -= TILE) {
            replay(start, end, before);
            Adjoint<X> adjoint{run.a, run.b};
            for (int64_t t = end - 1; t >= start; --t) {
                const Before& now = before[t - start];
                retreat(now.state, now.weights, load(at(all.value, t), lanes()), read<-1>(all.grad_output, t), adjoint);
                run.p *= now.weights.past;
            }
            run.a = adjoint.a, run.b = adjoint.b;
        }
    }

    // The adjoint moves over the same; with the gradients of keys and values. Those of the channels are added to
    // `first` and `decay`.
    void backward(Adjoint<X>& adjoint, int64_t from, int64_t to, X& first, X& decay) const {
        Before before[TILE];
        for (int64_t start = (to - 1) / TILE * TILE, end = to; start >= from; end = start, start -= TILE) {
            replay(start, end, before);
            X first_of_tile{}, decay_of_tile{};
            for (int64_t t = end - 1; t >= start; --t) {
                const Before& now = before[t - start];
                const X v = load(at(all.value, t), lanes()), gy = read<-1>(all.grad_output, t);
                const Gradient<X> gradient = differentiate(now.state, now.weights, v, gy, adjoint);
                write(all.grad_key, t, gradient.key);
                write(all.grad_value, t, gradient.value);
                first_of_tile += gradient.first;
                decay_of_tile += now.weights.past * gradient.decay;
                retreat(now.state, now.weights, v, gy, adjoint);
            }
            first += first_of_tile;
            decay += decay_of_tile;
        }
    }
};

// -- threads ----------------------------------------------------------------------------------------------------------

// Tokens of a sequence that one thread takes; the last of a sequence is `closing`.
struct Piece {
    int64_t sequence, from, to;
    bool closing;
};

std::vector<Piece> cut(const Arguments& all, int64_t groups) {
    std::vector<Piece> pieces;
    for (int64_t n = 0; n < all.sequences; ++n) {
        const int64_t time = all.bounds ? all.bounds[n + 1] - all.bounds[n] : all.time;
        const int64_t step = groups < all.threads ? SEGMENT : time + 1;
        int64_t from = 0;
        for (; from + step < time; from += step) pieces.push_back({n, from, from + step, false});
        pieces.push_back({n, from, time, true});
    }
    return pieces;
}

// use(strand) of the channels from `channel` on.
template <class E, class Use>
WKV_INLINE void with_strand(const Arguments& all, int64_t sequence, int64_t channel, const Use& use) {
    if (channel + LANES<RealOf<E>> <= all.channels) {
        use(Strand<E, true>(all, sequence, channel));
    } else {
        use(Strand<E, false>(all, sequence, channel));
    }
}

// Groups of GROUP vectors of channels.
template <class E> int64_t groups(const Arguments& all) {
    constexpr int64_t width = GROUP * LANES<RealOf<E>>;
    return (all.channels + width - 1) / width;
}

// work(piece, begin, end) for all pieces and groups of channels begin..end, in any order, on several threads.
template <class E, class Work> void each_group(const Arguments& all, const std::vector<Piece>& pieces, const Work& work) {
    constexpr int64_t width = GROUP * LANES<RealOf<E>>;
    const int64_t columns = groups<E>(all), items = int64_t(pieces.size()) * columns;
    const int64_t tokens = all.bounds ? all.bounds[all.sequences] : all.sequences * all.time;
    int64_t threads = 1 + tokens * all.channels / GRAIN;
    if (threads > all.threads) threads = all.threads;
    if (threads > items) threads = items;
#pragma omp parallel for schedule(dynamic) num_threads(int(threads)) if (threads > 1)
    for (int64_t i = 0; i < items; ++i) {
        const int64_t begin = i % columns * width, end = begin + width;
        work(i / columns, begin, end < all.channels ? end : all.channels);
    }
}

// work(piece, strand) for all pieces and vectors of channels.
template <class E, class Work> void each(const Arguments& all, const std::vector<Piece>& pieces, const Work& work) {
    each_group<E>(all, pieces, [&](int64_t piece, int64_t begin, int64_t end) {
        for (int64_t channel = begin; channel < end; channel += LANES<RealOf<E>>) {
            with_strand<E>(all, pieces[piece].sequence, channel, [&](const auto& strand) { work(piece, strand); });
        }
    });
}

// -- both passes ------------------------------------------------------------------------------------------------------

// Outputs of a piece, from its `start` (3, C) or, for null, the initial state. The strands take turns, since they are
// neighbours in memory, and tokens are far apart: each would else come to as many pages.
template <class Strand, class R> void forward(const std::vector<Strand>& strands, const Piece& piece, const R* start) {
    std::vector<State<typename Strand::X>> states;
    for (const Strand& strand : strands) {
        const auto kept = [&](const void* x, int64_t i) { return strand.state(x, i); };
        states.push_back(strand.time == 0 ? kept(strand.all.state, strand.sequence)  // as it was
                         : start          ? kept(start, 0)
                                          : strand.initial());
    }
    for (int64_t from = piece.from, to = from; from < piece.to; from = to) {
        to = from + TURN < piece.to ? from + TURN : piece.to;
        for (size_t i = 0; i < strands.size(); ++i) states[i] = strands[i].forward(states[i], from, to);
    }
    for (size_t i = 0; piece.closing && i < strands.size(); ++i) {
        strands[i].set_state(strands[i].all.final_state, piece.sequence, states[i]);
    }
}

template <class E> void forward(const Arguments& all) {
    typedef RealOf<E> R;
    typedef V<R> X;
    const std::vector<Piece> pieces = cut(all, groups<E>(all));
    std::vector<R> starts;  // the states before pieces, (pieces, 3, C)
    if (int64_t(pieces.size()) > all.sequences) {
        starts.resize(pieces.size() * 3 * all.channels);
        each<E>(all, pieces, [&](int64_t i, const auto& strand) {
            if (!pieces[i].closing) strand.set_state(&starts[0], i + 1, strand.sum(pieces[i].from, pieces[i].to));
        });
        each<E>(all, pieces, [&](int64_t i, const auto& strand) {
            if (pieces[i].from > 0) return;
            State<X> s = strand.initial();
            for (; !pieces[i].closing; ++i) {
                s = join(s, strand.w * R(pieces[i].to - pieces[i].from), strand.state(&starts[0], i + 1));
                strand.set_state(&starts[0], i + 1, s);
            }
        });
    }
    each_group<E>(all, pieces, [&](int64_t i, int64_t begin, int64_t end) {
        const R* start = pieces[i].from > 0 ? &starts[3 * i * all.channels] : nullptr;
        std::vector<Strand<E, true>> whole;
        for (; begin + LANES<R> <= end; begin += LANES<R>) whole.emplace_back(all, pieces[i].sequence, begin);
        forward(whole, pieces[i], start);
        if (begin < end) forward(std::vector<Strand<E, false>>{{all, pieces[i].sequence, begin}}, pieces[i], start);
    });
}

template <class E> void backward(const Arguments& all) {
    typedef RealOf<E> R;
    typedef V<R> X;
    const std::vector<Piece> pieces = cut(all, groups<E>(all));
    std::vector<R> ends;  // the adjoints after pieces that are not closing, (pieces, 3, C)
    const auto after = [&](int64_t i, const auto& strand) -> Adjoint<X> {
        const bool closing = pieces[i].closing;
        const State<X> s = closing ? strand.state(all.grad_state, strand.sequence) : strand.state(&ends[0], i);
        return {s.a, s.b};
    };
    if (int64_t(pieces.size()) > all.sequences) {
        ends.resize(pieces.size() * 3 * all.channels);
        each<E>(all, pieces, [&](int64_t i, const auto& strand) {
            const auto [sequence, from, to, closing] = pieces[i];
            if (from == 0) return;
            State<X> run = strand.no_run();
            strand.retreat_over(run, from, to);
            strand.set_state(&ends[0], i - 1, run);
        });
        each<E>(all, pieces, [&](int64_t i, const auto& strand) {
            if (!pieces[i].closing) return;
            for (; pieces[i].from > 0; --i) {
                const State<X> run = strand.state(&ends[0], i - 1);
                const Adjoint<X> end = join(Adjoint<X>{run.a, run.b}, run.p, after(i, strand));
                strand.set_state(&ends[0], i - 1, {end.a, end.b, run.p});
            }
        });
    }
    std::vector<R> sums(pieces.size() * 2 * all.channels);  // gradients of u and w, a piece at a time
    each<E>(all, pieces, [&](int64_t i, const auto& strand) {
        const Piece& piece = pieces[i];
        X first{}, decay{};
        Adjoint<X> adjoint = after(i, strand);
        strand.backward(adjoint, piece.from, piece.to, first, decay);
        strand.set_row(&sums[0], 2 * i, first);
        strand.set_row(&sums[0], 2 * i + 1, decay);
        if (piece.from > 0) return;
        const auto none = strand.state(all.state, piece.sequence).b == 0;  // no history, so no gradient
        if (strand.time > 0) adjoint = {select_(none, X{}, adjoint.a), select_(none, X{}, adjoint.b)};
        strand.set_state(all.grad_initial, piece.sequence, {adjoint.a, adjoint.b, X{}});
    });
    each<E>(all, {pieces[0]}, [&](int64_t, const auto& strand) {
        X first{}, decay{};
        for (size_t i = 0; i < pieces.size(); ++i) {
            first += strand.row(&sums[0], 2 * i);
            decay += strand.row(&sums[0], 2 * i + 1);
        }
        strand.set_row(all.grad_first, 0, first);
        strand.set_row(all.grad_decay, 0, strand.w * decay);
    });
}

}  // namespace wkv4

// `dtype`: 0 float, 1 bfloat16, 2 float16, 3 double.
extern "C" void wkv4_cpu(int dtype, bool backwards, const wkv4::Arguments* all) {
    using namespace wkv4;
    void (*const passes[4][2])(const Arguments&) = {{forward<float>, backward<float>},
                                                    {forward<BFloat16>, backward<BFloat16>},
                                                    {forward<Float16>, backward<Float16>},
                                                    {forward<double>, backward<double>}};
    passes[dtype][backwards](*all);
}
