// What reading memory takes: every thread sums a part of it.
#include <cstdint>

extern "C" uint64_t stream_sum(const uint64_t* data, int64_t count, int32_t threads) {
    uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(threads)
    for (int64_t chunk = 0; chunk < count / 8192; chunk++) {
        const uint64_t* from = data + chunk * 8192;
        uint64_t sums[16] = {};
        for (int64_t i = 0; i < 8192; i += 16) {
            __builtin_prefetch(from + i + 256);
            __builtin_prefetch(from + i + 264);
            for (int k = 0; k < 16; k++) sums[k] += from[i + k];
        }
        for (int k = 0; k < 16; k++) total += sums[k];
    }
    return total;
}
