// The elementwise stages of training with their gradients, each in one pass over memory. See fused.py.
//
// Gradients of weights are sums over rows: each part of CHUNK rows adds up its own in order, and whoever calls adds the
// parts. So no result depends on how many threads there are.
#include "common.h"

#include <type_traits>
#include <vector>

constexpr int64_t CHUNK = 64;  // rows; fused.py knows it too
constexpr int64_t TAPS = 4;    // at most; fused.py knows it too

// f(from, to) for the rows of each part
template <class F>
inline void by_chunks(int64_t threads, int64_t rows, int64_t each, const F& f) {
    parallel(threads, (rows + CHUNK - 1) / CHUNK, CHUNK * each, [&](int64_t chunk, int64_t end) {
        for (; chunk < end; chunk++)
            f(chunk, chunk * CHUNK, chunk * CHUNK + CHUNK < rows ? chunk * CHUNK + CHUNK : rows);
    });
}

INLINE v8 silu_slope(v8 x, v8 s) { return s * (x * (1.0f - s) + 1.0f); }  // s: sigmoid(x)

// --- RMS norm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps); x, y [N, D], rstd [N] ---

extern "C" int64_t rms_norm_forward(int64_t threads, const float* x_ND, const float* weight_D, float* y_ND,
                                    float* rstd_N, int64_t N, int64_t D, float eps) {
    return guarded([&] { parallel(threads, N, D, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const float* x = x_ND + n * D;
            float* y = y_ND + n * D;
            rstd_N[n] = inverse_rms(x, D, eps);
            by_eights(D, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                store(y + i, load(x + i, count) * rstd_N[n] * load(weight_D + i, count), count);
            });
        }
    }); });
}

// dweight [chunks, D]
extern "C" int64_t rms_norm_backward(int64_t threads, const float* dy_ND, const float* x_ND, const float* weight_D,
                                     const float* rstd_N, float* dx_ND, float* dweight, int64_t N, int64_t D) {
    return guarded([&] { by_chunks(threads, N, 4 * D, [&](int64_t chunk, int64_t n, int64_t end) {
        float* dw = dweight + chunk * D;
        memset(dw, 0, D * sizeof(float));
        for (; n < end; n++) {
            const float *x = x_ND + n * D, *dy = dy_ND + n * D;
            float *dx = dx_ND + n * D, r = rstd_N[n];
            v8 along = all(0);  // how far x's own length changes
            by_eights(D, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                v8 g = load(dy + i, count) * load(x + i, count);
                along = fma(g, load(weight_D + i, count), along);
                store(dw + i, fma(g, all(r), load(dw + i, count)), count);
            });
            v8 back = all(-sum(along) * r * r * r / D), r8 = all(r);
            by_eights(D, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                store(dx + i, fma(load(x + i, count), back, load(dy + i, count) * load(weight_D + i, count) * r8), count);
            });
        }
    }); });
}

// --- silu(gate) * up of gate_up [S, 2 F]; dh [S, F] ---

extern "C" int64_t gated_silu_forward(int64_t threads, const float* gate_up, float* h_SF, int64_t S, int64_t F) {
    return guarded([&] { parallel(threads, S, 8 * F, [&](int64_t s, int64_t end) {
        for (; s < end; s++) {
            const float *gate = gate_up + 2 * s * F, *up = gate + F;
            by_eights(F, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                store(h_SF + s * F + i, silu(load(gate + i, count)) * load(up + i, count), count);
            });
        }
    }); });
}

extern "C" int64_t gated_silu_backward(int64_t threads, const float* dh_SF, const float* gate_up, float* dgate_up,
                                       int64_t S, int64_t F) {
    return guarded([&] { parallel(threads, S, 8 * F, [&](int64_t s, int64_t end) {
        for (; s < end; s++) {
            const float *gate = gate_up + 2 * s * F, *up = gate + F, *dh = dh_SF + s * F;
            float *dgate = dgate_up + 2 * s * F, *dup = dgate + F;
            by_eights(F, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                v8 g = load(gate + i, count), d = load(dh + i, count), sg = sigmoid(g);
                store(dup + i, d * g * sg, count);
                store(dgate + i, d * load(up + i, count) * silu_slope(g, sg), count);
            });
        }
    }); });
}

// --- silu of a causal convolution over time of each channel ---

struct Convolution {
    int64_t batch, time, channels, width, lead, parts;  // time: with the `lead` tokens that are only looked back on
    int64_t row, sequence;                              // steps in x from token to token, and from row to row of a batch
    const int64_t* sizes;                               // [parts], their sum is `channels`
    const float *x, *weight, *bias;                     // weight [width, channels], the last tap for the token itself
    const uint8_t* same;                                // [batch, width - 1, time]: of one document; or NULL
};

