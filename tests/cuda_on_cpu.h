// What a CUDA kernel of this project needs to run on a CPU. Its threads take turns on one thread of the CPU: one that waits
// gives way, and turns go up and down, the other way round at every second launch, so that whoever does not wait where he
// must comes too early in one of two. The functions named ptx_ stand for those of the source that are PTX.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local

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

static void give_way();

struct Barrier {
    int threads, arrived = 0, meetings = 0;

    void wait() {
        const int now = meetings;
        if (++arrived == threads) arrived = 0, ++meetings;
        while (meetings == now) give_way();
    }
};

// What the threads of a block have in common.
struct Room {
    static constexpr int LANES = 32;
    Barrier everybody;
    std::vector<Barrier> warps;
    std::vector<float> told;
    std::vector<float4> memory;

    Room(int threads, int bytes)
        : everybody{threads}, warps((threads + LANES - 1) / LANES, {std::min(threads, LANES)}), told(threads),
          memory(bytes / sizeof(float4) + 1) {}
};

// A thread of a kernel, with a stack of its own.
struct Thread {
    static constexpr int STACK = 1 << 16;
    Index index, block;
    Room* room;
    bool is_done = false;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};

static thread_local Index threadIdx, blockIdx, gridDim;
static thread_local Room* room;
static thread_local Thread* running;
static thread_local ucontext_t others;  // who gives the turns

static void give_way() { swapcontext(&running->context, &others); }
static void __syncthreads() { room->everybody.wait(); }
static float4* shared_memory() { return room->memory.data(); }
static void __trap() { std::abort(); }
static unsigned atomicAdd(unsigned* to, unsigned x) { return (*to += x) - x; }
static unsigned ptx_arrived(const unsigned* met) {
    give_way();
    return *met;
}
static float __shfl_xor_sync(unsigned, float x, int other) {
    Barrier& warp = room->warps[threadIdx.x / Room::LANES];
    room->told[threadIdx.x] = x;
    warp.wait();
    const float heard = room->told[threadIdx.x ^ other];
    warp.wait();
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

static void take_turn(Thread& thread) {
    if (thread.is_done) return;
    running = &thread, threadIdx = thread.index, blockIdx = thread.block, room = thread.room;
    swapcontext(&others, &thread.context);
}

static void take_turns(std::vector<Thread>& threads) {
    static thread_local bool is_second = false;
    bool goes_down = is_second = !is_second;
    const auto is_done = [](const Thread& thread) { return thread.is_done; };
    for (; !std::all_of(threads.begin(), threads.end(), is_done); goes_down = !goes_down) {
        if (goes_down) std::for_each(threads.rbegin(), threads.rend(), take_turn);
        else std::for_each(threads.begin(), threads.end(), take_turn);
    }
}

// Blocks run one after another, in the order in which a GPU begins them, or together.
template <class Kernel, class Arguments>
void run(Kernel kernel, Index blocks, int threads, const Arguments& arguments, int shared_bytes = 0, bool together = false) {
    static thread_local Kernel what;
    static thread_local const Arguments* of;
    const auto begin = [] {
        what(*of);
        running->is_done = true;
    };
    what = kernel, of = &arguments, gridDim = blocks;
    std::vector<std::unique_ptr<Room>> rooms;
    std::vector<Thread> all;
    for (int block = 0; block < blocks.x * blocks.y; ++block) {
        rooms.push_back(std::make_unique<Room>(threads, shared_bytes));
        for (int i = 0; i < threads; ++i) {
            Index here{block % blocks.x, block / blocks.x};
            all.push_back({{i, 0}, here, rooms.back().get()});
        }
        if (together && block + 1 < blocks.x * blocks.y) continue;
        for (Thread& thread : all) {  // which stay where they are from now on
            getcontext(&thread.context);
            thread.stack.reset(new char[Thread::STACK]);
            thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = Thread::STACK;
            thread.context.uc_link = &others;
            makecontext(&thread.context, +begin, 0);
        }
        take_turns(all);
        all.clear();
    }
}
