// A matrix of bfloat16 or int8 times rows of a batch by the matrix unit (AMX) of a CPU, for decode_cpu.cpp. Weights go
// to it as they lie in memory. The floats that they meet are split into pieces of the weights' type, whose products it
// sums: a bfloat16 has the first 8 bits and another one 8 of the rest; three int8 are the digits, in base 256, of a
// whole number of 23 bits, with room for sums over 2^17 columns. To the unit, subnormal bfloat16 are zeros.
//
// Symbols: E the type of a weight. A tile is 1 KB: 16 rows of 32 bfloat16 or of 64 int8, or 16 rows of 16 sums.

#pragma once

#include "decode_products.h"

#if defined(__linux__) && defined(__AVX512F__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

namespace decode::amx {

constexpr int SIDE = 16;    // rows of a tile
constexpr int WIDTH = 64;   // bytes of a row of it
constexpr int SUMS = 6;     // tiles of sums that are added to at once
constexpr int WEIGHTS = 6;  // the tile that they share, and that of what the weights meet
constexpr int INPUT = 7;
constexpr int64_t CACHED_TILES = 768;  // of what weights meet: in the second cache, beside some weights
constexpr int64_t STRIPS = 32;         // of 16 rows of a matrix, that meet these before others are read

typedef Vector<uint32_t, SIDE> Row;
struct alignas(WIDTH) Tile {
    Row row[SIDE];
};

template <class E> constexpr int PIECES = std::is_same_v<E, Int8> ? 3 : 2;
template <class E> constexpr int64_t COLUMNS = WIDTH / sizeof(E);

// Rows of a batch in pieces: column PIECES * b + p of `tiles` tiles side by side is piece p of row b. Below each other
// lie as many as take all columns of the rows.
struct Pieces {
    std::vector<Tile> all;
    std::vector<float> units;  // (B), what the last digits count
    int64_t tiles = 0;
};

#if HAS_AMX

// -- instructions -----------------------------------------------------------------------------------------------------

struct alignas(WIDTH) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    Configuration() {
        for (int tile = 0; tile < 8; ++tile) bytes[tile] = WIDTH, rows[tile] = SIDE;
    }
};

// Whether the system lets this process use it.
inline bool is_allowed() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return allowed;
}

// While one lives, its thread has tiles.
class Session {
    const bool on;

  public:
    explicit Session(bool on) : on(on) {
        static const Configuration configuration;
        if (on) asm volatile("ldtilecfg %0" ::"m"(configuration));
    }
    Session(const Session&) = delete;
    ~Session() {
        if (on) asm volatile("tilerelease");
    }
};

template <int T> ALWAYS_INLINE void clear() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }

template <int T> ALWAYS_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T> ALWAYS_INLINE void store(Tile& to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(&to), "r"(int64_t(WIDTH)), "i"(T) : "memory");
}

// Adds weights times input.
template <int T> ALWAYS_INLINE void add(BFloat16) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(T), "i"(WEIGHTS), "i"(INPUT));
}
template <int T> ALWAYS_INLINE void add(Int8) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(T), "i"(WEIGHTS), "i"(INPUT));
}

// -- pieces -----------------------------------------------------------------------------------------------------------

// Of tiles that follow each other.
ALWAYS_INLINE Row& row_of(Tile* tiles, int64_t i) { return tiles[i / SIDE].row[i % SIDE]; }

