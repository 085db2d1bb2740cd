// How fast this machine reads memory: the ceiling of everything that reads each weight once.

#include <cstdint>
#include <cstring>

#include "../kernels/cpu_vectors.h"

// The sum of `count` int32 read by several threads, so that no compiler leaves the reading out.
extern "C" int64_t read_memory(const int32_t* from, int64_t count, int threads) {
    typedef cpu::Words Words;
    constexpr int LANES = cpu::LANES<float>, TOGETHER = 4;
    const int64_t blocks = count / (LANES * TOGETHER);
    int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int part = 0; part < threads; ++part) {
        Words sums[TOGETHER]{};
        for (int64_t i = blocks * part / threads; i < blocks * (part + 1) / threads; ++i) {
            for (int k = 0; k < TOGETHER; ++k) {
                Words x;
                std::memcpy(&x, from + (i * TOGETHER + k) * LANES, sizeof x);
                sums[k] += x;
            }
        }
        for (const Words& sum : sums) {
            for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
        }
    }
    return total;
}
