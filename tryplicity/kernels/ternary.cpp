// Products of int8 tokens with ternary matrices, 2 bits a weight in memory; and the plain C interface, for ctypes and
// for C++ elsewhere, of these products and of those with rows (rows.cpp).
//
// A matrix is [expert][out/4][in/128][4 rows][32 bytes]: byte j of a row's 32 holds columns j, 32+j, 64+j and 96+j of
// its block of 128, two bits each, digit + 1. Four rows side by side make one purely sequential stream of the memory.
// sum of (digit + 1) * q - sum of q = sum of digit * q, all in integers, so the result does not depend on order; the
// few steps in floating point are one and the same code for every number of tokens, so neither do the last bits.
//
// Tokens are taken up to eight at a time ("tile"), interleaved by blocks of 32 columns, [in/32][tokens][32].

#include "matrix.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Kept apart, so that the registers of a loop are its own.
#define KERNEL __attribute__((noinline))

namespace {

constexpr int64_t COLUMNS = 128, ROWS = 4, LANE = 32, BLOCK = ROWS * LANE;
constexpr int64_t TILE = 8;      // tokens at a time
constexpr int64_t FEW = 4;       // tokens up to which unpacked weights are not worth keeping
constexpr int64_t FLUSH = 16;    // blocks until sums in int16 could overflow: 16 * 4 planes * 2 pairs * 2 * 127 = 32512
constexpr int64_t GROUPS = 2;    // of rows decoded at a time, PIECE blocks of them: 16 kB
constexpr int64_t PIECE = 16;
constexpr int64_t TILES = 32;    // that one decoding serves: 256 tokens
constexpr int64_t PREFETCH = 2048;                 // bytes ahead
constexpr int64_t CHUNK_BYTES = 256 << 10;         // of a matrix, given to a thread at a time
constexpr int64_t CHUNK_FLOATS = 16 << 10;         // of tokens
constexpr int64_t SMALL = 1 << 19;                 // multiplications below which sharing them costs more
constexpr float NORM_EPS = 1e-6f, INPUT_FLOOR = 1e-5f;

const uint8_t* planes_of(const Matrix& m, int64_t expert) {
    return static_cast<const uint8_t*>(m.data) + expert * m.groups * m.blocks * BLOCK;
}
int64_t padded_of(const Matrix& m) { return m.blocks * COLUMNS; }

thread_local Scratch scratch;

struct Tile {
    const int8_t* q;
    int64_t count;  // tokens, 1 to TILE
    int64_t first;  // in the order of pairs
};

// Tokens in tiles of much the same size: nine are five and four.
int64_t tiles_of(int64_t tokens) { return (tokens + TILE - 1) / TILE; }
int64_t tile_start(int64_t tile, int64_t tokens) { return tile * tokens / tiles_of(tokens); }

struct Job {  // one expert's part of the work
    int64_t expert, first, tiles;
};

// ---- tokens ----

// x * (rstd / step) rounded half to even, in blocks of 32 `stride` bytes apart. The sum of squares and the root are in
// double, so that rounded to float they are the same in whatever order.
void quantise_row(const float* x, int64_t in, int64_t padded, int8_t* q, int64_t stride, float* step, int32_t* sum) {
    double squares[8] = {};
    float most[8] = {};
    int64_t i = 0;
#if defined(__AVX2__)
    __m256d low = _mm256_setzero_pd(), high = low;
    __m256 top = _mm256_setzero_ps();
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (; i + 8 <= in; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        top = _mm256_max_ps(_mm256_andnot_ps(sign, v), top);
        const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), b = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
        low = _mm256_add_pd(low, _mm256_mul_pd(a, a));
        high = _mm256_add_pd(high, _mm256_mul_pd(b, b));
    }
    _mm256_storeu_pd(squares, low);
    _mm256_storeu_pd(squares + 4, high);
    _mm256_storeu_ps(most, top);
#endif
    for (; i < in; i++) {
        squares[i % 8] += static_cast<double>(x[i]) * x[i];
        most[i % 8] = std::max(most[i % 8], std::fabs(x[i]));
    }
    double total = 0;
    float absmax = 0;
    for (int lane = 0; lane < 8; lane++) {
        total += squares[lane];
        absmax = std::max(absmax, most[lane]);
    }
    const float mean = static_cast<float>(total / static_cast<double>(in));
    const float rstd = static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + NORM_EPS)));
    float size = absmax * rstd;
    size = size < INPUT_FLOOR ? INPUT_FLOOR : size;  // a NaN stays one
    *step = size / 127.0f;
    const float factor = rstd / *step;
    int32_t all = 0;
    for (int64_t block = 0; block < padded; block += LANE, q += stride) {
        const int64_t here = std::min(LANE, in - block);
        if (here < LANE) std::memset(q, 0, LANE);
        const float* from = x + block;
#if defined(__AVX2__)
        if (here == LANE) {
            __m256i part[4];
            for (int k = 0; k < 4; k++)
                part[k] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * k), _mm256_set1_ps(factor)));
            const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]),
                                                     _mm256_packs_epi32(part[2], part[3]));
            const __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
            const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes),
                                                    _mm256_set1_epi16(1));
            alignas(32) int32_t sums[8];
            _mm256_store_si256(reinterpret_cast<__m256i*>(sums), fours);
            for (int k = 0; k < 8; k++) all += sums[k];
            continue;
        }
