// One token of a whole RWKV-4 on an NVIDIA GPU, for a few rows of a batch at once, in one launch: decode_cpu.cpp for
// GPUs. Compiled by NVRTC; decode_cuda.py defines what decode_cuda.h asks for.
//
// Symbols: B rows of the batch, C hidden size, A attention hidden size, I intermediate size, V vocabulary.
//
// Each weight is read once, as it lies in memory, and meets all rows; that is what a token costs. All blocks run at
// once, one a multiprocessor, and wait for each other four times a block of the model. (To ask for weights meanwhile, so
// that memory need not wait, made it slower on an H200: who waits is told later.) A row of a matrix belongs to one warp.
// What costs little (layer norms, mixing) each block of threads does for itself. Between weights and what is returned all
// is float32. A number is the same sum in the same order whatever the number of multiprocessors.

#include "decode_cuda.h"

namespace decode {

constexpr int PIECE = 16 / sizeof(Element);  // elements that a thread reads at once

struct State {
    Element *time_mix, *channel_mix;  // (layers, B, C)
    float* wkv;                       // (layers, B, 3, A)
};
struct Arguments {
    Model model;
    Table embeddings;
    State before, after;
    Element* logits;                        // (B, V)
    float *stream, *gated, *hidden, *gate;  // (B, C), (B, A), (B, I), (B, C): what blocks tell each other
    unsigned* met;                          // two counters, zero between launches
};

// Element i of a piece of a matrix.
WKV_INLINE float number(const uint4& piece, int i) {
    const unsigned parts[] = {piece.x, piece.y, piece.z, piece.w};
#if ELEMENT == 0
    return __int_as_float(int(parts[i]));
#else
    return widen(Element(parts[i / 2] >> 16 * (i % 2)));
#endif
}

// -- threads -----------------------------------------------------------------------------------------------------------

// Neighbouring numbers are of different blocks, so that what is left over is spread among them.
WKV_INLINE int warp() { return threadIdx.x / LANES * gridDim.x + blockIdx.x; }
WKV_INLINE int warps() { return WARPS * gridDim.x; }

// What was written before is there for whoever finds the count increased.
WKV_INLINE void arrive(unsigned* met) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(met) : "memory");
}
WKV_INLINE unsigned arrived(const unsigned* met) {
    unsigned count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(met) : "memory");
    return count;
}

// -- products ---------------------------------------------------------------------------------------------------------

// Where elements i to i + 3 of a vector of `columns` lie in shared memory: each thread reads pieces of it in parts of
// four, and beside the part of one thread lies that of the next.
WKV_INLINE int place(int i, int columns) { return i / 4 % (PIECE / 4) * (columns * 4 / PIECE) + i / PIECE * 4; }
WKV_INLINE void put(float* to, int i, int columns, float4 x) { *reinterpret_cast<float4*>(to + place(i, columns)) = x; }

// Of N rows of matrices and N times ROWS vectors in shared memory.
template <int N>
WKV_INLINE void multiply(const Element* const (&rows)[N], const float* const (&in)[N], int columns, float (&sums)[N][ROWS]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        for (int b = 0; b < ROWS; ++b) sums[n][b] = 0;
    }
#pragma unroll N == 1 ? 8 : 4
    for (int i = PIECE * lane(); i < columns; i += PIECE * LANES) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const uint4 piece = __ldcs(reinterpret_cast<const uint4*>(rows[n] + i));
#pragma unroll
            for (int b = 0; b < ROWS; ++b) {
#pragma unroll
                for (int part = 0; part < PIECE; part += 4) {
                    const float4 x = *reinterpret_cast<const float4*>(in[n] + b * columns + place(i + part, columns));
                    float& sum = sums[n][b];
                    sum += x.x * number(piece, part);
                    sum += x.y * number(piece, part + 1);
                    sum += x.z * number(piece, part + 2);
                    sum += x.w * number(piece, part + 3);
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        for (int b = 0; b < ROWS; ++b) sums[n][b] = warp_sum(sums[n][b]);
    }
}

// That of row b of the batch, where b is the lane.
WKV_INLINE float own(const float (&sums)[ROWS]) {
    float x = sums[0];
#pragma unroll
    for (int b = 1; b < ROWS; ++b) x = lane() == b ? sums[b] : x;
    return x;
}

