// What a CUDA kernel of this project needs to run on a CPU, one thread of the CPU for each of a block: slow, and exact
// about who waits for whom. The functions named ptx_ stand for those of the source that are PTX.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <pthread.h>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
    int x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

// What the threads of a block have in common.
struct Room {
    static constexpr int LANES = 32;
    pthread_barrier_t everybody;
    std::vector<pthread_barrier_t> warps;
    std::vector<float> told;
    std::vector<float4> memory;

    Room(int threads, int bytes) : warps((threads + LANES - 1) / LANES), told(threads), memory(bytes / sizeof(float4) + 1) {
        pthread_barrier_init(&everybody, nullptr, threads);
        for (auto& warp : warps) pthread_barrier_init(&warp, nullptr, std::min(threads, LANES));
    }
    ~Room() {
        pthread_barrier_destroy(&everybody);
        for (auto& warp : warps) pthread_barrier_destroy(&warp);
    }
};

static thread_local Index threadIdx, blockIdx, gridDim;
static thread_local Room* room;
static void __syncthreads() { pthread_barrier_wait(&room->everybody); }
static float4* shared_memory() { return room->memory.data(); }
static void __trap() { std::abort(); }
static unsigned atomicAdd(unsigned* to, unsigned x) { return __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }
static float __shfl_xor_sync(unsigned, float x, int other) {
    pthread_barrier_t* warp = &room->warps[threadIdx.x / Room::LANES];
    room->told[threadIdx.x] = x;
    pthread_barrier_wait(warp);
    const float heard = room->told[threadIdx.x ^ other];
    pthread_barrier_wait(warp);
    return heard;
}

template <class T> T __ldg(const T* x) { return *x; }
template <class T> T __ldcg(const T* x) { return *x; }
template <class T> T __ldcs(const T* x) { return *x; }
template <class T> void __stcg(T* x, T y) { *x = y; }
template <class T> void __stcs(T* x, T y) { *x = y; }
template <class To, class From> To bits_of(From x) {
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
static float __int_as_float(int x) { return bits_of<float>(x); }
static int __float_as_int(float x) { return bits_of<int>(x); }
static int min(int x, int y) { return x < y ? x : y; }
static bool __all_sync(unsigned, bool x) { return x; }
static int max(int x, int y) { return x > y ? x : y; }
static long long min(long long x, long long y) { return x < y ? x : y; }
static long long max(long long x, long long y) { return x > y ? x : y; }

static float rsqrtf(float x) { return 1 / std::sqrt(x); }

static float ptx_exp(float x) { return x < -126 ? 0 : std::exp2(x); }
static float ptx_max(float x, float y) { return x != x || y != y ? NAN : x > y ? x : y; }
static float ptx_min(float x, float y) { return x != x || y != y ? NAN : x < y ? x : y; }
static float ptx_reciprocal(float x) { return 1 / x; }
static unsigned short ptx_narrow(float x) {  // bfloat16
    const unsigned bits = bits_of<unsigned>(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static float ptx_half(unsigned short x) { return bits_of<_Float16>(x); }
static float ptx_larger(float x, float y) { return ptx_max(x, y); }
static float ptx_smaller(float x, float y) { return ptx_min(x, y); }
static float ptx_widen(unsigned x) { return bits_of<float>(x << 16); }
static unsigned short ptx_larger(unsigned short x, unsigned short y) { return ptx_narrow(ptx_max(ptx_widen(x), ptx_widen(y))); }
static unsigned short ptx_smaller(unsigned short x, unsigned short y) { return ptx_narrow(ptx_min(ptx_widen(x), ptx_widen(y))); }
template <unsigned short pick(unsigned short, unsigned short)> unsigned ptx_each(unsigned x, unsigned y) {
    return pick(x, y) | unsigned(pick(x >> 16, y >> 16)) << 16;
}
static unsigned ptx_larger(unsigned x, unsigned y) { return ptx_each<ptx_larger>(x, y); }
static unsigned ptx_smaller(unsigned x, unsigned y) { return ptx_each<ptx_smaller>(x, y); }
template <class Element, class T> T* ptx_after(T* from, int i, int stride) {
    return (T*)((char*)from + (long long)i * (stride * int(sizeof(Element))));
}

// Blocks run one after another, in the order in which a GPU begins them, or together.
template <class Kernel, class Arguments>
void run(Kernel kernel, Index blocks, int threads, const Arguments& arguments, int shared_bytes = 0, bool together = false) {
    std::vector<std::unique_ptr<Room>> rooms;
    std::vector<std::thread> all;
    for (int block = 0; block < blocks.x * blocks.y; ++block) {
        const Index here{block % blocks.x, block / blocks.x};
        rooms.push_back(std::make_unique<Room>(threads, shared_bytes));
        for (int i = 0; i < threads; ++i) {
            all.emplace_back([&, i, here, mine = rooms.back().get()] {
                threadIdx = {i, 0}, blockIdx = here, gridDim = blocks, room = mine;
                kernel(arguments);
            });
        }
        if (together) continue;
        for (std::thread& thread : all) thread.join();
        all.clear();
    }
    for (std::thread& thread : all) thread.join();
}