#endif
        for (int64_t k = 0; k < here; k++) {
            const float rounded = std::nearbyint(from[k] * factor);
            q[k] = static_cast<int8_t>(rounded >= -127.0f && rounded <= 127.0f ? rounded : -128.0f);
            all += q[k];
        }
    }
    *sum = all;
}

// ---- sums ----

#if defined(__AVX2__)
inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline void prefetch(const uint8_t* w) {
    _mm_prefetch(reinterpret_cast<const char*>(w + PREFETCH), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w + PREFETCH + 64), _MM_HINT_T0);
}

inline __m128i sums_of_four(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

// One token: four rows straight from the stream, sums[r] of (digit + 1) * q. Planes 1 and 3 stay where they are in
// their nibble, four times too large, in sums of their own: two shifts fewer, but only half as many blocks to a sum.
inline void stream_one(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    const __m256i first = _mm256_set1_epi8(3), second = _mm256_set1_epi8(12), ones = _mm256_set1_epi16(1);
    __m256i wide[4] = {}, wide4[4] = {};
    for (int64_t start = 0; start < blocks; start += FLUSH / 2) {
        __m256i narrow[4] = {}, narrow4[4] = {};
        const int64_t end = std::min(start + FLUSH / 2, blocks);
        for (int64_t b = start; b < end; b++, w += BLOCK, q += COLUMNS) {
            prefetch(w);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                const __m256i low = load(w + r * LANE), high = _mm256_srli_epi16(low, 4);
                const auto add = [&](__m256i& sum, __m256i digits, int plane) {
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(digits, load(q + plane * LANE)));
                };
                add(narrow[r], _mm256_and_si256(low, first), 0);
                add(narrow4[r], _mm256_and_si256(low, second), 1);
                add(narrow[r], _mm256_and_si256(high, first), 2);
                add(narrow4[r], _mm256_and_si256(high, second), 3);
            }
        }
        for (int r = 0; r < 4; r++) {
            wide[r] = _mm256_add_epi32(wide[r], _mm256_madd_epi16(narrow[r], ones));
            wide4[r] = _mm256_add_epi32(wide4[r], _mm256_madd_epi16(narrow4[r], ones));
        }
    }
    for (int r = 0; r < 4; r++)  // each lane of wide4 is a multiple of 4
        wide[r] = _mm256_add_epi32(wide[r], _mm256_srai_epi32(wide4[r], 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), sums_of_four(wide[0], wide[1], wide[2], wide[3]));
}