INLINE bool reaches(const Convolution& c, int64_t b, int64_t lag, int64_t t) {
    return lag <= t && (lag == 0 || c.same == nullptr || c.same[(b * (c.width - 1) + lag - 1) * c.time + t]);
}

// pre [batch, length, channels]; out: of each part [batch, length, size]
extern "C" int64_t conv_silu_forward(int64_t threads, const Convolution* of, float* pre, float* const* out) {
    const Convolution& c = *of;
    const int64_t length = c.time - c.lead;
    return guarded([&] { parallel(threads, c.batch * length, c.channels * (c.width + 8), [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const int64_t b = n / length, t = n % length + c.lead;
            const float* x = c.x + b * c.sequence + t * c.row;
            bool reached[TAPS];
            for (int64_t lag = 0; lag < c.width; lag++) reached[lag] = reaches(c, b, lag, t);
            int64_t from = 0;
            for (int64_t part = 0; part < c.parts; from += c.sizes[part], part++) {
                by_eights(c.sizes[part], [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    const int64_t at = from + i;
                    v8 sum = load(c.bias + at, count);
                    for (int64_t lag = 0; lag < c.width; lag++) {
                        if (!reached[lag]) continue;
                        const float* w = c.weight + (c.width - 1 - lag) * c.channels + at;
                        sum = fma(load(x - lag * c.row + at, count), load(w, count), sum);
                    }
                    store(pre + n * c.channels + at, sum, count);
                    store(out[part] + n * c.sizes[part] + i, silu(sum), count);
                });
            }
        }
    }); });
}

// Eight channels of one sequence, `count` of them there, walked through time with all sums in registers
template <int64_t W>
INLINE void strip_backward(const Convolution& c, int64_t b, int64_t from, int64_t count, const float* pre,
                           const float* grad, int64_t step, float* dx, float* dweight, float* dbias) {
    const float* x = c.x + b * c.sequence + from;
    v8 db = all(0), dw[W], w[W], open[W];  // open: the gradients of the last W tokens, the newest first
    for (int64_t lag = 0; lag < W; lag++) {
        dw[lag] = open[lag] = all(0);
        w[lag] = load(c.weight + (W - 1 - lag) * c.channels + from, count);
    }
    const auto written = [&](int64_t t, v8 sum) { if (t >= 0) store(dx + t * c.channels, sum, count); };
    for (int64_t t = 0; t < c.lead - W + 1; t++) written(t, all(0));
    for (int64_t t = c.lead; t < c.time; t++) {
        const int64_t l = t - c.lead;
        v8 y = load(pre + l * c.channels, count), g = load(grad + l * step, count) * silu_slope(y, sigmoid(y));
        db += g;
        for (int64_t lag = 0; lag < W; lag++) {
            if (!reaches(c, b, lag, t)) continue;
            dw[lag] = fma(g, load(x + (t - lag) * c.row, count), dw[lag]);
            open[lag] = fma(g, w[lag], open[lag]);
        }
        written(t - W + 1, open[W - 1]);  // nothing later reaches back to it
        for (int64_t lag = W - 1; lag > 0; lag--) open[lag] = open[lag - 1];
        open[0] = all(0);
    }
    for (int64_t lag = W - 1; lag > 0; lag--) written(c.time - lag, open[lag]);
    for (int64_t lag = 0; lag < W; lag++) store(dweight + (W - 1 - lag) * c.channels, dw[lag], count);
    store(dbias, db, count);
}

// dout: of each part [batch, length, size]; dx [batch, time, channels]; dweight [batch, width, channels]; dbias [batch,
// channels]
extern "C" int64_t conv_silu_backward(int64_t threads, const Convolution* of, const float* pre,
                                      const float* const* dout, float* dx, float* dweight, float* dbias) {
    const Convolution& c = *of;
    const int64_t length = c.time - c.lead;
    struct Strip { int64_t part, first, at; };  // at: where its first channel is in the part
    return guarded([&] {
        std::vector<Strip> strips;
        for (int64_t part = 0, first = 0; part < c.parts; first += c.sizes[part++])
            for (int64_t at = 0; at < c.sizes[part]; at += LANES) strips.push_back({part, first + at, at});
        const int64_t each = strips.size();
        parallel(threads, c.batch * each, LANES * c.time * (4 * c.width + 12), [&](int64_t item, int64_t end) {
            for (; item < end; item++) {
                const int64_t b = item / each;
                const Strip& s = strips[item % each];
                const int64_t size = c.sizes[s.part], count = size - s.at < LANES ? size - s.at : LANES;
                const auto run = [&](auto width) {
                    strip_backward<width.value>(
                        c, b, s.first, count, pre + b * length * c.channels + s.first, dout[s.part] + b * length * size + s.at,
                        size, dx + b * c.time * c.channels + s.first, dweight + b * c.width * c.channels + s.first,
                        dbias + b * c.channels + s.first);
                };
                switch (c.width) {
                    case 2: run(std::integral_constant<int64_t, 2>()); break;
                    case 3: run(std::integral_constant<int64_t, 3>()); break;
                    case 4: run(std::integral_constant<int64_t, 4>()); break;
                }
            }
        });
    });
}

