// Mamba-2 token by token: convolution and silu, time step and decay, state update and output, skip, gate, norm, between
// its two projections or with them. See mamba2.py; shapes as there, and R rows (sequences) of T tokens each.
//
// A token costs 5 operations for each number of the state, whichever way it is computed; what makes them fast is where
// the state lies. So a few tokens are prepared at a time, and then for each head the state is taken a piece at a time
// that stays in the first cache while these tokens pass over it.
#include <algorithm>
#include <memory>
#include <vector>

#include "common.h"
#include "products.h"

namespace {

// mamba2.py has the same
struct Mamba2 {
    int64_t hidden, H, P, G, N, W, norm_groups;
    double eps, dt_least, dt_most;
    const float *conv_weight_WC, *conv_bias_C, *dt_bias_H, *A_log_H, *D_H, *norm_weight_I;  // no bias, no norm: NULL
    const void *in_proj, *out_proj;  // packed matrices, both or neither
    Products products;

    int64_t inner() const { return H * P; }
    int64_t channels() const { return inner() + 2 * G * N; }
    int64_t projected() const { return inner() + channels() + H; }
};

constexpr int64_t CHUNK = 256;     // tokens projected at a time where the projections are ours too
constexpr int64_t TILE = 16;       // tokens prepared at a time: of one group, their B and C take half of the first cache
constexpr int64_t PIECE = 2048;    // numbers of the state in a piece, a quarter of the first cache
constexpr int64_t CHANNELS = 256;  // channels of the convolution in one task

// K <= 4 channels of one head's state [K, N] see one token: S = decay * S + u B^T, y = S C; y has room for four
template <int K>
INLINE void update(float* S, const float* B, const float* C, float decay, const float* u, float* y, int64_t N) {
    v8 ys[4] = {}, us[K], decays = all(decay);
    for (int k = 0; k < K; k++) us[k] = all(u[k]);
    by_eights(N, [&](int64_t n, int64_t count) __attribute__((always_inline)) {
        v8 b = load(B + n, count), c = load(C + n, count);
        for (int k = 0; k < K; k++) {
            v8 s = fma(us[k], b, load(S + k * N + n, count) * decays);
            store(S + k * N + n, s, count);
            ys[k] = fma(s, c, ys[k]);
        }
    });
    sums(ys[0], ys[1], ys[2], ys[3], y);
}

// One task of the convolution: some channels of one row. Its tail is moved on too.
void convolve(const float* input, int64_t stride, float* tail, const float* weight, const float* bias, float* output,
              int64_t T, int64_t C, int64_t W, int64_t from, int64_t to) {
    auto token = [&](int64_t t) { return t < 0 ? tail + (W - 1 + t) * C : input + t * stride; };
    for (int64_t t = 0; t < T; t++)
        by_eights(to - from, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            int64_t c = from + i;
            v8 x = bias ? load(bias + c, count) : all(0);
            for (int64_t w = 0; w < W; w++)
                x = fma(load(token(t - (W - 1) + w) + c, count), load(weight + w * C + c, count), x);
            store(output + t * C + c, silu(x), count);
        });
    for (int64_t w = 0; w < W - 1; w++)  // from the oldest on, so that nothing is overwritten before it is read
        memmove(tail + w * C + from, token(T - (W - 1) + w) + from, (to - from) * sizeof(float));
}