// A few tokens: two rows straight from the stream by T tokens, sums[t * ROWS + r].
template <int T>
KERNEL void stream_two(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    const __m256i low = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1), none = _mm256_setzero_si256();
    __m256i wide[2][T] = {};
    for (int64_t start = 0; start < blocks; start += FLUSH) {
        __m256i narrow[2][T] = {};
        const int64_t end = std::min(start + FLUSH, blocks);
        for (int64_t b = start; b < end; b++, w += BLOCK) {
            prefetch(w);
            const __m256i raw0 = load(w), raw1 = load(w + LANE);
#pragma GCC unroll 4
            for (int plane = 0; plane < 4; plane++, q += T * LANE) {
                const __m256i digits0 = _mm256_and_si256(_mm256_srli_epi16(raw0, 2 * plane), low);
                const __m256i digits1 = _mm256_and_si256(_mm256_srli_epi16(raw1, 2 * plane), low);
                for (int t = 0; t < T; t++) {
                    const __m256i x = load(q + t * LANE);
                    narrow[0][t] = _mm256_add_epi16(narrow[0][t], _mm256_maddubs_epi16(digits0, x));
                    narrow[1][t] = _mm256_add_epi16(narrow[1][t], _mm256_maddubs_epi16(digits1, x));
                }
            }
        }
        for (int r = 0; r < 2; r++)
            for (int t = 0; t < T; t++)
                wide[r][t] = _mm256_add_epi32(wide[r][t], _mm256_madd_epi16(narrow[r][t], ones));
    }
    for (int r = 0; r < 2; r++) {
        alignas(16) int32_t four[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(four),
                        sums_of_four(wide[r][0], wide[r][1], T > 2 ? wide[r][T > 2 ? 2 : 0] : none,
                                     T > 3 ? wide[r][T > 3 ? 3 : 0] : none));
        for (int t = 0; t < T; t++) sums[t * ROWS + r] = four[t];
    }
}

// Four rows of some blocks as bytes [block][plane][row][32].
void decode(const uint8_t* w, int64_t blocks, uint8_t* digits) {
    const __m256i low = _mm256_set1_epi8(3);
    for (int64_t b = 0; b < blocks; b++, w += BLOCK, digits += 4 * BLOCK) {
        prefetch(w);
        for (int r = 0; r < 4; r++) {
            __m256i raw = load(w + r * LANE);
            for (int plane = 0; plane < 4; plane++, raw = _mm256_srli_epi16(raw, 2))
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(digits + plane * BLOCK + r * LANE),
                                    _mm256_and_si256(raw, low));
        }
    }
}

// R decoded rows (from the one at w) by T tokens: sums[t * ROWS + r] += of (digit + 1) * q over at most FLUSH blocks.
template <int R, int T>
KERNEL void dots(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    const __m256i ones = _mm256_set1_epi16(1), none = _mm256_setzero_si256();
    __m256i narrow[R][T] = {};
    for (int64_t lane = 0; lane < blocks * 4; lane++, w += BLOCK, q += T * LANE) {
        __m256i digits[R];
        for (int r = 0; r < R; r++) digits[r] = load(w + r * LANE);
        for (int t = 0; t < T; t++)
            for (int r = 0; r < R; r++)
                narrow[r][t] = _mm256_add_epi16(narrow[r][t], _mm256_maddubs_epi16(digits[r], load(q + t * LANE)));
    }
    for (int r = 0; r < R; r++) {
        for (int first = 0; first < T; first += 4) {
            __m256i wide[4];
            for (int k = 0; k < 4; k++)
                wide[k] = first + k < T ? _mm256_madd_epi16(narrow[r][first + k < T ? first + k : 0], ones) : none;
            alignas(16) int32_t four[4];
            _mm_store_si128(reinterpret_cast<__m128i*>(four), sums_of_four(wide[0], wide[1], wide[2], wide[3]));
            for (int k = 0; k < 4 && first + k < T; k++) sums[(first + k) * ROWS + r] += four[k];
        }
    }
}
#else
template <int R, int T>
void stream_plain(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    for (int r = 0; r < R; r++) {
        for (int t = 0; t < T; t++) {
            int32_t total = 0;
            for (int64_t b = 0; b < blocks; b++) {
                const uint8_t* raw = w + b * BLOCK + r * LANE;
                const int8_t* x = q + (b * 4 * T + t) * LANE;
                int32_t part = 0;
                for (int j = 0; j < LANE; j++)
                    part += (raw[j] & 3) * x[j] + (raw[j] >> 2 & 3) * x[T * LANE + j] +
                            (raw[j] >> 4 & 3) * x[2 * T * LANE + j] + (raw[j] >> 6) * x[3 * T * LANE + j];
                total += part;
            }
            sums[t * ROWS + r] = total;
        }
    }
}

