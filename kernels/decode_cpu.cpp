// One token of a whole RWKV-4 on a CPU, for a few rows of a batch at once. Each weight is read once, as it lies in
// memory, and meets all rows; that is what a token costs. Plain C++17 with the vector extensions of GCC and Clang.
//
// Symbols: B rows of the batch, C hidden size, A attention hidden size, I intermediate size, V vocabulary.
//
// Between weights and what is returned all is float32, which has room for any residual stream: none is scaled. Threads
// share the rows of each matrix; what costs little (layer norms, mixing) each does for itself, so that they wait for
// each other four times a block. A number is the same sum in the same order whatever the number of threads or rows.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "wkv4_vectors.h"

namespace decode {

using namespace cpu;

constexpr int LANES = cpu::LANES<float>;
constexpr int MOST = 8;  // rows of a batch
constexpr int BAND = 4;  // rows of a matrix that are read side by side

// As decode_cpu.py fills them in. `dtype`: 0 float, 1 bfloat16, 2 float16, 3 int8.
struct Numbers {
    const void* data;
    int64_t dtype;
};
struct Matrix {
    const void* data;  // (rows, columns), without gaps
    const float* scales;  // (rows), by which int8 are to be multiplied, or null
    int64_t dtype, rows, columns;
};
struct Norm {
    Numbers weight, bias;
    double epsilon;
};
struct Block {
    Norm ln1, ln2;
    Numbers time_decay, time_first;
    Numbers attention_mix[3], feed_forward_mix[2];  // of key, value, receptance; of key, receptance
    Matrix key, value, receptance, output;
    Matrix feed_forward_key, feed_forward_receptance, feed_forward_value;
};
struct Model {
    int64_t layers;
    const Block* blocks;
    Norm pre_ln, ln_out;
    Matrix head;
};
struct State {
    void *time_mix, *channel_mix;  // (B, C)
    float* wkv;  // (B, 3, A)
};
struct Step {
    int64_t rows, threads, dtype;  // B; of x, logits and what is kept for token shifts
    const void* x;  // (B, C), the embeddings of the token
    const State *before, *after;  // (layers)
    void* logits;  // (B, V)
};

// -- numbers ----------------------------------------------------------------------------------------------------------

template <class Lanes> ALWAYS_INLINE Floats read(const void* from, int64_t dtype, int64_t i, Lanes lanes) {
    switch (dtype) {
        case 0: return load(static_cast<const float*>(from) + i, lanes);
        case 1: return load(static_cast<const BFloat16*>(from) + i, lanes);
        default: return load(static_cast<const Float16*>(from) + i, lanes);
    }
}

template <class Lanes> ALWAYS_INLINE void write(void* to, int64_t dtype, int64_t i, Floats x, Lanes lanes) {
    switch (dtype) {
        case 0: return store(static_cast<float*>(to) + i, x, lanes);
        case 1: return store(static_cast<BFloat16*>(to) + i, x, lanes);
        default: return store(static_cast<Float16*>(to) + i, x, lanes);
    }
}

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

// (B, columns) floats. A row begins with a vector, and there are zeros after its end.
class Rows {
    struct alignas(VECTOR_BYTES) Piece {
        float lane[LANES];
    };
    std::vector<Piece> pieces;

  public:
    const int64_t columns, stride;