// projected [R, T, I + C + H]: z, then x, B and C, then dt; conv and ssm: for each row the address of its tail
// [W - 1, C] and of its state [H, P, N], both updated; y [R, T, I]
void mix(const Mamba2& m, const float* projected, float* const* conv, float* const* ssm, float* y, int64_t R, int64_t T,
         int64_t threads) {
    const int64_t H = m.H, P = m.P, G = m.G, N = m.N, W = m.W;
    const int64_t I = m.inner(), C = m.channels(), stride = m.projected();
    const int64_t tile = std::min(T, TILE), rows = std::max<int64_t>(4, PIECE / N / 4 * 4);
    const int64_t blocks = (C + CHANNELS - 1) / CHANNELS;
    thread_local std::vector<float> room;  // of the calling thread; the others work in it
    room.resize(R * tile * (C + 2 * H));
    float* const xBCs = room.data();
    float* const dts = xBCs + R * tile * C;
    float* const decays = dts + R * tile * H;

    const auto convolution = [&](int64_t task, int64_t start, int64_t length) {
        const int64_t r = task / blocks, from = task % blocks * CHANNELS;
        convolve(projected + (r * T + start) * stride + I, stride, conv[r], m.conv_weight_WC, m.conv_bias_C,
                 xBCs + r * tile * C, length, C, W, from, std::min(C, from + CHANNELS));
    };
    const auto steps = [&](int64_t r, int64_t start, int64_t t) {
        const int64_t at = (r * tile + t) * H;
        const float* raw = projected + (r * T + start + t) * stride + I + C;
        by_eights(H, [&](int64_t h, int64_t count) __attribute__((always_inline)) {
            v8 dt = softplus(load(raw + h, count) + load(m.dt_bias_H + h, count));
            dt = dt < float(m.dt_least) ? all(float(m.dt_least)) : dt > float(m.dt_most) ? all(float(m.dt_most)) : dt;
            store(dts + at + h, dt, count);
            store(decays + at + h, exp(-(dt * exp(load(m.A_log_H + h, count)))), count);
        });
    };

    for (int64_t start = 0; start < T; start += tile) {
        const int64_t length = std::min(tile, T - start);

        parallel(threads, R * blocks, length * CHANNELS * (W + 4), [&](int64_t task, int64_t end) {
            for (; task < end; task++) {
                convolution(task, start, length);
                if (task % blocks == 0)
                    for (int64_t t = 0; t < length; t++) steps(task / blocks, start, t);
            }
        });

        parallel(threads, R * H, length * P * N, [&](int64_t task, int64_t last) {
            for (; task < last; task++) {
                const int64_t r = task / H, h = task % H, g = h / (H / G);
                for (int64_t piece = 0; piece < P; piece += rows)
                    for (int64_t t = 0; t < length; t++) {
                        const int64_t at = r * tile + t, end = std::min(P, piece + rows);
                        const float* x = xBCs + at * C + h * P;
                        const float *Bs = xBCs + at * C + I + g * N, *Cs = Bs + G * N;
                        const float* z = projected + (r * T + start + t) * stride + h * P;
                        const float dt = dts[at * H + h], decay = decays[at * H + h];
                        float* out = y + (r * T + start + t) * I + h * P;
                        float* S = ssm[r] + h * P * N;
                        // the next token's lie too far off for the processor to foresee
                        __builtin_prefetch(x + C + piece);
                        __builtin_prefetch(z + stride + piece);
                        __builtin_prefetch(out + I + piece, 1);
                        for (int64_t p = piece; p < end; p += 4) {
                            float u[4] = {}, ys[4];
                            const int64_t count = std::min<int64_t>(4, end - p);
                            for (int64_t k = 0; k < count; k++) u[k] = dt * x[p + k];
                            if (count == 4) update<4>(S + p * N, Bs, Cs, decay, u, ys, N);
                            else if (count == 3) update<3>(S + p * N, Bs, Cs, decay, u, ys, N);
                            else if (count == 2) update<2>(S + p * N, Bs, Cs, decay, u, ys, N);
                            else update<1>(S + p * N, Bs, Cs, decay, u, ys, N);
                            memcpy(out + p, ys, count * sizeof(float));
                        }
                        by_eights(end - piece, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                            const int64_t p = piece + i;
                            v8 skipped = fma(load(x + p, count), all(m.D_H[h]), load(out + p, count));
                            store(out + p, skipped * silu(load(z + p, count)), count);
                        });
                    }
            }
        });

        if (!m.norm_weight_I) continue;
        parallel(threads, R * length, 2 * I, [&](int64_t task, int64_t end) {
            for (; task < end; task++) {
                const int64_t r = task / length, t = task % length, X = I / m.norm_groups;
                for (int64_t g = 0; g < m.norm_groups; g++) {
                    float* part = y + (r * T + start + t) * I + g * X;
                    const v8 scale = all(inverse_rms(part, X, float(m.eps)));
                    by_eights(X, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                        store(part + i, load(part + i, count) * scale * load(m.norm_weight_I + g * X + i, count), count);
                    });
                }
            }
        });
    }
}

// The layer from its input x [R, T, D] to out [R, T, D]
void run(const Mamba2& m, const float* x, float* const* conv, float* const* ssm, float* out, int64_t R, int64_t T,
         int64_t threads) {
    const int64_t chunk = R == 1 ? std::min(T, CHUNK) : T;
    std::unique_ptr<float[]> projected(new float[R * chunk * m.projected()]), y(new float[R * chunk * m.inner()]);
    for (int64_t start = 0; start < T; start += chunk) {
        const int64_t length = std::min(chunk, T - start), tokens = R * length;
        m.products.linear(m.in_proj, x + start * m.hidden, tokens, projected.get(), threads);
        mix(m, projected.get(), conv, ssm, y.get(), R, length, threads);
        m.products.linear(m.out_proj, y.get(), tokens, out + start * m.hidden, threads);
    }
}

}  // namespace

// Packed: the layer, x and out [R, T, D]. Else what lies between the projections, x [R, T, I + C + H] and out [R, T, I].
extern "C" int64_t mamba2(int64_t threads, const void* mixer, const float* x, float* const* conv, float* const* ssm,
                          float* out, int64_t R, int64_t T) {
    const Mamba2& m = *static_cast<const Mamba2*>(mixer);
    return guarded([&] {
        if (m.in_proj) run(m, x, conv, ssm, out, R, T, threads);
        else mix(m, x, conv, ssm, out, R, T, threads);
    });
}