void stream_one(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    stream_plain<4, 1>(w, q, blocks, sums);
}

template <int T>
void stream_two(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    stream_plain<2, T>(w, q, blocks, sums);
}

void decode(const uint8_t* w, int64_t blocks, uint8_t* digits) {
    for (int64_t b = 0; b < blocks; b++, w += BLOCK, digits += 4 * BLOCK)
        for (int plane = 0; plane < 4; plane++)
            for (int64_t j = 0; j < BLOCK; j++) digits[plane * BLOCK + j] = w[j] >> (2 * plane) & 3;
}

template <int R, int T>
inline void dots(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    for (int t = 0; t < T; t++) {
        for (int r = 0; r < R; r++) {
            int32_t total = 0;
            for (int64_t lane = 0; lane < blocks * 4; lane++) {
                int32_t part = 0;
                for (int j = 0; j < LANE; j++) part += w[lane * BLOCK + r * LANE + j] * q[(lane * T + t) * LANE + j];
                total += part;
            }
            sums[t * ROWS + r] += total;
        }
    }
}
#endif

// Four rows by the few tokens of a lone tile.
template <int T>
void stream_four(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    stream_two<T>(w, q, blocks, sums);
    stream_two<T>(w + 2 * LANE, q, blocks, sums + 2);
}

void stream_rows(const uint8_t* w, const int8_t* q, int64_t tokens, int64_t blocks, int32_t* sums) {
    switch (tokens) {
        case 1: return stream_one(w, q, blocks, sums);
        case 2: return stream_four<2>(w, q, blocks, sums);
        case 3: return stream_four<3>(w, q, blocks, sums);
        default: return stream_four<4>(w, q, blocks, sums);
    }
}

// Four decoded rows by the tokens of one of several tiles; as many rows at a time as registers hold sums for.
template <int R, int T>
inline void four_rows(const uint8_t* w, const int8_t* q, int64_t blocks, int32_t* sums) {
    for (int r = 0; r < ROWS; r += R) dots<R, T>(w + r * LANE, q, blocks, sums + r);
}

void four_rows(const uint8_t* w, const int8_t* q, int64_t tokens, int64_t blocks, int32_t* sums) {
    switch (tokens) {
        case 1: return four_rows<4, 1>(w, q, blocks, sums);
        case 2: return four_rows<2, 2>(w, q, blocks, sums);
        case 3: return four_rows<2, 3>(w, q, blocks, sums);
        case 4: return four_rows<1, 4>(w, q, blocks, sums);
        case 5: return four_rows<1, 5>(w, q, blocks, sums);
        case 6: return four_rows<1, 6>(w, q, blocks, sums);
        case 7: return four_rows<1, 7>(w, q, blocks, sums);
        default: return four_rows<1, 8>(w, q, blocks, sums);
    }
}

// ---- products ----

struct Work {
    const Matrix* matrix;
    const Job* jobs;
    int64_t count;  // of jobs
    const Tile* tiles;
    const int64_t* pair;   // pairs in the order of the tiles; nullptr: as they come
    const int64_t* token;  // of each pair; nullptr: the pair itself
    const float* step;     // of each token
    const int32_t* sum;
    const float* bias;
    float* y;  // [pairs, out]
};

