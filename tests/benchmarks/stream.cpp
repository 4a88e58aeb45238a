// What reading memory takes: every thread sums a part of it.
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" uint64_t stream_sum(const uint64_t* data, int64_t count, int32_t threads) {
    std::atomic<uint64_t> total{0};
    const int64_t chunks = count / 8192;
    const auto read = [&](int64_t chunk, int64_t end) {
        uint64_t sums[16] = {};
        for (; chunk < end; chunk++) {
            const uint64_t* from = data + chunk * 8192;
            for (int64_t i = 0; i < 8192; i += 16) {
                __builtin_prefetch(from + i + 256);
                __builtin_prefetch(from + i + 264);
                for (int k = 0; k < 16; k++) sums[k] += from[i + k];
            }
        }
        for (uint64_t sum : sums) total += sum;
    };
    std::vector<std::thread> others;
    for (int32_t t = 1; t < threads; t++) others.emplace_back(read, t * chunks / threads, (t + 1) * chunks / threads);
    read(0, chunks / threads);
    for (std::thread& other : others) other.join();
    return total;
}