// Rows become columns: row i, then row i + 8, element by element, four times.
inline void transpose(Tile& x) {
    Tile y;
    const auto shuffle = [](const Tile& from, Tile& to) ALWAYS_INLINED {
        unrolled<SIDE / 2>([&](auto i) ALWAYS_INLINED {
            const auto a = from.row[i], b = from.row[i + SIDE / 2];
            to.row[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            to.row[2 * i + 1] =
                __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        });
    };
    shuffle(x, y);
    shuffle(y, x);
    shuffle(x, y);
    shuffle(y, x);
}

// The pieces of COLUMNS<E> numbers, the greatest ones first.
ALWAYS_INLINE void split(const float* x, float, Row* pieces, BFloat16) {
    Halves high[2], low[2];
    for (int i = 0; i < 2; ++i) {
        const Floats all = cpu::load(x + i * LANES, LANES);
        high[i] = narrow(all, BFloat16{});
        low[i] = narrow(all - widen(high[i], BFloat16{}), BFloat16{});
    }
    std::memcpy(&pieces[0], high, sizeof high);
    std::memcpy(&pieces[1], low, sizeof low);
}

// As whole numbers of units, `per` of which are 1.
constexpr float MOST = 0x7f0000;  // units: three digits from -128 to 127 write it
ALWAYS_INLINE void split(const float* x, float per, Row* pieces, Int8) {
    uint8_t digits[PIECES<Int8>][COLUMNS<Int8>];
    for (int i = 0; i < COLUMNS<Int8>; i += LANES) {
        const Words units = bitcast<Words>(_mm512_cvtps_epi32(bitcast<__m512>(cpu::load(x + i, LANES) * per)));
        for (int p = 0; p < PIECES<Int8>; ++p) {
            const Words digit = (units + 0x808080) >> (16 - 8 * p) ^ 0x80;
            const auto bytes = __builtin_convertvector(digit, Vector<uint8_t, LANES>);
            std::memcpy(digits[p] + i, &bytes, sizeof bytes);
        }
    }
    std::memcpy(pieces, digits, sizeof digits);
}

// NaN if it is not finite.
ALWAYS_INLINE float greatest(const Rows& x, int64_t b) {
    Floats most{}, nothing{};
    each_vector({0, x.columns}, [&](int64_t i, auto) {
        const Floats now = x.get(b, i), size = now < 0 ? -now : now;
        most = size > most ? size : most;
        nothing += now * 0;
    });
    float all = sum(nothing);
    for (int lane = 0; lane < LANES; ++lane) all = most[lane] > all ? most[lane] : all;
    return all;
}

template <class E> void split(int64_t rows, const Rows& in, Pieces& out) {
    const int64_t steps = (in.columns + COLUMNS<E> - 1) / COLUMNS<E>;
    out.tiles = (rows * PIECES<E> + SIDE - 1) / SIDE;
    out.all.resize(std::max<size_t>(out.all.size(), steps * out.tiles));
    out.units.resize(rows);
    std::vector<float> per(rows);
    for (int64_t b = 0; std::is_same_v<E, Int8> && b < rows; ++b) {
        const float most = greatest(in, b);
        out.units[b] = most / MOST, per[b] = most == 0 ? 0 : MOST / most;
    }
    for (int64_t k = 0; k < steps; ++k) {
        Tile* const to = out.all.data() + k * out.tiles;
        for (int64_t b = 0; b < rows; ++b) {
            Row pieces[PIECES<E>];
            split(in.at(b, k * COLUMNS<E>), per[b], pieces, E{});
            for (int p = 0; p < PIECES<E>; ++p) row_of(to, b * PIECES<E> + p) = pieces[p];
        }
        for (int64_t tile = 0; tile < out.tiles; ++tile) transpose(to[tile]);
    }
}

// -- products ---------------------------------------------------------------------------------------------------------

// A number from the sums of its pieces.
ALWAYS_INLINE Floats join(const Row* sums, float, BFloat16) {
    return bitcast<Floats>(sums[0]) + bitcast<Floats>(sums[1]);
}
ALWAYS_INLINE Floats join(const Row* sums, float unit, Int8) {
    const auto sum = [&](int p) { return __builtin_convertvector(bitcast<Integers>(sums[p]), Floats); };
    return (sum(0) * 65536 + (sum(1) * 256 + sum(2))) * unit;
}

// Adds to N tiles of sums, side by side from `first` on, up to 16 rows of a matrix, `part`, times some of their tiles.
template <class E, int N>
void add_products(const Matrix& matrix, Range part, Range steps, const Pieces& in, int64_t first, Tile* sums) {
    const int64_t stride = matrix.columns * sizeof(E);
    const int64_t whole = part.end - part.begin == SIDE ? std::min(steps.end, stride / WIDTH) : steps.begin;
    const char* from = static_cast<const char*>(matrix.data) + part.begin * stride + steps.begin * WIDTH;
    const Tile* x = in.all.data() + steps.begin * in.tiles + first;
    unrolled<N>([&](auto n) ALWAYS_INLINED { steps.begin == 0 ? clear<n>() : load<n>(&sums[first + n], WIDTH); });
    const auto add_all = [&] {
        unrolled<N>([&](auto n) ALWAYS_INLINED {
            load<INPUT>(x + n, WIDTH);
            add<n>(E{});
        });
        from += WIDTH, x += in.tiles;
    };
    for (int64_t k = steps.begin; k < whole; ++k) {
        load<WEIGHTS>(from, stride);
        unrolled<SIDE>([&](auto i) ALWAYS_INLINED { __builtin_prefetch(from + (SIDE + i) * stride, 0, 2); });
        add_all();
    }
    for (int64_t k = whole; k < steps.end; ++k) {  // what is not a whole tile, and zeros
        Tile tile{};
        for (int64_t row = part.begin; row < part.end; ++row) {
            const int64_t i = row - part.begin;
            std::memcpy(&tile.row[i], from + i * stride, std::min<int64_t>(WIDTH, stride - k * WIDTH));
        }
        load<WEIGHTS>(&tile, WIDTH);
        add_all();
    }
    unrolled<N>([&](auto n) ALWAYS_INLINED { store<n>(sums[first + n]); });
}

template <class E, int... N> constexpr auto adders(std::integer_sequence<int, N...>) {
    using Adder = void (*)(const Matrix&, Range, Range, const Pieces&, int64_t, Tile*);
    return std::array<Adder, sizeof...(N)>{add_products<E, N + 1>...};
}

// Rows `range` of a matrix times `batch` rows in pieces, to the same columns of `out`.
template <class E> void product(const Matrix& matrix, int64_t batch, Range range, const Pieces& in, Rows& out) {
    static constexpr auto add = adders<E>(std::make_integer_sequence<int, SUMS>{});
    const int64_t steps = (matrix.columns + COLUMNS<E> - 1) / COLUMNS<E>;
    const int64_t deep = std::max<int64_t>(1, CACHED_TILES / in.tiles), together = steps > deep ? STRIPS * SIDE : SIDE;
    std::vector<Tile> sums(together / SIDE * in.tiles);
    for (int64_t begin = range.begin; begin < range.end; begin += together) {
        const Range rows{begin, std::min(range.end, begin + together)};
        const auto each_strip = [&](const auto& body) {
            Tile* of_strip = sums.data();
            for (int64_t row = rows.begin; row < rows.end; row += SIDE, of_strip += in.tiles) {
                body(Range{row, std::min(rows.end, row + SIDE)}, of_strip);
            }
        };
        for (int64_t k = 0; k < steps; k += deep) {
            each_strip([&](Range part, Tile* to) {
                for (int64_t first = 0; first < in.tiles; first += SUMS) {
                    const int64_t count = std::min<int64_t>(SUMS, in.tiles - first);
                    add[count - 1](matrix, part, {k, std::min(steps, k + deep)}, in, first, to);
                }
            });
        }
        each_strip([&](Range part, Tile* from) {
            for (int64_t tile = 0; tile < in.tiles; ++tile) transpose(from[tile]);
            const int lanes = int(part.end - part.begin);
            const Floats scales = matrix.scales ? cpu::load(matrix.scales + part.begin, lanes) : Floats{} + 1;
            for (int64_t b = 0; b < batch; ++b) {
                Row pieces[PIECES<E>];
                for (int p = 0; p < PIECES<E>; ++p) pieces[p] = row_of(from, b * PIECES<E> + p);
                cpu::store(out.at(b, part.begin), scales * join(pieces, in.units[b], E{}), lanes);
            }
        });
    }
}

#else

inline bool is_allowed() { return false; }
struct Session {
    explicit Session(bool) {}
};
template <class E> void split(int64_t, const Rows&, Pieces&) {}
template <class E> void product(const Matrix&, int64_t, Range, const Pieces&, Rows&) {}

#endif

}  // namespace decode::amx
