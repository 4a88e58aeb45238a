// Products of fp32 tokens with matrices kept row by row in fp32, bf16 or int8, a scale for each row: the unembedding,
// and linears that are kept in fewer bytes.
//
// A product is summed in 16 lanes, each over every sixteenth column in order, and the lanes then by halves. How many
// rows and tokens are worked on at once, and whether the weights come from memory as they are stored or from a panel
// that was widened to fp32 before, only decides what is done at the same time: a token has the same bits in any company.

#include "matrix.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16, LINE = 64;
constexpr int64_t FEWEST_BYTES = 16 << 10, MOST_BYTES = 256 << 10;  // of a matrix, given to a thread at a time
constexpr int64_t PANEL = 32 << 10;                                 // floats of widened rows, kept near
constexpr int64_t TILES = 2;                                        // of tokens, up to which widening does not pay
constexpr int64_t SMALL = 1 << 17;                                  // multiplications below which sharing costs more
constexpr int64_t SHARES = 4;                                       // for each thread, so that all end together

struct Bfloat {
    uint16_t bits;
};

// ---- sixteen floats ----

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 4, TILE_TOKENS = 6;  // 24 sums in 32 registers
typedef __m512 Sixteen;
inline Sixteen zeros() { return _mm512_setzero_ps(); }
inline Sixteen load(const float* p) { return _mm512_loadu_ps(p); }
inline Sixteen load(const Bfloat* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline Sixteen load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, Sixteen x) { _mm512_storeu_ps(p, x); }
inline Sixteen fma(Sixteen a, Sixteen b, Sixteen c) { return _mm512_fmadd_ps(a, b, c); }
inline __m256 eight(Sixteen x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int TILE_ROWS = 2, TILE_TOKENS = 3;  // 12 sums of half a lane each in 16 registers
struct Sixteen {
    __m256 low, high;
};
inline Sixteen zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const Bfloat* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline __m256 load8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <class V>
inline Sixteen load(const V* p) {
    return {load8(p), load8(p + 8)};
}
inline void store(float* p, Sixteen x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
inline Sixteen fma(Sixteen a, Sixteen b, Sixteen c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline __m256 eight(Sixteen x) { return _mm256_add_ps(x.low, x.high); }
#else
constexpr int TILE_ROWS = 2, TILE_TOKENS = 2;
struct Sixteen {
    float of[LANES];
};
inline float wide(float x) { return x; }
inline float wide(int8_t x) { return x; }
inline float wide(Bfloat x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline Sixteen zeros() { return {}; }
template <class V>
inline Sixteen load(const V* p) {
    Sixteen x;
    for (int i = 0; i < LANES; i++) x.of[i] = wide(p[i]);
    return x;
}
inline void store(float* p, Sixteen x) { std::memcpy(p, x.of, sizeof x.of); }
inline Sixteen fma(Sixteen a, Sixteen b, Sixteen c) {
    for (int i = 0; i < LANES; i++) c.of[i] += a.of[i] * b.of[i];
    return c;
}
#endif

// the first `count` of them, zeros behind
template <class V>
inline Sixteen load(const V* p, int64_t count) {
    V some[LANES] = {};
    std::memcpy(some, p, count * sizeof(V));
    return load(static_cast<const V*>(some));
}

// y[i] = the sum of a[i]'s lanes, by halves
inline void sums_of_four(const Sixteen* a, float* y) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    __m128 four[4];
    for (int i = 0; i < 4; i++) {
        const __m256 x = eight(a[i]);
        four[i] = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    }
    _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
    _mm_storeu_ps(y, _mm_add_ps(_mm_add_ps(four[0], four[2]), _mm_add_ps(four[1], four[3])));
#else
    for (int i = 0; i < 4; i++) {
        float lane[LANES];
        store(lane, a[i]);
        for (int width = LANES / 2; width; width /= 2)
            for (int k = 0; k < width; k++) lane[k] += lane[k + width];
        y[i] = lane[0];
    }
#endif
}

// ---- some rows by some tokens ----

// y[r * T + t] of R rows, one behind the other, and T tokens
template <int R, int T, class V>
inline __attribute__((always_inline)) void tile(const V* rows, const float* const* x, int64_t in, float* y) {
    Sixteen sum[(R * T + 3) / 4 * 4];
    for (Sixteen& s : sum) s = zeros();
    const auto add = [&](const Sixteen* w, const auto& token) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const Sixteen v = token(t);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sum[r * T + t] = fma(w[r], v, sum[r * T + t]);
        }
    };
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        Sixteen w[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (T == 1 && i * sizeof(V) % LINE == 0)  // the rows to come, too short for the processor to foresee them
                __builtin_prefetch(rows + (r + 2 * R) * in + i);
            w[r] = load(rows + r * in + i);
        }
        add(w, [&](int t) __attribute__((always_inline)) { return load(x[t] + i); });
    }
    if (i < in) {
        Sixteen w[R];
        for (int r = 0; r < R; r++) w[r] = load(rows + r * in + i, in - i);
        add(w, [&](int t) __attribute__((always_inline)) { return load(x[t] + i, in - i); });
    }
    float found[(R * T + 3) / 4 * 4];
    for (int k = 0; k < R * T; k += 4) sums_of_four(sum + k, found + k);
    std::memcpy(y, found, R * T * sizeof(float));
}

