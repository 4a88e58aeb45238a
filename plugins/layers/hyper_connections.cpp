// Hyper-connections around a sub-layer. See hyper_connections.py; shapes as there.
#include "common.h"

namespace {

// out = sum over streams i of factors[i * step] * streams[i]
INLINE v8 mixed(const float* streams_SD, const float* factors, int64_t step, int64_t S, int64_t D, int64_t d,
                int64_t count) {
    v8 x = load(streams_SD + d, count) * all(factors[0]);
    for (int64_t i = 1; i < S; i++) x = fma(load(streams_SD + i * D + d, count), all(factors[i * step]), x);
    return x;
}

}  // namespace

// streams [N, S, D] -> coefficients [N, S, S + 2] and what the sub-layer reads, x [N, D]. weight_WD and scale (of what
// is read or kept, of what is taken) are NULL where the coefficients are static.
extern "C" int64_t hyper_connections_read(int64_t threads, const float* streams_NSD, const float* static_SW,
                                          const float* weight_WD, const float* scale, float* coefficients_NSW,
                                          float* x_ND, int64_t N, int64_t S, int64_t D, float eps) {
    const int64_t W = S + 2;
    return guarded([&] { parallel(threads, N, S * W * D, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const float* streams = streams_NSD + n * S * D;
            float* coefficients = coefficients_NSW + n * S * W;
            if (weight_WD) {
                for (int64_t i = 0; i < S; i++) {
                    const float* stream = streams + i * D;
                    const float rstd = inverse_rms(stream, D, eps);
                    for (int64_t w = 0; w < W; w++) coefficients[i * W + w] = dot(stream, weight_WD + w * D, D) * rstd;
                }
                by_eights(S * W, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    v8 scales;
                    for (int64_t k = 0; k < LANES; k++) scales[k] = scale[(i + k) % W == W - 1];
                    v8 moved = fma(scales, tanh(load(coefficients + i, count)), load(static_SW + i, count));
                    store(coefficients + i, moved, count);
                });
            } else {
                memcpy(coefficients, static_SW, S * W * sizeof(float));
            }
            by_eights(D, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
                store(x_ND + n * D + d, mixed(streams, coefficients, W, S, D, d, count), count);
            });
        }
    }); });
}

// The streams after the sub-layer gave y [N, D]: what passes by it plus what each stream takes, out [N, S, D]
extern "C" int64_t hyper_connections_write(int64_t threads, const float* streams_NSD, const float* coefficients_NSW,
                                           const float* y_ND, float* out_NSD, int64_t N, int64_t S, int64_t D) {
    const int64_t W = S + 2;
    return guarded([&] { parallel(threads, N, S * (S + 1) * D, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const float *streams = streams_NSD + n * S * D, *coefficients = coefficients_NSW + n * S * W;
            by_eights(D, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
                const v8 y = load(y_ND + n * D + d, count);
                for (int64_t j = 0; j < S; j++) {
                    const v8 kept = mixed(streams, coefficients + 1 + j, W, S, D, d, count);
                    store(out_NSD + (n * S + j) * D + d, fma(y, all(coefficients[j * W + W - 1]), kept), count);
                }
            });
        }
    }); });
}