// -- a token ----------------------------------------------------------------------------------------------------------

constexpr int WORDS = sizeof(Block) / sizeof(Int);

// One block's part of a token.
class Worker : Stream {
    const Arguments& all;
    const int attention, intermediate;
    Int* const where;                // these are in shared memory: see block
    float* const in;                 // vectors to be multiplied
    unsigned meetings = 0;

  public:
    WKV_INLINE Worker(const Arguments& all, float* memory)
        : Stream(all.model.head.columns, memory + 4 * WORDS), all(all), attention(all.model.blocks->key.rows),
          intermediate(all.model.blocks->feed_forward_key.rows), where(reinterpret_cast<Int*>(memory)),
          in(room + 2 * ROWS * WARPS) {}

    WKV_INLINE void run() {
        learn(0);
        __syncthreads();
        begin();
        Ahead<3> ahead = before_attention(0);
        for (int layer = 0; layer < all.model.layers; ++layer) {
            const Block& block = this->block(layer);
            const bool is_last = layer + 1 == all.model.layers;
            if (layer > 0) fetch();
            norm_and_mix(block.ln1, ahead, all.after.time_mix + Int(layer) * ROWS * channels);
            attend(block, layer);
            meet();
            if (!is_last) learn(layer + 1);
            add(block.output, all.gated, attention, nullptr);
            Ahead<2> next;
            meet([&] { next = before_feed_forward(layer); });
            fetch();
            norm_and_mix(block.ln2, next, all.after.channel_mix + Int(layer) * ROWS * channels);
            feed_forward(block);
            meet();
            add(block.feed_forward_value, all.hidden, intermediate, all.gate);
            meet([&] {
                if (!is_last) ahead = before_attention(layer + 1);
            });
        }
        head();
        leave();
    }

  private:
    // Waits for all blocks; what is done `meanwhile` must not read what they write.
    template <class Meanwhile> WKV_INLINE void meet(const Meanwhile& meanwhile) {
        __syncthreads();
        if (threadIdx.x == 0) arrive(all.met);
        meanwhile();
        ++meetings;
        while (threadIdx.x == 0 && arrived(all.met) < meetings * gridDim.x) continue;
        __syncthreads();
    }

    WKV_INLINE void meet() {
        meet([] {});
    }

    // Where weights are, in shared memory: of one block of the model, and the next.
    WKV_INLINE const Block& block(int layer) const {
        return *reinterpret_cast<const Block*>(where + layer % 2 * WORDS);
    }
    WKV_INLINE void learn(int layer) {
        const Int* const from = reinterpret_cast<const Int*>(all.model.blocks + layer);
        if (threadIdx.x < WORDS) where[layer % 2 * WORDS + threadIdx.x] = from[threadIdx.x];
    }

    WKV_INLINE void leave() const {
        __syncthreads();
        if (threadIdx.x == 0 && atomicAdd(all.met + 1, 1) + 1 == gridDim.x) all.met[0] = 0, all.met[1] = 0;
    }

    WKV_INLINE void fetch() {
        each([&](int n, int i) {
            for (int b = 0; b < ROWS; ++b) x[b][n] = far_four(all.stream + b * channels + i);
        });
    }

    WKV_INLINE Ahead<3> before_attention(int layer) const {
        const Block& block = this->block(layer);
        const Int at = Int(layer) * ROWS * channels;
        return look<3>(block.ln1, block.attention_mix, all.before.time_mix + at);
    }

    WKV_INLINE Ahead<2> before_feed_forward(int layer) const {
        const Block& block = this->block(layer);
        const Int at = Int(layer) * ROWS * channels;
        return look<2>(block.ln2, block.feed_forward_mix, all.before.channel_mix + at);
    }

    // `in` becomes N vectors between the norm and what it was at the token before; it is kept for the next token.
    template <int N> WKV_INLINE void norm_and_mix(const Norm& of, const Ahead<N>& ahead, Element* after) {
        norm(of, ahead.weight, ahead.bias);
        each([&](int n, int i) {
            for (int b = 0; b < ROWS; ++b) {
                const float4 now = x[b][n], before = Elements::widen(ahead.before[b][n]);
                if (i / (4 * LANES) % gridDim.x == blockIdx.x) {
                    put_four(after, b * channels + i, now);
                }
                for (int m = 0; m < N; ++m) {
                    put(in + (m * ROWS + b) * channels, i, channels, before + Vectors::widen(ahead.mix[m][n]) * (now - before));
                }
            }
        });
        __syncthreads();
    }