struct Tokens {
    const float* const* x;
    float* const* y;  // where each token's products go
    int64_t count;
};

struct Finish {  // of a row's sum
    const float *scale, *bias;
    float operator()(float sum, int64_t row) const {
        const float value = scale ? sum * scale[row] : sum;
        return bias ? value + bias[row] : value;
    }
};

template <int R, int T, class V>
inline void finished(const V* rows, int64_t row, const Tokens& tokens, int64_t n, int64_t in, const Finish& finish) {
    float found[R * T];
    tile<R, T>(rows, tokens.x + n, in, found);
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) tokens.y[n + t][row + r] = finish(found[r * T + t], row + r);
}

// rows [row, end), of which `rows` has the first, by T tokens from the n-th
template <int T, class V>
__attribute__((noinline)) void rows_by(const V* rows, int64_t row, int64_t end, const Tokens& tokens, int64_t n,
                                       int64_t in, const Finish& finish) {
    constexpr int R = T == 1 ? 4 : TILE_ROWS;
    for (; row + R <= end; row += R, rows += R * in) finished<R, T>(rows, row, tokens, n, in, finish);
    for (; row < end; row++, rows += in) finished<1, T>(rows, row, tokens, n, in, finish);
}

template <int T, class V>
inline void at_most(const V* rows, int64_t row, int64_t end, const Tokens& tokens, int64_t n, int64_t in,
                    const Finish& finish) {
    if constexpr (T > 0) {
        if (tokens.count - n >= T) return rows_by<T>(rows, row, end, tokens, n, in, finish);
        at_most<T - 1>(rows, row, end, tokens, n, in, finish);
    }
}

template <class V>
void by_tiles(const V* rows, int64_t row, int64_t end, const Tokens& tokens, int64_t in, const Finish& finish) {
    for (int64_t n = 0; n < tokens.count; n += TILE_TOKENS) at_most<TILE_TOKENS>(rows, row, end, tokens, n, in, finish);
}

// count numbers as floats: where they lie, if they are, else in `into`
inline const float* widened(const float* from, int64_t, std::vector<float>&) { return from; }
template <class V>
const float* widened(const V* from, int64_t count, std::vector<float>& into) {
    into.resize((count + LANES - 1) / LANES * LANES);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(into.data() + i, load(from + i));
    if (i < count) store(into.data() + i, load(from + i, count - i));
    return into.data();
}

template <class V>
void some_rows(const V* table, int64_t from, int64_t to, const Tokens& tokens, int64_t in, const Finish& finish) {
    if (tokens.count <= TILES * TILE_TOKENS) return by_tiles(table + from * in, from, to, tokens, in, finish);
    const int64_t at_once = std::max<int64_t>(TILE_ROWS, as_many(PANEL, in) / TILE_ROWS * TILE_ROWS);
    std::vector<float> panel;
    for (int64_t row = from; row < to; row += at_once) {
        const int64_t end = std::min(row + at_once, to);
        by_tiles(widened(table + row * in, (end - row) * in, panel), row, end, tokens, in, finish);
    }
}