    Rows(int64_t rows, int64_t columns)
        : pieces(rows * ((columns + LANES - 1) / LANES)), columns(columns), stride((columns + LANES - 1) / LANES * LANES) {}
    ALWAYS_INLINE float* at(int64_t row, int64_t i) { return pieces[0].lane + row * stride + i; }
    ALWAYS_INLINE const float* at(int64_t row, int64_t i) const { return pieces[0].lane + row * stride + i; }
    ALWAYS_INLINE Floats get(int64_t row, int64_t i) const { return load(at(row, i), LANES); }
    ALWAYS_INLINE void set(int64_t row, int64_t i, Floats x) { store(at(row, i), x, LANES); }
};

template <int N> ALWAYS_INLINE float sum(Vector<float, N> x) {
    if constexpr (N == 4) {
        return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
        struct Halves {
            Vector<float, N / 2> low, high;
        } const half = bitcast<Halves>(x);
        return sum<N / 2>(half.low + half.high);
    }
}

ALWAYS_INLINE Floats sigmoid(Floats x) {
    const Floats size = -x, most = Floats{} - Real<float>::lowest;
    return 1 / (1 + exponential<float>(size > most ? most : size));
}

// -- products ---------------------------------------------------------------------------------------------------------

struct Int8 {
    int8_t bits;
};

template <class E> ALWAYS_INLINE Floats weights(const E* from, int lanes) { return load(from, lanes); }
ALWAYS_INLINE Floats weights(const Int8* from, int lanes) {
    Vector<int8_t, LANES> x{};
    std::memcpy(&x, from, lanes);
    return __builtin_convertvector(x, Floats);
}

// N rows of a matrix, from `row` on, times B rows of `in`. What comes next is on its way meanwhile.
template <class E, int B, int N> ALWAYS_INLINE void band(const Matrix& matrix, int64_t row, const Rows& in, Rows& out) {
    const E* from = static_cast<const E*>(matrix.data) + row * matrix.columns;
    Floats sums[N][B]{};
    each_vector({0, matrix.columns}, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        for (int n = 0; n < N; ++n) {
            __builtin_prefetch(from + (N + n) * matrix.columns + i, 0, 2);
            const Floats x = weights(from + n * matrix.columns + i, lanes);
            for (int b = 0; b < B; ++b) sums[n][b] += x * in.get(b, i);
        }
    });
    for (int n = 0; n < N; ++n) {
        const float scale = matrix.scales ? matrix.scales[row + n] : 1;
        for (int b = 0; b < B; ++b) *out.at(b, row + n) = scale * sum<LANES>(sums[n][b]);
    }
}

template <class E, int B> void product(const Matrix& matrix, Range range, const Rows& in, Rows& out) {
    int64_t row = range.begin;
    for (; row + BAND <= range.end; row += BAND) band<E, B, BAND>(matrix, row, in, out);
    for (; row < range.end; ++row) band<E, B, 1>(matrix, row, in, out);
}

typedef void (*Product)(const Matrix&, Range, const Rows&, Rows&);

template <class E> Product product_of(int64_t rows) {
    static constexpr Product of[MOST] = {product<E, 1>, product<E, 2>, product<E, 3>, product<E, 4>,
                                         product<E, 5>, product<E, 6>, product<E, 7>, product<E, 8>};
    return of[rows - 1];
}

// Rows `range` of a matrix times B rows of `in`, to the same columns of `out`.
void multiply(const Matrix& matrix, int64_t rows, Range range, const Rows& in, Rows& out) {
    Product (*const of[])(int64_t) = {product_of<float>, product_of<BFloat16>, product_of<Float16>, product_of<Int8>};
    of[matrix.dtype](rows)(matrix, range, in, out);
}

// -- what is between them ---------------------------------------------------------------------------------------------

void layer_norm(const Norm& norm, int64_t rows, const Rows& x, Rows& y) {
    const Range all{0, x.columns};
    for (int64_t b = 0; b < rows; ++b) {
        Floats total{}, squares{};
        each_vector(all, [&](int64_t i, auto) { total += x.get(b, i); });
        const float mean = sum<LANES>(total) / x.columns;
        each_vector(all, [&](int64_t i, auto lanes) {
            Floats off = x.get(b, i) - mean;
            for (int lane = lanes; lane < LANES; ++lane) off[lane] = 0;
            squares += off * off;
        });
        const float scale = 1 / std::sqrt(sum<LANES>(squares) / x.columns + float(norm.epsilon));
        each_vector(all, [&](int64_t i, auto lanes) {
            const Floats weight = read(norm.weight.data, norm.weight.dtype, i, lanes);
            y.set(b, i, (x.get(b, i) - mean) * scale * weight + read(norm.bias.data, norm.bias.dtype, i, lanes));
        });
    }
}