// --- rms_norm((y + D x) * silu(z)) * weight, over each of `groups` parts of the channels ---

struct GatedNorm {
    int64_t rows, time, channels, groups;  // rows: of all sequences, `time` of each
    int64_t y_row, y_sequence, z_row, z_sequence;
    float eps;
    const float *y, *x, *D, *z, *weight;  // x contiguous; D and weight [channels]
};

extern "C" int64_t gated_norm_forward(int64_t threads, const GatedNorm* of, float* out, float* rms) {
    const GatedNorm& c = *of;
    const int64_t size = c.channels / c.groups;
    return guarded([&] { parallel(threads, c.rows, 12 * c.channels, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
            const float *y = c.y + n / c.time * c.y_sequence + n % c.time * c.y_row, *x = c.x + n * c.channels;
            const float* z = c.z + n / c.time * c.z_sequence + n % c.time * c.z_row;
            for (int64_t group = 0; group < c.groups; group++) {
                const int64_t at = group * size;
                float* o = out + n * c.channels + at;
                v8 squares = all(0);
                by_eights(size, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    v8 u = fma(load(x + at + i, count), load(c.D + at + i, count), load(y + at + i, count));
                    u = u * silu(load(z + at + i, count));
                    squares = fma(u, u, squares);
                    store(o + i, u, count);
                });
                const float r = 1.0f / std::sqrt(sum(squares) / size + c.eps);
                rms[n * c.groups + group] = r;
                by_eights(size, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    store(o + i, load(o + i, count) * r * load(c.weight + at + i, count), count);
                });
            }
        }
    }); });
}

// dy, dx, dz [rows, channels]; dD, dweight [chunks, channels]
extern "C" int64_t gated_norm_backward(int64_t threads, const GatedNorm* of, const float* dout, const float* rms,
                                       float* dy, float* dx, float* dz, float* dD, float* dweight) {
    const GatedNorm& c = *of;
    const int64_t size = c.channels / c.groups;
    return guarded([&] { by_chunks(threads, c.rows, 24 * c.channels, [&](int64_t chunk, int64_t n, int64_t end) {
        float *dD_C = dD + chunk * c.channels, *dw_C = dweight + chunk * c.channels;
        memset(dD_C, 0, c.channels * sizeof(float));
        memset(dw_C, 0, c.channels * sizeof(float));
        std::vector<float> sigmoids(size);
        for (; n < end; n++) {
            const float *y = c.y + n / c.time * c.y_sequence + n % c.time * c.y_row, *x = c.x + n * c.channels;
            const float* z = c.z + n / c.time * c.z_sequence + n % c.time * c.z_row;
            for (int64_t group = 0; group < c.groups; group++) {
                const int64_t at = group * size, to = n * c.channels + at;
                const v8 r = all(rms[n * c.groups + group]);
                v8 along = all(0);
                by_eights(size, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    v8 gate = load(z + at + i, count), s = sigmoid(gate);
                    v8 u = fma(load(x + at + i, count), load(c.D + at + i, count), load(y + at + i, count));
                    v8 t = load(dout + to + i, count) * (u * (gate * s) * r);
                    store(sigmoids.data() + i, s, count);
                    store(dw_C + at + i, load(dw_C + at + i, count) + t, count);
                    along = fma(t, load(c.weight + at + i, count), along);
                });
                const v8 back = all(-sum(along) / size);
                by_eights(size, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    v8 zi = load(z + at + i, count), s = load(sigmoids.data() + i, count), gate = zi * s;
                    v8 xi = load(x + at + i, count), D = load(c.D + at + i, count);
                    v8 u = fma(xi, D, load(y + at + i, count)), normed = u * gate * r;
                    v8 dg = fma(normed, back, load(dout + to + i, count) * load(c.weight + at + i, count)) * r;
                    store(dz + to + i, u * dg * silu_slope(zi, s), count);
                    v8 du = dg * gate;
                    store(dy + to + i, du, count);
                    store(dx + to + i, du * D, count);
                    store(dD_C + at + i, fma(du, xi, load(dD_C + at + i, count)), count);
                });
            }
        }
    }); });
}