// Four rows of one tile, from the sums to floats.
void finish(const Work& work, const Tile& tile, int64_t expert, int64_t group, const int32_t* sums) {
    const Matrix& m = *work.matrix;
    const int64_t row = group * ROWS, rows = std::min(ROWS, m.out - row);
    for (int64_t t = 0; t < tile.count; t++) {
        const int64_t pair = work.pair ? work.pair[tile.first + t] : tile.first + t;
        const int64_t token = work.token ? work.token[pair] : pair;
        const float factor = work.step[token] * m.scale[expert];
        float* y = work.y + pair * m.out + row;
        for (int64_t r = 0; r < rows; r++) {
            const float value = static_cast<float>(sums[t * ROWS + r] - work.sum[token]) * factor;
            y[r] = work.bias ? value + work.bias[row + r] : value;
        }
    }
}

void groups_of(const Work& work, const Job& job, int64_t from, int64_t to) {
    const Matrix& m = *work.matrix;
    const uint8_t* planes = planes_of(m, job.expert);
    const Tile* tiles = work.tiles + job.first;
    if (job.tiles == 1 && tiles->count <= FEW) {
        for (int64_t group = from; group < to; group++) {
            int32_t sums[FEW * ROWS];
            stream_rows(planes + group * m.blocks * BLOCK, tiles->q, tiles->count, m.blocks, sums);
            finish(work, *tiles, job.expert, group, sums);
        }
        return;
    }
    // a few groups are decoded into the nearest cache, a piece of their columns at a time, and meet several tiles
    alignas(64) uint8_t digits[GROUPS][PIECE * 4 * BLOCK];
    int32_t sums[TILES][GROUPS][TILE * ROWS];
    for (int64_t first = 0; first < job.tiles; first += TILES) {
        const int64_t count = std::min(TILES, job.tiles - first);
        for (int64_t group = from; group < to; group += GROUPS) {
            const int64_t groups = std::min(GROUPS, to - group);
            std::memset(sums, 0, count * sizeof(sums[0]));
            for (int64_t block = 0; block < m.blocks; block += PIECE) {
                const int64_t blocks = std::min(PIECE, m.blocks - block);
                for (int64_t g = 0; g < groups; g++)
                    decode(planes + ((group + g) * m.blocks + block) * BLOCK, blocks, digits[g]);
                for (int64_t i = 0; i < count; i++) {
                    const Tile& tile = tiles[first + i];
                    const int8_t* q = tile.q + block * COLUMNS * tile.count;
                    for (int64_t g = 0; g < groups; g++) four_rows(digits[g], q, tile.count, blocks, sums[i][g]);
                }
            }
            for (int64_t i = 0; i < count; i++)
                for (int64_t g = 0; g < groups; g++) finish(work, tiles[first + i], job.expert, group + g, sums[i][g]);
        }
    }
}

// All jobs, cut into chunks for the threads to take: fewer rows the more tokens (on average) each has.
void products(const Work& work, int64_t tokens, int32_t threads) {
    const int64_t groups = work.matrix->groups, bytes = work.matrix->blocks * BLOCK * (1 + tokens / TILE);
    const int64_t at_once = std::max(GROUPS, as_many(CHUNK_BYTES, bytes)), chunks = (groups + at_once - 1) / at_once;
    parallel(threads, work.count * chunks, 1, [&](int64_t task, int64_t end) {
        for (; task < end; task++) {
            const int64_t from = task % chunks * at_once;
            groups_of(work, work.jobs[task / chunks], from, std::min(from + at_once, groups));
        }
    });
}

void interleave(const int8_t* row, int64_t padded, int8_t* into, int64_t stride) {
    for (int64_t block = 0; block < padded; block += LANE, into += stride) std::memcpy(into, row + block, LANE);
}