// Between a token and the one before it.
void mix(const Numbers& weight, int64_t rows, const Rows& x, const void* previous, int64_t dtype, Rows& y) {
    for (int64_t b = 0; b < rows; ++b) {
        each_vector({0, x.columns}, [&](int64_t i, auto lanes) {
            const Floats before = read(previous, dtype, b * x.columns + i, lanes);
            y.set(b, i, before + read(weight.data, weight.dtype, i, lanes) * (x.get(b, i) - before));
        });
    }
}

// -- a token ----------------------------------------------------------------------------------------------------------

// Where threads wait for each other. OpenMP's barrier keeps a core busy for so long that on one that other programs use,
// too, the thread that is waited for does not come to run: beside two busy programs, on two cores, a token took six times
// as long.
class Barrier {
    static constexpr int PATIENCE = 1000;  // looks before others may have the core
    std::atomic<int64_t> arrived{0}, turn{0};

  public:
    void wait(int64_t threads) {
        const int64_t now = turn.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(now + 1, std::memory_order_release);
        }
        for (int looks = 0; turn.load(std::memory_order_acquire) == now; ++looks) {
            if (looks > PATIENCE) std::this_thread::yield();
        }
    }
};

// What all threads work on.
struct Shared {
    Barrier barrier;
    Rows x, key, value, receptance, hidden, gate, delta, logits;  // A columns: key, value, receptance; I: hidden

    Shared(const Model& model, int64_t rows)
        : x(rows, model.head.columns),
          key(rows, model.blocks->key.rows),
          value(rows, key.columns),
          receptance(rows, key.columns),
          hidden(rows, model.blocks->feed_forward_key.rows),
          gate(rows, x.columns),
          delta(rows, x.columns),
          logits(rows, model.head.rows) {}
};

// One thread's part of a token.
class Worker {
    const Model& model;
    const Step& step;
    Shared& shared;
    const int64_t rows, thread, threads;
    Rows normed, mixed;  // its own

  public:
    Worker(const Model& model, const Step& step, Shared& shared, int64_t thread, int64_t threads)
        : model(model), step(step), shared(shared), rows(step.rows), thread(thread), threads(threads),
          normed(rows, shared.x.columns), mixed(rows, shared.x.columns) {}

    void run() {
        for (int64_t layer = 0; layer < model.layers; ++layer) {
            const Block& block = model.blocks[layer];
            attend(block, step.before[layer], step.after[layer]);
            add(block.output, shared.receptance, [&](int64_t, int64_t, Floats x) { return x; });
            feed_forward(block, step.before[layer], step.after[layer]);
            add(block.feed_forward_value, shared.hidden,
                [&](int64_t b, int64_t i, Floats x) { return sigmoid(shared.gate.get(b, i)) * x; });
        }
        layer_norm(model.ln_out, rows, shared.x, normed);
        const Range part = share(model.head.rows);
        multiply(model.head, rows, part, normed, shared.logits);
        keep(shared.logits, part, step.logits);
    }

  private:
    // Its share of so many rows of a matrix.
    Range share(int64_t count) const {
        const int64_t vectors = (count + LANES - 1) / LANES;
        const auto cut = [&](int64_t n) { return std::min(count, vectors * n / threads * LANES); };
        return {cut(thread), cut(thread + 1)};
    }

    template <class Body> ALWAYS_INLINE void each(Range part, const Body& body) const {
        for (int64_t b = 0; b < rows; ++b) each_vector(part, [&](int64_t i, auto lanes) { body(b, i, lanes); });
    }

    void keep(const Rows& x, Range part, void* to) const {
        each(part, [&](int64_t b, int64_t i, auto lanes) {
            write(to, step.dtype, b * x.columns + i, x.get(b, i), lanes);
        });
    }

    // A matrix times the norm of the residual stream, mixed with what was there before.
    void multiply_mixed(const Matrix& matrix, const Numbers& weight, const void* previous, Range part, Rows& out) {
        mix(weight, rows, normed, previous, step.dtype, mixed);
        multiply(matrix, rows, part, mixed, out);
    }

