// Which experts a token goes to, and the gated product between an expert's two matrices.
//
// Shapes: N tokens, D hidden, E experts, K the most experts of a token, S rows, F neurons.

#include <algorithm>
#include <functional>
#include <vector>

#include "common.h"
#include "products.h"

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

struct Router {
    int64_t hidden, experts, most, softmax, normalize, groups, groups_kept, group_best;
    const float *weight_ED, *bias_E;
    const float* similarity_EE;  // of `lateral_inhibition`, else NULL
    const float *difficulty_D, *offset;  // of `dynamic_sparsity`, else NULL
    float strength, least, span, scale;
};

// -inf for the experts of groups that are not among the best, by the sum of a group's best; the first of equals wins
void keep_groups(const Router& router, float* standing_E) {
    const int64_t G = router.groups, X = router.experts / G;
    static thread_local std::vector<float> sums, best;
    sums.assign(G, 0);
    for (int64_t g = 0; g < G; ++g) {
        best.assign(standing_E + g * X, standing_E + (g + 1) * X);
        std::partial_sort(best.begin(), best.begin() + router.group_best, best.end(), std::greater<float>());
        for (int64_t i = 0; i < router.group_best; ++i) sums[g] += best[i];
    }
    for (int64_t kept = 0; kept < router.groups_kept; ++kept)
        *std::max_element(sums.begin(), sums.end()) = -INFINITY;
    for (int64_t g = 0; g < G; ++g)
        if (sums[g] != -INFINITY) std::fill_n(standing_E + g * X, X, -INFINITY);
}

// Pairs of a token, an expert and its weight, in the order of the tokens and of their experts' standing: `most` for a
// token, with `difficulty` as many as have a gate above zero. Room for most * N of each; gives their number.
int64_t choose(const Router& router, const float* x, int64_t N, int64_t* row_S, int64_t* expert_S, float* weight_S,
               int64_t threads) {
    const int64_t D = router.hidden, E = router.experts, K = router.most;
    std::vector<int64_t> used(N);
    std::vector<float> scores(N * E), standings(N * E);
    parallel(threads, N * E, D, [&](int64_t i, int64_t end) {
        for (; i < end; ++i) scores[i] = dot(x + i / E * D, router.weight_ED + i % E * D, D);
    });
    parallel(threads, N, E * (K + 8) + D, [&](int64_t n, int64_t last) {
        for (; n < last; ++n) {
            float *score = scores.data() + n * E, *standing = standings.data() + n * E;
            to_scores(score, E, router.softmax);
            for (int64_t e = 0; e < E; ++e) standing[e] = score[e] + router.bias_E[e];
            if (router.groups > 1) keep_groups(router, standing);
            float kappa = static_cast<float>(K), total = 0;
            if (router.difficulty_D) {
                const float level = 0.5f + (dot(x + n * D, router.difficulty_D, D) + *router.offset) / 4;
                kappa = router.least + router.span * (level < 0 ? 0 : level > 1 ? 1 : level);
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
                if (router.similarity_EE)
                    for (int64_t e = 0; e < E; ++e)
                        standing[e] -= router.strength * score[best] * router.similarity_EE[best * E + e];
                standing[best] = -INFINITY;
            }
            if (router.normalize)
                for (int64_t i = 0; i < k; ++i) weight_S[n * K + i] /= total + 1e-20f;
            for (int64_t i = 0; i < k; ++i) weight_S[n * K + i] *= router.scale;
            used[n] = k;
        }
    });
    int64_t end = 0;  // close the gaps that unused slots left
    for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < used[n]; ++k, ++end) {
            row_S[end] = row_S[n * K + k];
            expert_S[end] = expert_S[n * K + k];
            weight_S[end] = weight_S[n * K + k];
        }
    return end;
}

enum Kind { SILU, GELU, RELU2, SPIKE };

struct Gate {
    int64_t kind;
    const float *threshold, *offset;  // of SPIKE: [F], or [groups, F]
    int64_t grouped;
};