int linear(const Matrix* m, const float* x, int64_t tokens, const float* bias, float* y, int32_t threads) {
    const int64_t padded = padded_of(*m), tiles = tiles_of(tokens);
    Layout layout;
    for (int pass = 0;; pass++) {
        int8_t* q = layout.take<int8_t>(tokens * padded);
        float* step = layout.take<float>(tokens);
        int32_t* sum = layout.take<int32_t>(tokens);
        Tile* tile = layout.take<Tile>(tiles);
        if (pass == 0) {
            layout.next = scratch.get(reinterpret_cast<size_t>(layout.next));
            continue;
        }
        if (tokens * m->out * m->in < SMALL) threads = 1;
        parallel(threads, tiles, as_many(CHUNK_FLOATS, TILE * m->in), [&](int64_t i, int64_t end) {
            for (; i < end; i++) {
                const int64_t first = tile_start(i, tokens), count = tile_start(i + 1, tokens) - first;
                tile[i] = {q + first * padded, count, first};
                for (int64_t t = 0, n = first; t < count; t++, n++)
                    quantise_row(x + n * m->in, m->in, padded, q + first * padded + t * LANE, count * LANE, step + n,
                                 sum + n);
            }
        });
        const Job job{0, 0, tiles};
        products({m, &job, 1, tile, nullptr, nullptr, step, sum, bias, y}, tokens, threads);
        return 0;
    }
}

int experts(const Matrix* m, const float* x, int64_t tokens, const int64_t* row, const int64_t* expert,
            int64_t pairs, float* y, int32_t threads) {
    const int64_t padded = padded_of(*m);
    Layout layout;
    for (int pass = 0;; pass++) {
        int8_t* q = layout.take<int8_t>(tokens * padded);
        int8_t* mixed = layout.take<int8_t>(pairs * padded);
        float* step = layout.take<float>(tokens);
        int32_t* sum = layout.take<int32_t>(tokens);
        Tile* tile = layout.take<Tile>(pairs);
        Job* job = layout.take<Job>(std::min(pairs, m->experts));
        int64_t* sorted = layout.take<int64_t>(pairs);
        int64_t* start = layout.take<int64_t>(m->experts + 1);
        if (pass == 0) {
            layout.next = scratch.get(reinterpret_cast<size_t>(layout.next));
            continue;
        }
        std::memset(start, 0, (m->experts + 1) * sizeof(int64_t));
        for (int64_t s = 0; s < pairs; s++) start[expert[s] + 1]++;
        int64_t jobs = 0, tiles = 0;
        for (int64_t e = 0; e < m->experts; e++) {
            start[e + 1] += start[e];
            if (start[e + 1] == start[e]) continue;
            const int64_t count = start[e + 1] - start[e];
            job[jobs++] = {e, tiles, tiles_of(count)};
            for (int64_t i = 0; i < tiles_of(count); i++) {
                const int64_t first = start[e] + tile_start(i, count);
                tile[tiles++] = {mixed + first * padded, start[e] + tile_start(i + 1, count) - first, first};
            }
        }
        for (int64_t s = 0; s < pairs; s++) sorted[start[expert[s]]++] = s;
        if (pairs * m->out * m->in < SMALL) threads = 1;
        parallel(threads, tokens, as_many(CHUNK_FLOATS, m->in), [&](int64_t n, int64_t end) {
            for (; n < end; n++)
                quantise_row(x + n * m->in, m->in, padded, q + n * padded, LANE, step + n, sum + n);
        });
        parallel(threads, tiles, as_many(CHUNK_BYTES, padded), [&](int64_t i, int64_t end) {
            for (; i < end; i++) {
                Tile& to = tile[i];
                const auto q_of = [&](int64_t t) {
                    const int64_t pair = sorted[to.first + t];
                    return q + (row ? row[pair] : pair) * padded;
                };
                if (to.count == 1) {
                    to.q = q_of(0);
                    continue;
                }
                for (int64_t t = 0; t < to.count; t++)
                    interleave(q_of(t), padded, const_cast<int8_t*>(to.q) + t * LANE, to.count * LANE);
            }
        });
        products({m, job, jobs, tile, sorted, row, step, sum, nullptr, y}, pairs / std::max<int64_t>(1, jobs), threads);
        return 0;
    }
}

}  // namespace