    // The residual stream begins.
    WKV_INLINE void begin() {
        each([&](int n, int i) {
            for (int b = 0; b < ROWS; ++b) x[b][n] = all.embeddings.read(b, i, channels);
        });
        norm(all.model.pre_ln);
        if (blockIdx.x > 0) return;
        each([&](int n, int i) {
            for (int b = 0; b < ROWS; ++b) *reinterpret_cast<float4*>(all.stream + b * channels + i) = x[b][n];
        });
    }

    WKV_INLINE void attend(const Block& block, int layer) const {
        const int size = ROWS * channels;
        for (int i = warp(); i < attention; i += warps()) {
            const Int at = (Int(layer) * ROWS + min(lane(), ROWS - 1)) * 3 * attention + i;
            const float* const from = all.before.wkv + at;
            const wkv4::State<float> state{from[0], from[attention], from[2 * attention]};
            const float decay = read_time(block.time_decay, i), first = read_time(block.time_first, i);
            float sums[3][ROWS];
            multiply<3>({block.key.row(i), block.value.row(i), block.receptance.row(i)}, {in, in + size, in + 2 * size},
                        channels, sums);
            if (lane() < ROWS) {
                const float x = wkv(decay, first, own(sums[0]), own(sums[1]), state, all.after.wkv + at, attention);
                all.gated[lane() * attention + i] = sigmoid(own(sums[2])) * x;
            }
        }
    }

    // body(row, product) for this warp's rows of a matrix, in a lane for each row of the batch.
    template <class Body> WKV_INLINE void each_row(const Matrix& matrix, const float* in, const Body& body) const {
        for (int row = warp(); row < matrix.rows; row += warps()) {
            float sums[1][ROWS];
            multiply<1>({matrix.row(row)}, {in}, matrix.columns, sums);
            if (lane() < ROWS) body(row, own(sums[0]));
        }
    }

    WKV_INLINE void feed_forward(const Block& block) const {
        each_row(block.feed_forward_key, in, [&](int row, float sum) {
            const float positive = sum < 0 ? 0 : sum;
            all.hidden[lane() * intermediate + row] = positive * positive;
        });
        each_row(block.feed_forward_receptance, in + ROWS * channels,
                 [&](int row, float sum) { all.gate[lane() * channels + row] = sigmoid(sum); });
    }

    // The residual stream grows by a matrix times `from` (B, columns), gated where there is a gate.
    WKV_INLINE void add(const Matrix& matrix, const float* from, int columns, const float* gate) const {
#pragma unroll 4
        for (int i = 4 * threadIdx.x; i < ROWS * columns; i += 4 * THREADS) {
            put(in + i / columns * columns, i % columns, columns, far_four(from + i));
        }
        __syncthreads();
        for (int row = warp(); row < matrix.rows; row += warps()) {
            const int at = min(lane(), ROWS - 1) * channels + row;
            const float old = __ldcg(all.stream + at), open = gate ? __ldcg(gate + at) : 1;
            float sums[1][ROWS];
            multiply<1>({matrix.row(row)}, {in}, columns, sums);
            if (lane() < ROWS) all.stream[at] = old + open * own(sums[0]);
        }
    }

    WKV_INLINE void head() {
        fetch();
        norm(all.model.ln_out);
        each([&](int n, int i) {
            for (int b = 0; b < ROWS; ++b) put(in + b * channels, i, channels, x[b][n]);
        });
        __syncthreads();
        const Matrix& matrix = all.model.head;
        each_row(matrix, in, [&](int row, float sum) { all.logits[lane() * matrix.rows + row] = narrow(sum); });
    }
};

}  // namespace decode

extern "C" __global__ void __launch_bounds__(decode::THREADS, 1)
    decode_cuda(const __grid_constant__ decode::Arguments arguments) {
    extern __shared__ float4 memory[];
    decode::Worker(arguments, reinterpret_cast<float*>(memory)).run();
}