// y [S, F] = activation(gate) * up of rows [S, 2 F], first gate, then up; or activation(gate) of rows [S, F]
void gated_product(const Gate& activation, const float* gate_up, int64_t S, int64_t F, const int64_t* group_S,
                   float* y, int64_t threads, bool gated = true) {
    parallel(threads, S, F * 8, [&](int64_t s, int64_t end) {
        for (; s < end; ++s) {
            const float *gate = gate_up + s * (gated ? 2 * F : F), *up = gate + F;
            float* out = y + s * F;
            const auto product = [&](auto of) __attribute__((always_inline)) {
                by_eights(F, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    const v8 y = of(load(gate + i, count), i, count);
                    store(out + i, gated ? y * load(up + i, count) : y, count);
                });
            };
            if (activation.kind == SILU) product([](v8 x, int64_t, int64_t) { return silu(x); });
            if (activation.kind == GELU) product([](v8 x, int64_t, int64_t) { return gelu(x); });
            if (activation.kind == RELU2) product([](v8 x, int64_t, int64_t) { return relu2(x); });
            if (activation.kind == SPIKE) {
                const int64_t first = activation.grouped ? group_S[s] * F : 0;
                product([&](v8 x, int64_t i, int64_t count) __attribute__((always_inline)) {
                    const v8 least = load(activation.threshold + first + i, count)
                                   + load(activation.offset + first + i, count);
                    return x > least ? x : all(0);
                });
            }
        }
    });
}

struct GatedMLP {
    int64_t hidden, inner;
    Gate activation;
    const void *gate_up, *down;
    Products products;
};

struct Mixture {
    Router router;
    Gate activation;
    int64_t inner;
    const void *gate_up, *down;
    GatedMLP shared;  // of inner 0 where there is none
};

float* room(int64_t which, int64_t count) {  // kept from call to call
    static thread_local std::vector<float> rooms[4];
    if (static_cast<int64_t>(rooms[which].size()) < count) rooms[which].resize(count);
    return rooms[which].data();
}

void run(const GatedMLP& mlp, const float* x, int64_t N, float* out, int64_t threads) {
    const int64_t F = mlp.inner;
    float *gate_up = room(0, N * 2 * F), *h = room(1, N * F);
    mlp.products.linear(mlp.gate_up, x, N, gate_up, threads);
    gated_product(mlp.activation, gate_up, N, F, nullptr, h, threads);
    mlp.products.linear(mlp.down, h, N, out, threads);
}

void run(const Mixture& moe, const float* x, int64_t N, float* out, int64_t threads) {
    static thread_local std::vector<int64_t> rows, experts;
    const int64_t D = moe.router.hidden, F = moe.inner, most = N * moe.router.most;
    const Products& products = moe.shared.products;
    if (static_cast<int64_t>(rows.size()) < most) {
        rows.resize(most);
        experts.resize(most);
    }
    if (moe.shared.inner) {
        run(moe.shared, x, N, out, threads);
    } else {
        for (int64_t i = 0; i < N * D; ++i) out[i] = 0;
    }
    float* weights = room(2, most);
    const int64_t S = choose(moe.router, x, N, rows.data(), experts.data(), weights, threads);
    float *gate_up = room(0, S * 2 * F), *h = room(1, S * F);
    products.experts(moe.gate_up, x, N, rows.data(), experts.data(), S, gate_up, threads);
    gated_product(moe.activation, gate_up, S, F, experts.data(), h, threads);
    products.add_experts(moe.down, h, experts.data(), S, room(3, S * D), weights, rows.data(), out, N, threads);
}

}  // namespace

// What a router of this project chooses for x [N, D]; count: of the pairs.
extern "C" int64_t route(int64_t threads, const void* router, const float* x, int64_t N, int64_t* row_S,
                         int64_t* expert_S, float* weight_S, int64_t* count) {
    return guarded([&] {
        *count = choose(*static_cast<const Router*>(router), x, N, row_S, expert_S, weight_S, threads);
    });
}

// activation(gate) * up of rows [S, 2 F], or activation(gate) of rows [S, F], each with its group's thresholds.
extern "C" int64_t activated(int64_t threads, const void* activation, const float* first, int64_t S, int64_t F,
                             int64_t gated, const int64_t* group_S, float* y) {
    return guarded([&] {
        gated_product(*static_cast<const Gate*>(activation), first, S, F, group_S, y, threads, gated);
    });
}

// A whole feed-forward with ternary weights: out [N, D] of x [N, D].
extern "C" int64_t gated_mlp(int64_t threads, const void* mlp, const float* x, int64_t N, float* out) {
    return guarded([&] { run(*static_cast<const GatedMLP*>(mlp), x, N, out, threads); });
}

extern "C" int64_t mixture_of_experts(int64_t threads, const void* moe, const float* x, int64_t N, float* out) {
    return guarded([&] { run(*static_cast<const Mixture*>(moe), x, N, out, threads); });
}
