// One token of a whole RWKV-4 on a CPU, for a few rows of a batch at once. Each weight is read once, as it lies in
// memory, and meets all rows; that is what a token costs. Plain C++17 with the vector extensions of GCC and Clang.
//
// Symbols: B rows of the batch, C hidden size, A attention hidden size, I intermediate size, V vocabulary.
//
// Between products and what is returned all is float32, which has room for any residual stream: none is scaled. Threads
// share the rows of each matrix; what costs little (layer norms, mixing) each does for itself, so that they wait for
// each other four times a block. A number is the same sum in the same order whatever the number of threads or rows; but
// for bfloat16 on a CPU with a matrix unit, which one row alone does without.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "decode_amx.h"
#include "decode_pairs.h"
#include "decode_products.h"
#include "wkv4_vectors.h"

namespace decode {

enum Unit { VECTORS, PAIRS, AMX };  // what multiplies bfloat16 and int8: decode_products.h, decode_pairs.h, decode_amx.h

constexpr int64_t TOKENS = 1024;  // whose logits are computed together

// As decode_weights.py fills them in. `dtype`: 0 float, 1 bfloat16, 2 float16, 3 int8.
struct Numbers {
    const void* data;
    int64_t dtype;
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
struct Table {
    const int64_t* ids;  // (B)
    const void* data;    // (rows, C), some of whose rows they are
    int64_t rows;
};
struct State {  // of all blocks, or of one
    char *time_mix, *channel_mix;  // (layers, B, C)
    float* wkv;                    // (layers, B, 3, A)
};
struct Step {
    int64_t rows, threads, dtype;  // B; of embeddings, logits and what is kept for token shifts
    int64_t unit;                  // the best that may be used
    Table embeddings;
    State before, after;
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

ALWAYS_INLINE Floats sigmoid(Floats x) {
    const Floats size = -x, most = Floats{} - Real<float>::lowest;
    return 1 / (1 + exponential<float>(size > most ? most : size));
}

// -- what is between them ---------------------------------------------------------------------------------------------

void layer_norm(const Norm& norm, int64_t rows, const Rows& x, Rows& y) {
    const Range all{0, x.columns};
    for (int64_t b = 0; b < rows; ++b) {
        Floats total{}, squares{};
        each_vector(all, [&](int64_t i, auto) { total += x.get(b, i); });
        const float mean = sum(total) / x.columns;
        each_vector(all, [&](int64_t i, auto lanes) {
            Floats off = x.get(b, i) - mean;
            for (int lane = lanes; lane < LANES; ++lane) off[lane] = 0;
            squares += off * off;
        });
        const float scale = 1 / std::sqrt(sum(squares) / x.columns + float(norm.epsilon));
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
    Rows x, key, value, receptance, hidden, gate, delta;  // A columns: key, value, receptance; I: hidden

    Shared(const Model& model, int64_t rows)
        : x(rows, model.head.columns),
          key(rows, model.blocks->key.rows),
          value(rows, key.columns),
          receptance(rows, key.columns),
          hidden(rows, model.blocks->feed_forward_key.rows),
          gate(rows, x.columns),
          delta(rows, x.columns) {}
};

// One thread's part of a token.
class Worker {
    const Model& model;
    const Step& step;
    Shared& shared;
    const int64_t rows, thread, threads;
    Rows normed, mixed, arranged, logits;  // its own
    Rounded rounded;
    amx::Pieces pieces;

  public:
    Worker(const Model& model, const Step& step, Shared& shared, int64_t thread, int64_t threads)
        : model(model), step(step), shared(shared), rows(step.rows), thread(thread), threads(threads),
          normed(rows, shared.x.columns), mixed(rows, shared.x.columns),
          arranged(rows, std::max({shared.x.columns, shared.key.columns, shared.hidden.columns})), logits(rows, TOKENS) {}

    void run() {
        const amx::Session session(step.unit == AMX);
        for (int64_t layer = 0; layer < model.layers; ++layer) {
            const Block& block = model.blocks[layer];
            const State before = of_layer(step.before, layer), after = of_layer(step.after, layer);
            attend(block, before, after);
            add(block.output, shared.receptance, [&](int64_t, int64_t, Floats x) { return x; });
            feed_forward(block, before, after);
            add(block.feed_forward_value, shared.hidden,
                [&](int64_t b, int64_t i, Floats x) { return sigmoid(shared.gate.get(b, i)) * x; });
        }
        layer_norm(model.ln_out, rows, shared.x, normed);
        write_logits(share(model.head.rows));
    }

  private:
    State of_layer(const State& all, int64_t layer) const {
        const int64_t shifts = layer * rows * shared.x.columns * SIZES[step.dtype];
        return {all.time_mix + shifts, all.channel_mix + shifts, all.wkv + layer * rows * 3 * shared.key.columns};
    }

    // Its share of so many rows of a matrix.
    Range share(int64_t count) const {
        const int64_t vectors = (count + LANES - 1) / LANES;
        const auto cut = [&](int64_t n) { return std::min(count, vectors * n / threads * LANES); };
        return {cut(thread), cut(thread + 1)};
    }

    // Of some tokens at a time: all of them for many rows would be megabytes.
    void write_logits(Range part) {
        prepare(model.head, normed);
        for (int64_t token = part.begin; token < part.end; token += logits.columns) {
            const int64_t count = std::min(part.end - token, logits.columns);
            multiply_prepared(model.head.from(token), normed, {0, count}, logits);
            for (int64_t b = 0; b < rows; ++b) {
                each_vector({0, count}, [&](int64_t i, auto lanes) {
                    write(step.logits, step.dtype, b * model.head.rows + token + i, logits.get(b, i), lanes);
                });
            }
        }
    }

    template <class Body> ALWAYS_INLINE void each(Range part, const Body& body) const {
        for (int64_t b = 0; b < rows; ++b) each_vector(part, [&](int64_t i, auto lanes) { body(b, i, lanes); });
    }

    void keep(const Rows& x, Range part, void* to) const {
        each(part, [&](int64_t b, int64_t i, auto lanes) {
            write(to, step.dtype, b * x.columns + i, x.get(b, i), lanes);
        });
    }

    // One row of bfloat16 takes as long without a matrix unit.
    bool by_amx(bool is_bfloat16) const { return step.unit == AMX && !(is_bfloat16 && rows == 1); }

    // As a product with such a matrix reads it.
    void prepare(const Matrix& matrix, const Rows& in) {
        switch (matrix.dtype) {
            case 1:
                if (by_amx(true)) return amx::split<BFloat16>(rows, in, pieces);
                return step.unit == PAIRS ? rounded.take(rows, in) : arrange<2>(rows, in, arranged);
            case 3: return by_amx(false) ? amx::split<Int8>(rows, in, pieces) : arrange<4>(rows, in, arranged);
        }
    }

    // Rows `part` of a matrix times `in`, which is prepared.
    void multiply_prepared(const Matrix& matrix, const Rows& in, Range part, Rows& out) {
        switch (matrix.dtype) {
            case 0: return product<ByFloats<float>>(matrix, rows, part, in, out);
            case 1:
                if (by_amx(true)) return amx::product<BFloat16>(matrix, rows, part, pieces, out);
                if (step.unit == PAIRS) return by_pairs(matrix, rows, part, rounded, out);
                return product<ByFloats<BFloat16>>(matrix, rows, part, arranged, out);
            case 2: return product<ByFloats<Float16>>(matrix, rows, part, in, out);
            default:
                if (by_amx(false)) return amx::product<Int8>(matrix, rows, part, pieces, out);
                return product<ByFloats<Int8>>(matrix, rows, part, arranged, out);
        }
    }

    void multiply(const Matrix& matrix, const Rows& in, Range part, Rows& out) {
        prepare(matrix, in);
        multiply_prepared(matrix, in, part, out);
    }

    // A matrix times the norm of the residual stream, mixed with what was there before.
    void multiply_mixed(const Matrix& matrix, const Numbers& weight, const void* previous, Range part, Rows& out) {
        mix(weight, rows, normed, previous, step.dtype, mixed);
        multiply(matrix, mixed, part, out);
    }

    // The residual stream grows by change(row, channel, matrix times in).
    template <class Change> void add(const Matrix& matrix, const Rows& in, const Change& change) {
        const Range part = share(matrix.rows);
        multiply(matrix, in, part, shared.delta);
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

// False, and nothing is written, if an id is of no row of the embeddings.
bool run(const Model& model, const Step& step) {
    const Table& embeddings = step.embeddings;
    const int64_t channels = model.head.columns;
    Rows embedded(step.rows, channels);
    for (int64_t b = 0; b < step.rows; ++b) {
        const int64_t id = embeddings.ids[b];
        if (id < 0 || id >= embeddings.rows) return false;
        each_vector({0, channels}, [&](int64_t i, auto lanes) {
            embedded.set(b, i, read(embeddings.data, step.dtype, id * channels + i, lanes));
        });
    }
    Shared shared(model, step.rows);
    layer_norm(model.pre_ln, step.rows, embedded, shared.x);
#ifdef _OPENMP
#pragma omp parallel num_threads(int(step.threads))
    Worker(model, step, shared, omp_get_thread_num(), omp_get_num_threads()).run();
#else
    Worker(model, step, shared, 0, 1).run();
#endif
    return true;
}

}  // namespace decode

// The best unit that there is.
extern "C" int decode_cpu_unit() {
    using namespace decode;
    return amx::is_allowed() ? AMX : HAS_PAIRS ? PAIRS : VECTORS;
}

extern "C" int decode_cpu(const decode::Model* model, const decode::Step* step) { return decode::run(*model, *step); }