extern "C" {

// q int8 [tokens, padded], step [tokens], sum int32 [tokens] of x [tokens, in].
void tryplicity_quantise(const float* x, int64_t tokens, int64_t in, int64_t padded, int8_t* q, float* step,
                         int32_t* sum, int32_t threads) {
    parallel(threads, tokens, as_many(CHUNK_FLOATS, in), [&](int64_t n, int64_t end) {
        for (; n < end; n++) quantise_row(x + n * in, in, padded, q + n * padded, LANE, step + n, sum + n);
    });
}

// y [tokens, out] = x [tokens, in] (quantised, if the matrix is ternary) times the (only) matrix, and the bias if there
// is one. Gives 1 if there is no memory.
int tryplicity_linear(const Matrix* m, const float* x, int64_t tokens, const float* bias, float* y, int32_t threads) {
    return guarded([&] { return (m->kind == TERNARY ? linear : rows_linear)(m, x, tokens, bias, y, threads); });
}

// Pair s: token row[s] of x [tokens, in] (nullptr: token s) by matrix expert[s]; y [pairs, out]. With weight [pairs]:
// total [*, out] at into[s] (nullptr: row[s]) += weight[s] * pair s, in order of s; y is then only room to work in.
// Gives 2 for an index that does not exist, 1 if there is no memory.
int tryplicity_experts(const Matrix* m, const float* x, int64_t tokens, const int64_t* row, const int64_t* expert,
                       int64_t pairs, float* y, const float* weight, const int64_t* into, float* total,
                       int64_t totals, int32_t threads) {
    for (int64_t s = 0; s < pairs; s++) {
        const int64_t token = row ? row[s] : s, target = into ? into[s] : token;
        if (expert[s] < 0 || expert[s] >= m->experts || token < 0 || token >= tokens) return 2;
        if (weight && (target < 0 || target >= totals)) return 2;
    }
    return guarded([&] {
        if (m->kind == TERNARY) experts(m, x, tokens, row, expert, pairs, y, threads);
        else rows_experts(m, x, row, expert, pairs, y, threads);
        if (!weight) return 0;
        if (pairs * m->out * m->in < SMALL) threads = 1;
        parallel(threads, m->out, std::max<int64_t>(64, as_many(CHUNK_FLOATS, pairs)),
                 [&](int64_t from, int64_t to) {  // columns of the total
            for (int64_t s = 0; s < pairs; s++) {
                float* sums = total + (into ? into[s] : row ? row[s] : s) * m->out;
                const float* product = y + s * m->out;
                for (int64_t o = from; o < to; o++) sums[o] += weight[s] * product[o];
            }
        });
        return 0;
    });
}

// y [tokens, rows] = x [tokens, in] times a table [rows, in] of a kind, each row times scale [rows] if there is one.
// Gives 1 if there is no memory.
int tryplicity_rows(int64_t kind, const void* table, const float* scale, const float* x, int64_t tokens, int64_t in,
                    int64_t rows, float* y, int32_t threads) {
    const Matrix m{kind, 1, rows, in, 0, 0, scale, table};
    return guarded([&] { return rows_linear(&m, x, tokens, nullptr, y, threads); });
}

}  // extern "C"

// ---- digits ----

namespace {

struct Digits {  // the five digits + 1 of each byte, the first column's in the lowest byte
    uint64_t of[256];
    Digits() {
        for (int byte = 0; byte < 256; byte++) {
            uint64_t five = 0;
            for (int i = 0, rest = byte; i < 5; i++, rest /= 3) five |= uint64_t(rest % 3) << (8 * i);
            of[byte] = five;
        }
    }
};
const Digits DIGITS;

// A row of digits + 1, padded with zeros to whole blocks, into its 32 bytes of every block.
void planes_of_row(const uint8_t* digits, int64_t blocks, uint8_t* into) {
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* d = digits + b * COLUMNS;
        for (int64_t j = 0; j < LANE; j++)
            into[b * BLOCK + j] = d[j] | d[LANE + j] << 2 | d[2 * LANE + j] << 4 | d[3 * LANE + j] << 6;
    }
}

}  // namespace