    // The residual stream grows by change(row, channel, matrix times in).
    template <class Change> void add(const Matrix& matrix, const Rows& in, const Change& change) {
        const Range part = share(matrix.rows);
        multiply(matrix, rows, part, in, shared.delta);
        each(part, [&](int64_t b, int64_t i, auto) {
            shared.x.set(b, i, shared.x.get(b, i) + change(b, i, shared.delta.get(b, i)));
        });
        shared.barrier.wait(threads);
    }

    // Leaves in `receptance` what it gates.
    void attend(const Block& block, const State& before, const State& after) {
        layer_norm(block.ln1, rows, shared.x, normed);
        keep(normed, share(normed.columns), after.time_mix);
        const Range part = share(block.key.rows);
        const Numbers* weights = block.attention_mix;
        multiply_mixed(block.key, weights[0], before.time_mix, part, shared.key);
        multiply_mixed(block.value, weights[1], before.time_mix, part, shared.value);
        multiply_mixed(block.receptance, weights[2], before.time_mix, part, shared.receptance);
        each(part, [&](int64_t b, int64_t i, auto lanes) {
            const Floats wkv = this->wkv(block, before.wkv, after.wkv, b, i, lanes);
            shared.receptance.set(b, i, sigmoid(shared.receptance.get(b, i)) * wkv);
        });
        shared.barrier.wait(threads);
    }

    template <class Lanes>
    ALWAYS_INLINE Floats wkv(const Block& block, const float* from, float* to, int64_t b, int64_t i, Lanes lanes) const {
        const int64_t channels = shared.key.columns, at = b * 3 * channels + i;
        const auto part = [&](int64_t n) { return load(from + at + n * channels, lanes); };
        wkv4::State<Floats> state = wkv4::adopt(wkv4::State<Floats>{part(0), part(1), part(2)});
        const Floats decay = read(block.time_decay.data, block.time_decay.dtype, i, lanes), most = Floats{} + 30;
        const Floats w = -wkv4::exp_(decay > most ? most : decay), value = shared.value.get(b, i);
        const Floats u = read(block.time_first.data, block.time_first.dtype, i, lanes);
        wkv4::State<Floats> next = state;
        const wkv4::Weights<Floats> weights = wkv4::weigh(w, u, shared.key.get(b, i), next.p);
        wkv4::absorb(next, weights, value);
        store(to + at, next.a, lanes);
        store(to + at + channels, next.b, lanes);
        store(to + at + 2 * channels, next.p, lanes);
        return wkv4::output(state, weights, value);
    }

    // Leaves the squared ReLU of the key in `hidden`, the receptance in `gate`.
    void feed_forward(const Block& block, const State& before, const State& after) {
        layer_norm(block.ln2, rows, shared.x, normed);
        keep(normed, share(normed.columns), after.channel_mix);
        const Range part = share(block.feed_forward_key.rows);
        const Numbers* weights = block.feed_forward_mix;
        multiply_mixed(block.feed_forward_key, weights[0], before.channel_mix, part, shared.hidden);
        each(part, [&](int64_t b, int64_t i, auto) {
            const Floats x = shared.hidden.get(b, i), positive = x < 0 ? Floats{} : x;
            shared.hidden.set(b, i, positive * positive);
        });
        const Range own = share(block.feed_forward_receptance.rows);
        multiply_mixed(block.feed_forward_receptance, weights[1], before.channel_mix, own, shared.gate);
        shared.barrier.wait(threads);
    }
};

void run(const Model& model, const Step& step) {
    Shared shared(model, step.rows);
    Rows embedded(step.rows, shared.x.columns);
    for (int64_t b = 0; b < step.rows; ++b) {
        each_vector({0, embedded.columns}, [&](int64_t i, auto lanes) {
            embedded.set(b, i, read(step.x, step.dtype, b * embedded.columns + i, lanes));
        });
    }
    layer_norm(model.pre_ln, step.rows, embedded, shared.x);
#ifdef _OPENMP
#pragma omp parallel num_threads(int(step.threads))
    Worker(model, step, shared, omp_get_thread_num(), omp_get_num_threads()).run();
#else
    Worker(model, step, shared, 0, 1).run();
#endif
}

}  // namespace decode

// Rows: 1 to 8.
extern "C" void decode_cpu(const decode::Model* model, const decode::Step* step) { decode::run(*model, *step); }