void rows_of(const Matrix& m, int64_t expert, int64_t from, int64_t to, const Tokens& tokens, const float* bias) {
    const int64_t first = expert * m.out * m.in;
    const Finish finish{m.scale ? m.scale + expert * m.out : nullptr, bias};
    if (m.kind == FP32) some_rows(static_cast<const float*>(m.data) + first, from, to, tokens, m.in, finish);
    if (m.kind == BF16) some_rows(static_cast<const Bfloat*>(m.data) + first, from, to, tokens, m.in, finish);
    if (m.kind == INT8) some_rows(static_cast<const int8_t*>(m.data) + first, from, to, tokens, m.in, finish);
}

// Rows that a thread takes at a time: of one token as many bytes as are worth it, of many fewer.
int64_t share(const Matrix& m, int64_t tokens, int64_t experts, int32_t threads) {
    const int64_t bytes = m.in * (m.kind == FP32 ? 4 : m.kind == BF16 ? 2 : 1) * (1 + tokens / 4);
    const int64_t even = m.out * experts / (SHARES * threads);
    const int64_t rows = std::min(std::max(even, as_many(FEWEST_BYTES, bytes)), as_many(MOST_BYTES, bytes));
    return std::max<int64_t>(4, (rows + 3) / 4 * 4);
}

thread_local Scratch scratch;

}  // namespace

int rows_linear(const Matrix* m, const float* x, int64_t tokens, const float* bias, float* y, int32_t threads) {
    Layout layout;
    for (int pass = 0;; pass++) {
        const float** from = layout.take<const float*>(tokens);
        float** to = layout.take<float*>(tokens);
        if (pass == 0) {
            layout.next = scratch.get(reinterpret_cast<size_t>(layout.next));
            continue;
        }
        for (int64_t n = 0; n < tokens; n++) {
            from[n] = x + n * m->in;
            to[n] = y + n * m->out;
        }
        if (tokens * m->out * m->in < SMALL) threads = 1;
        const Tokens all{from, to, tokens};
        parallel(threads, m->out, share(*m, tokens, 1, threads), [&](int64_t begin, int64_t end) {
            rows_of(*m, 0, begin, end, all, bias);
        });
        return 0;
    }
}

int rows_experts(const Matrix* m, const float* x, const int64_t* row, const int64_t* expert, int64_t pairs, float* y,
                 int32_t threads) {
    Layout layout;
    for (int pass = 0;; pass++) {
        const float** from = layout.take<const float*>(pairs);
        float** to = layout.take<float*>(pairs);
        int64_t* start = layout.take<int64_t>(m->experts + 2);  // of each expert's pairs, by expert
        int64_t* used = layout.take<int64_t>(std::min(pairs, m->experts));
        if (pass == 0) {
            layout.next = scratch.get(reinterpret_cast<size_t>(layout.next));
            continue;
        }
        std::memset(start, 0, (m->experts + 2) * sizeof(int64_t));
        for (int64_t s = 0; s < pairs; s++) start[expert[s] + 2]++;
        int64_t jobs = 0;
        for (int64_t e = 0; e < m->experts; e++) {
            if (start[e + 2]) used[jobs++] = e;
            start[e + 2] += start[e + 1];
        }
        for (int64_t s = 0; s < pairs; s++) {  // start[e + 1] goes from the first pair of e to its last
            const int64_t at = start[expert[s] + 1]++;
            from[at] = x + (row ? row[s] : s) * m->in;
            to[at] = y + s * m->out;
        }
        if (pairs * m->out * m->in < SMALL) threads = 1;
        const int64_t at_once = share(*m, pairs / std::max<int64_t>(1, jobs), jobs, threads);
        const int64_t chunks = (m->out + at_once - 1) / at_once;
        parallel(threads, jobs * chunks, 1, [&](int64_t task, int64_t last) {
            for (; task < last; task++) {
                const int64_t e = used[task / chunks], begin = task % chunks * at_once;
                const Tokens own{from + start[e], to + start[e], start[e + 1] - start[e]};
                rows_of(*m, e, begin, std::min(begin + at_once, m->out), own, nullptr);
            }
        });
        return 0;
    }
}
