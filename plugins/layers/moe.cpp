// Which experts a token goes to, and the gated product between an expert's two matrices.
//
// Shapes: N tokens, D hidden, E experts, K the most experts of a token, S rows, F neurons.

#include "common.h"

#include <vector>

namespace {

// sigmoid (or softmax) of the E logits, in place
void to_scores(float* score, int64_t E, bool softmax) {
    if (!softmax) {
        by_eights(E, [&](int64_t i, int64_t count) { store(score + i, sigmoid(load(score + i, count)), count); });
        return;
    }
    float most = score[0], total = 0;
    for (int64_t e = 1; e < E; ++e) most = score[e] > most ? score[e] : most;
    by_eights(E, [&](int64_t i, int64_t count) { store(score + i, exp(load(score + i, count) - most), count); });
    for (int64_t e = 0; e < E; ++e) total += score[e];
    for (int64_t e = 0; e < E; ++e) score[e] /= total;
}

// erfc(z) for z >= 0, to about 1e-7 of its value even where that is small (Press et al., Numerical Recipes, 6.2)
INLINE v8 erfc_positive(v8 z) {
    const v8 t = 1.0f / fma(z, all(0.5f), all(1.0f));
    v8 p = all(0.17087277f);
    p = fma(p, t, all(-0.82215223f));
    p = fma(p, t, all(1.48851587f));
    p = fma(p, t, all(-1.13520398f));
    p = fma(p, t, all(0.27886807f));
    p = fma(p, t, all(-0.18628806f));
    p = fma(p, t, all(0.09678418f));
    p = fma(p, t, all(0.37409196f));
    p = fma(p, t, all(1.00002368f));
    p = fma(p, t, all(-1.26551223f));
    return t * exp(p - z * z);
}

INLINE v8 gelu(v8 x) {
    const v8 away = x > 0.0f ? x : -x, tail = 0.5f * erfc_positive(away * 0.70710678118654752f);
    return x * (x > 0.0f ? 1.0f - tail : tail);
}

INLINE v8 relu2(v8 x) {
    const v8 positive = x < 0.0f ? all(0) : x;
    return positive * positive;
}

}  // namespace

// The choice of `top_k`, `lateral_inhibition` (similarity [E, E], else NULL) and `dynamic_sparsity` (difficulty [D],
// else NULL) routers for tokens x [N, D]: pairs of a token, an expert and its weight, in the order of the tokens and of
// their experts' standing; a token has K of them, with `difficulty` as many as have a gate above zero. count: of pairs.
extern "C" void route(const float* x, const float* weight_ED, const float* bias_E, int64_t N, int64_t D, int64_t E,
                      int64_t K, int64_t softmax, int64_t normalize, const float* similarity_EE, float strength,
                      const float* difficulty_D, const float* offset, float least, float span,
                      int64_t* row_S, int64_t* expert_S, float* weight_S, int64_t* count) {
    std::vector<int64_t> used(N);
#pragma omp parallel num_threads(threads_for(N * E * D)) if (threads_for(N * E * D) > 1)
    {
        std::vector<float> score(E), standing(E);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n) {
            const float* token = x + n * D;
            for (int64_t e = 0; e < E; ++e) score[e] = dot(token, weight_ED + e * D, D);
            to_scores(score.data(), E, softmax);
            for (int64_t e = 0; e < E; ++e) standing[e] = score[e] + bias_E[e];
            float kappa = static_cast<float>(K), total = 0;
            if (difficulty_D) {
                const float level = 0.5f + (dot(token, difficulty_D, D) + *offset) / 4;
                kappa = least + span * (level < 0 ? 0 : level > 1 ? 1 : level);
            }
            int64_t k = 0;
            for (; k < K && kappa - k > 0; ++k) {
                int64_t best = 0;
                for (int64_t e = 1; e < E; ++e)
                    if (standing[e] > standing[best]) best = e;
                const float gate = kappa - k < 1 ? kappa - k : 1;
                row_S[n * K + k] = n;
                expert_S[n * K + k] = best;
                total += weight_S[n * K + k] = score[best] * gate;
                if (similarity_EE)
                    for (int64_t e = 0; e < E; ++e)
                        standing[e] -= strength * score[best] * similarity_EE[best * E + e];
                standing[best] = -INFINITY;
            }
            if (normalize)
                for (int64_t i = 0; i < k; ++i) weight_S[n * K + i] /= total + 1e-20f;
            used[n] = k;
        }
    }
    int64_t end = 0;  // close the gaps that unused slots left
    for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < used[n]; ++k, ++end) {
            row_S[end] = row_S[n * K + k];
            expert_S[end] = expert_S[n * K + k];
            weight_S[end] = weight_S[n * K + k];
        }
    *count = end;
}

// y [S, F] = activation(gate) * up of rows [S, 2 F], first gate, then up. kind: 0 silu, 1 gelu, 2 relu squared, 3 spike:
// gate where it exceeds threshold + offset, of group_S's row (NULL: of the only one), else 0.
extern "C" void gated(const float* gate_up, int64_t S, int64_t F, int64_t kind, const float* threshold,
                      const float* offset, const int64_t* group_S, float* y) {
    const int threads = threads_for(S * F * 8);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < S; ++s) {
        const float *gate = gate_up + s * 2 * F, *up = gate + F;
        float* out = y + s * F;
        const auto product = [&](auto activation) __attribute__((always_inline)) {
            by_eights(F, [&](int64_t i, int64_t count) {
                store(out + i, activation(load(gate + i, count), i, count) * load(up + i, count), count);
            });
        };
        if (kind == 0) product([](v8 x, int64_t, int64_t) { return silu(x); });
        if (kind == 1) product([](v8 x, int64_t, int64_t) { return gelu(x); });
        if (kind == 2) product([](v8 x, int64_t, int64_t) { return relu2(x); });
        if (kind == 3) {
            const int64_t first = group_S ? group_S[s] * F : 0;
            product([&](v8 x, int64_t i, int64_t count) {
                const v8 least = load(threshold + first + i, count) + load(offset + first + i, count);
                return x > least ? x : all(0);
            });
        }
    }
}
