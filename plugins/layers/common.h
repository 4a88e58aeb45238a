// Vectors of eight floats and the functions the layers share.
//
// Every element goes through the same vector instructions, the last few of a row in a vector padded with zeros, and
// sums over a row always run in the same order. So no result depends on where a vector ends or a thread begins.
// Products and sums are fused only where fma() says so: libraries are compiled with -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The pool of threads of tryplicity.kernels (parallel.h), or one thread where nobody has told of it
typedef int Loop(const void* f, int64_t from, int64_t to);
extern int (*share_loop)(int32_t threads, int64_t n, int64_t grain, Loop* run, const void* f);

#define INLINE static inline __attribute__((always_inline))

constexpr int64_t LANES = 8;
typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef float v8_anywhere __attribute__((vector_size(32), aligned(4), may_alias));

INLINE v8 all(float x) { return v8{x, x, x, x, x, x, x, x}; }

INLINE v8 load(const float* p) { return *(const v8_anywhere*)p; }

INLINE void store(float* p, v8 x) { *(v8_anywhere*)p = x; }

// the first `count` <= 8 floats, zeros behind them
INLINE v8 load(const float* p, int64_t count) {
    if (count >= LANES) return load(p);
    v8 x = all(0);
    memcpy(&x, p, count * sizeof(float));
    return x;
}

INLINE void store(float* p, v8 x, int64_t count) {
    if (count >= LANES) store(p, x);
    else memcpy(p, &x, count * sizeof(float));
}

// a * b + c, rounded once
INLINE v8 fma(v8 a, v8 b, v8 c) {
#if defined(__AVX2__) && defined(__FMA__)
    return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    v8 r;
    for (int i = 0; i < LANES; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#else
    return a * b + c;
#endif
}

// f(i, count) for each eight of n elements, `count` being fewer than eight only in the last
template <class F>
INLINE void by_eights(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, LANES);
    if (i < n) f(i, n - i);
}

// the sums of four vectors
INLINE void sums(v8 a, v8 b, v8 c, v8 d, float* out) {
#if defined(__AVX2__)
    __m256 x = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
#else
    const v8 x[4] = {a, b, c, d};
    for (int k = 0; k < 4; k++)
        out[k] = ((x[k][0] + x[k][1]) + (x[k][2] + x[k][3])) + ((x[k][4] + x[k][5]) + (x[k][6] + x[k][7]));
#endif
}

INLINE float sum(v8 x) {
    float out[4];
    sums(x, x, x, x, out);
    return out[0];
}

INLINE float dot(const float* a, const float* b, int64_t n) {
    v8 s0 = all(0), s1 = all(0), s2 = all(0), s3 = all(0);
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        s0 = fma(load(a + i), load(b + i), s0);
        s1 = fma(load(a + i + 8), load(b + i + 8), s1);
        s2 = fma(load(a + i + 16), load(b + i + 16), s2);
        s3 = fma(load(a + i + 24), load(b + i + 24), s3);
    }
    for (; i < n; i += LANES) s0 = fma(load(a + i, n - i), load(b + i, n - i), s0);
    return sum((s0 + s1) + (s2 + s3));
}

// 1 / sqrt(mean(x^2) + eps)
INLINE float inverse_rms(const float* x, int64_t n, float eps) { return 1.0f / std::sqrt(dot(x, x, n) / n + eps); }

// to 2 units in the last place over all of fp32, gradual underflow, infinity and NaN included
INLINE v8 exp(v8 x) {
    // NaN stays, as every comparison with it is false
    x = x > 89.0f ? all(89.0f) : x;
    x = x < -104.0f ? all(-104.0f) : x;
    const v8 magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    v8 shifted = fma(x, all(1.44269504088896341f), magic), n = shifted - magic;
    v8 r = fma(n, all(-0.693359375f), x);  // ln 2 in two parts, the first of few enough bits for an exact product
    r = fma(n, all(2.12194440e-4f), r);
    v8 p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    v8i exponent = (v8i)shifted - (v8i)magic, half = exponent >> 1;  // 2^n in two steps: n reaches 129 and -150
    return p * (v8)((half + 127) << 23) * (v8)((exponent - half + 127) << 23);
}

// log(1 + x) for 0 <= x <= 1, from 2 artanh(x / (2 + x)): exact to rounding for the smallest x too
INLINE v8 log1p_unit(v8 x) {
    v8 s = x / (x + 2.0f), s2 = s * s;
    v8 p = all(2.0f / 15);
    p = fma(p, s2, all(2.0f / 13));
    p = fma(p, s2, all(2.0f / 11));
    p = fma(p, s2, all(2.0f / 9));
    p = fma(p, s2, all(2.0f / 7));
    p = fma(p, s2, all(2.0f / 5));
    p = fma(p, s2, all(2.0f / 3));
    return fma(p * s2, s, 2.0f * s);
}

// log(1 + exp(x))
INLINE v8 softplus(v8 x) {
    v8 away = x > 0.0f ? -x : x;
    return (x > 0.0f ? x : all(0)) + log1p_unit(exp(away));
}

INLINE v8 sigmoid(v8 x) { return 1.0f / (exp(-x) + 1.0f); }
INLINE v8 silu(v8 x) { return x / (exp(-x) + 1.0f); }

INLINE v8 tanh(v8 x) {
    v8 x2 = x * x, away = x > 0.0f ? -2.0f * x : 2.0f * x, e = exp(away);
    v8 big = (1.0f - e) / (1.0f + e);
    v8 p = all(-5.70498872745e-3f);  // near zero 1 - e would cancel
    p = fma(p, x2, all(2.06390887954e-2f));
    p = fma(p, x2, all(-5.37397155531e-2f));
    p = fma(p, x2, all(1.33314422036e-1f));
    p = fma(p, x2, all(-3.33332819422e-1f));
    p = fma(p * x2, x, x);
    return away > -1.25f ? p : (x > 0.0f ? big : -big);
}

// Floats touched or multiplied, roughly, that are worth handing to another thread
constexpr int64_t WORTH = 1 << 15;

// What f does, and 0; 1 where memory ran out: nothing is thrown into C, or into another library.
template <class F>
inline int64_t guarded(const F& f) {
    try {
        f();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// f(from, to) for parts of [0, n), shared by at most so many threads; `each` is the work of one item
template <class F>
inline void parallel(int64_t threads, int64_t n, int64_t each, const F& f) {
    if (threads > 1 && n > 1 && n * each >= 2 * WORTH) {
        const int problem = share_loop(static_cast<int32_t>(threads), n, each < WORTH ? WORTH / (each > 0 ? each : 1) : 1,
                                       [](const void* of, int64_t from, int64_t to) {
            return static_cast<int>(guarded([&] { (*static_cast<const F*>(of))(from, to); }));
        }, &f);
        if (problem) throw std::bad_alloc();
    } else if (n > 0) {
        f(int64_t(0), n);
    }
}
