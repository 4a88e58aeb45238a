// RMS norm of rows. See norms.py.
#include "common.h"

// y = x / sqrt(mean(x^2) + eps) * weight, x and y [N, D]
extern "C" int64_t rms_norm(int64_t threads, const float* x_ND, const float* weight_D, float* y_ND, int64_t N,
                            int64_t D, float eps) {
    return guarded([&] { parallel(threads, N, D, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const float* x = x_ND + n * D;
            float* y = y_ND + n * D;
            v8 scale = all(inverse_rms(x, D, eps));
            by_eights(D, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                store(y + i, load(x + i, count) * scale * load(weight_D + i, count), count);
            });
        }
    }); });
}