extern "C" {

// planes [experts, groups, blocks, 4, 32] of digits int8 [experts, out, in] or, where that is nullptr, of packed
// [experts, out, (in + 4) / 5]. Rows that pad a group to four are zeros. Gives 2 if a byte is none of 243.
int tryplicity_planes(const int8_t* digits, const uint8_t* packed, int64_t experts, int64_t out, int64_t in,
                      int64_t groups, int64_t blocks, uint8_t* planes, int32_t threads) {
    const int64_t bytes = (in + 4) / 5, padded = blocks * COLUMNS;
    std::atomic<int> problem{0};
    parallel(threads, experts * groups * ROWS, as_many(SMALL, padded), [&](int64_t line, int64_t end) {
        uint8_t* row = static_cast<uint8_t*>(std::calloc(padded + 64, 1));
        if (!row) problem = 1;
        for (; row && line < end; line++) {
            const int64_t expert = line / (groups * ROWS), o = line % (groups * ROWS);
            uint8_t* into = planes + (expert * groups + o / ROWS) * blocks * BLOCK + o % ROWS * LANE;
            if (o >= out) {
                std::memset(row, 0, padded);
            } else if (digits) {
                const int8_t* from = digits + (expert * out + o) * in;
                for (int64_t i = 0; i < in; i++) row[i] = static_cast<uint8_t>(from[i] + 1) & 3;
            } else {
                const uint8_t* from = packed + (expert * out + o) * bytes;
                uint8_t most = 0;
                for (int64_t i = 0; i < bytes; i++) {
                    std::memcpy(row + 5 * i, &DIGITS.of[from[i]], 8);
                    most = std::max(most, from[i]);
                }
                if (most > 242) problem = 2;
                std::memset(row + in, 0, padded + 64 - in);
            }
            planes_of_row(row, blocks, into);
        }
        std::free(row);
    });
    return problem;
}

// packed [rows, (in + 4) / 5] of digits int8 [rows, in]: the first of five columns is the byte's lowest digit.
void tryplicity_pack(const int8_t* digits, int64_t rows, int64_t in, uint8_t* packed, int32_t threads) {
    const int64_t bytes = (in + 4) / 5;
    parallel(threads, rows, as_many(SMALL, in), [&](int64_t row, int64_t end) {
        for (; row < end; row++) {
            const int8_t* d = digits + row * in;
            uint8_t* into = packed + row * bytes;
            const int64_t whole = in / 5;
            for (int64_t i = 0; i < whole; i++, d += 5)
                into[i] = static_cast<uint8_t>(121 + d[0] + 3 * d[1] + 9 * d[2] + 27 * d[3] + 81 * d[4]);
            if (whole < bytes) {
                int byte = 121;
                for (int64_t i = whole * 5, power = 1; i < in; i++, power *= 3) byte += static_cast<int>(power) * *d++;
                into[whole] = static_cast<uint8_t>(byte);
            }
        }
    });
}

// digits int8 [rows, in] of packed [rows, (in + 4) / 5]
void tryplicity_unpack(const uint8_t* packed, int64_t rows, int64_t in, int8_t* digits, int32_t threads) {
    const int64_t bytes = (in + 4) / 5;
    parallel(threads, rows, as_many(SMALL, in), [&](int64_t row, int64_t end) {
        for (; row < end; row++) {
            const uint8_t* from = packed + row * bytes;
            for (int64_t i = 0; i < in; i++)
                digits[row * in + i] = static_cast<int8_t>((DIGITS.of[from[i / 5]] >> (8 * (i % 5))) & 3) - 1;
        }
    });
}

}  // extern "C"
