// The elementwise part of the chunked scan, between its matrix products. See fused.py and ssd.py.
//
// Shapes: n chunks, Q tokens of one (L as target, S as source), H heads, G groups, R heads a group, P head dim. The mask
// is lower triangular, so that of each row only what stands before its own token is computed.
#include "common.h"

#include <algorithm>
#include <vector>

struct Chunks {
    int64_t n, Q, H, G, masks;         // masks: one for all chunks, or one for each (n)
    const float *cum, *scores, *mask;  // cum [n, H, Q]; scores C B^T [n, G, L, S]; mask [masks, L, S]
};

// exp(min(cum_L - cum_S, 0))
INLINE v8 decay(float here, const float* cum, int64_t i, int64_t count) {
    v8 x = here - load(cum + i, count);
    return exp(x > 0.0f ? all(0) : x);
}

// M = decay * scores * mask, [n, H, L, S]
extern "C" int64_t scan_mixing(int64_t threads, const Chunks* of, float* M) {
    const Chunks& c = *of;
    const int64_t QQ = c.Q * c.Q, R = c.H / c.G;
    return guarded([&] { parallel(threads, c.n * c.H, 8 * QQ, [&](int64_t item, int64_t end) {
        for (; item < end; item++) {
            const int64_t n = item / c.H, h = item % c.H;
            const float *cum = c.cum + item * c.Q, *scores = c.scores + (n * c.G + h / R) * QQ;
            const float* mask = c.mask + (c.masks > 1 ? n * QQ : 0);
            for (int64_t L = 0; L < c.Q; L++) {
                float* row = M + item * QQ + L * c.Q;
                by_eights(L + 1, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    v8 m = load(scores + L * c.Q + i, count) * load(mask + L * c.Q + i, count);
                    store(row + i, decay(cum[L], cum, i, count) * m, count);
                });
                memset(row + L + 1, 0, (c.Q - L - 1) * sizeof(float));
            }
        }
    }); });
}

// dM [n, H, L, S] is what M's gradient is, and M itself afterwards; dscores [n, G, L, S]; dcum [n, L, H]: of the decay from
// S to L as a difference of two sums, none from a token to itself
extern "C" int64_t scan_mixing_backward(int64_t threads, const Chunks* of, float* dM, float* dscores, float* dcum) {
    const Chunks& c = *of;
    const int64_t Q = c.Q, QQ = Q * Q, R = c.H / c.G;
    return guarded([&] { parallel(threads, c.n * c.G, 16 * R * QQ, [&](int64_t item, int64_t end) {
        std::vector<float> come(Q);  // what flows into each source
        for (; item < end; item++) {
            const int64_t n = item / c.G, g = item % c.G;
            const float *scores = c.scores + item * QQ, *mask = c.mask + (c.masks > 1 ? n * QQ : 0);
            float* ds = dscores + item * QQ;
            for (int64_t r = 0; r < R; r++) {
                const int64_t h = g * R + r;
                const float* cum = c.cum + (n * c.H + h) * Q;
                float *dm = dM + (n * c.H + h) * QQ, *out = dcum + n * Q * c.H + h;
                std::fill(come.begin(), come.end(), 0.0f);
                for (int64_t L = 0; L < Q; L++) {
                    v8 left = all(0);
                    by_eights(L + 1, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                        const int64_t at = L * Q + i;
                        v8 keep = load(mask + at, count), m = decay(cum[L], cum, i, count);
                        v8 d = load(dm + at, count) * m * keep, flow = d * load(scores + at, count);
                        store(ds + at, r == 0 ? d : load(ds + at, count) + d, count);
                        store(dm + at, m * load(scores + at, count) * keep, count);
                        if (i + count > L)  // the token itself
                            for (int64_t k = 0; k < count; k++) flow[k] = i + k == L ? 0.0f : flow[k];
                        left += flow;
                        store(come.data() + i, load(come.data() + i, count) + flow, count);
                    });
                    out[L * c.H] = sum(left);
                    memset(dm + L * Q + L + 1, 0, (Q - L - 1) * sizeof(float));
                    if (r == 0) memset(ds + L * Q + L + 1, 0, (Q - L - 1) * sizeof(float));
                }
                for (int64_t S = 0; S < Q; S++) out[S * c.H] -= come[S];
            }
        }
    }); });
}

struct Rows {
    int64_t n, Q, H, G, P;
    const float *x, *dy, *before;     // [n, Q, H, P]
    const float *inside, *dxo;        // [n, H, Q, P]; [n, G, Q, R P]
    const float *dt, *into, *out;     // [n, Q, H]
    float *dx, *ddt, *dcum, *flow;    // dx [n, Q, H, P]; else [n, Q, H]; dcum is added to
};

// What a token's gradients are when the products are done: dx = (inside + dxo * out) * dt; ddt = x . inside + x . dxo * out;
// flow = x . dxo * out * dt; dcum += before . dy * into - flow
extern "C" int64_t scan_rows_backward(int64_t threads, const Rows* of) {
    const Rows& c = *of;
    const int64_t R = c.H / c.G, P = c.P;
    return guarded([&] { parallel(threads, c.n * c.Q, 12 * c.H * P, [&](int64_t item, int64_t end) {
        for (; item < end; item++) {
            const int64_t n = item / c.Q, q = item % c.Q;
            for (int64_t h = 0; h < c.H; h++) {
                const int64_t at = item * c.H + h, g = h / R;
                const float *x = c.x + at * P, *dy = c.dy + at * P, *before = c.before + at * P;
                const float* inside = c.inside + ((n * c.H + h) * c.Q + q) * P;
                const float* dxo = c.dxo + ((n * c.G + g) * c.Q + q) * R * P + (h - g * R) * P;
                const float dt = c.dt[at], out = c.out[at];
                v8 from_inside = all(0), from_states = all(0), to_states = all(0);
                by_eights(P, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                    v8 xi = load(x + i, count), in = load(inside + i, count), o = load(dxo + i, count);
                    from_inside = fma(xi, in, from_inside);
                    to_states = fma(xi, o, to_states);
                    from_states = fma(load(before + i, count), load(dy + i, count), from_states);
                    store(c.dx + at * P + i, fma(o, all(out), in) * dt, count);
                });
                float totals[4];
                sums(from_inside, from_states, to_states, to_states, totals);
                const float states = totals[2] * out;
                c.ddt[at] = totals[0] + states;
                c.flow[at] = states * dt;
                c.dcum[at] += totals[1] * c.into[at] - c.flow[at];
            }
        }
    }); });
}
