// Grouped-query attention over pages of keys and values: rotary positions, the write into the cache, and softmax
// taken page by page. One call serves any number of sequences, each with its own length.
//
// Every number of a token is a chain of operations in an order that depends on its position alone: scores are summed
// over the head's dimensions one after the other, values over the tokens one after the other, pages in order. Blocks
// and threads only decide what is done at the same time, so a token gets the same bits alone, in a chunk, or beside
// other sequences.
//
// Shapes: B rows, T new tokens of each, H query heads, G key/value heads, R = H / G, K head dim, C = K rounded up to
// whole vectors. A page holds 64 tokens: for each row and each of the G heads first its keys [K, 64], then its values
// [64, C].

#include <algorithm>
#include <vector>

#include "common.h"
#include "products.h"

namespace {

constexpr int64_t PAGE = 64;

// c[r] += sum over j < count, in order, of a[r][j] * b[j], for ROWS rows and VECS vectors of columns
template <int ROWS, int VECS>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t count, float* c, int64_t ldc) {
    v8 sum[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) sum[r][v] = load(c + r * ldc + v * LANES);
    for (int64_t j = 0; j < count; ++j) {
        v8 right[VECS];
        for (int v = 0; v < VECS; ++v) right[v] = load(b + j * ldb + v * LANES);
        for (int r = 0; r < ROWS; ++r) {
            const v8 left = all(a[r * lda + j]);
            for (int v = 0; v < VECS; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECS; ++v) store(c + r * ldc + v * LANES, sum[r][v]);
}

// the same for any number of rows, and of columns in whole vectors
void product(int64_t rows, int64_t columns, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t count,
             float* c, int64_t ldc) {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6) {  // as many sums as there are registers for
        int64_t j = 0;
        for (; j + 2 * LANES <= columns; j += 2 * LANES)
            tile<6, 2>(a + r * lda, lda, b + j, ldb, count, c + r * ldc + j, ldc);
        if (j < columns) tile<6, 1>(a + r * lda, lda, b + j, ldb, count, c + r * ldc + j, ldc);
    }
    for (; r + 2 <= rows; r += 2) {
        int64_t j = 0;
        for (; j + 4 * LANES <= columns; j += 4 * LANES)
            tile<2, 4>(a + r * lda, lda, b + j, ldb, count, c + r * ldc + j, ldc);
        for (; j < columns; j += LANES)
            tile<2, 1>(a + r * lda, lda, b + j, ldb, count, c + r * ldc + j, ldc);
    }
    for (; r < rows; ++r) {
        int64_t j = 0;
        for (; j + 8 * LANES <= columns; j += 8 * LANES)
            tile<1, 8>(a + r * lda, lda, b + j, ldb, count, c + r * ldc + j, ldc);
        for (; j < columns; j += LANES)
            tile<1, 1>(a + r * lda, lda, b + j, ldb, count, c + r * ldc + j, ldc);
    }
}

struct Row {
    const float* const* pages;
    int64_t offset, seen;  // of this row in a page, in floats; tokens before the new ones
};

struct Shape {
    int64_t heads, kv_heads, head_dim, columns, rotary_dims, window;  // window: 0 for none
    float scale, softcap;                                             // softcap: 0 for none

    int64_t shared() const { return heads / kv_heads; }
    int64_t width() const { return (heads + 2 * kv_heads) * head_dim; }  // of a token's q, k and v
    // the first token that the one at a position sees
    int64_t first(int64_t at) const { return window > 0 && at >= window ? at - window + 1 : 0; }
    int64_t head_floats() const { return PAGE * (head_dim + columns); }  // of one head in a page
};

inline const float* page_of(const Row& row, const Shape& shape, int64_t page, int64_t g) {
    return row.pages[page] + row.offset + g * shape.head_floats();
}

// y[i * step] = the pairs of the first rotary_dims of x turned by the angles of its position, and all times scale
inline void rotate(const float* x, const float* rotation, int64_t at, const Shape& shape, float scale, float* y,
                   int64_t step) {
    const float* turn = rotation + at * shape.rotary_dims;
    for (int64_t i = 0; i < shape.rotary_dims; i += 2) {
        const float a = x[i], b = x[i + 1], c = turn[i] * scale, s = turn[i + 1] * scale;
        y[i * step] = a * c - b * s;
        y[(i + 1) * step] = a * s + b * c;
    }
    for (int64_t i = shape.rotary_dims; i < shape.head_dim; ++i) y[i * step] = x[i] * scale;
}

// the new tokens' keys and values of one head into their pages
void remember(const float* qkv, const float* rotation, const Row& row, const Shape& shape, int64_t T, int64_t g) {
    const int64_t K = shape.head_dim;
    for (int64_t t = 0; t < T; ++t) {
        const int64_t at = row.seen + t, column = at % PAGE;
        const float* key = qkv + t * shape.width() + (shape.heads + g) * K, *value = key + shape.kv_heads * K;
        float* page = const_cast<float*>(page_of(row, shape, at / PAGE, g));
        rotate(key, rotation, at, shape, 1.0f, page + column, PAGE);
        float* to = page + K * PAGE + column * shape.columns;
        for (int64_t i = 0; i < K; ++i) to[i] = value[i];
    }
}

struct Scratch {
    std::vector<float> queries, scores, sums, most, total;
};

// one page of softmax for `rows` queries, of which each sees the tokens [first, limit) of the page
void visit(const float* page, const Shape& shape, int64_t rows, int64_t first, int64_t limit, const float* queries,
           float* scores, float* sums, float* most, float* total) {
    const int64_t K = shape.head_dim, C = shape.columns;
    for (int64_t i = 0; i < rows * PAGE; ++i) scores[i] = 0.0f;
    product(rows, PAGE, queries, K, page, PAGE, K, scores, PAGE);
    const int64_t vectors = (limit + LANES - 1) / LANES * LANES;
    for (int64_t r = 0; r < rows; ++r) {
        float* score = scores + r * PAGE, highest = most[r];
        if (shape.softcap > 0)
            for (int64_t i = 0; i < vectors; i += LANES)
                store(score + i, tanh(load(score + i) / shape.softcap) * shape.softcap);
        for (int64_t i = 0; i < first; ++i) score[i] = score[first];  // not seen: they must change nothing
        for (int64_t i = limit; i < vectors; ++i) score[i] = score[first];
        v8 best = load(score);
        for (int64_t i = LANES; i < vectors; i += LANES) {
            const v8 other = load(score + i);
            best = other > best ? other : best;
        }
        for (int i = 0; i < LANES; ++i) highest = best[i] > highest ? best[i] : highest;
        for (int64_t i = 0; i < vectors; i += LANES) store(score + i, exp(load(score + i) - highest));
        for (int64_t i = 0; i < first; ++i) score[i] = 0.0f;
        for (int64_t i = limit; i < vectors; ++i) score[i] = 0.0f;
        v8 weights = all(0);
        for (int64_t i = 0; i < vectors; i += LANES) weights += load(score + i);
        if (highest > most[r]) {
            const float fade = std::exp(most[r] - highest);
            total[r] *= fade;
            for (int64_t i = 0; i < C; i += LANES) store(sums + r * C + i, load(sums + r * C + i) * fade);
            most[r] = highest;
        }
        total[r] += sum(weights);
    }
    product(rows, C, scores + first, PAGE, page + K * PAGE + first * C, C, limit - first, sums, C);
}

// the new tokens at positions [begin, end), all on one page, of the heads that share key/value head g
void attend(float* out, const float* qkv, const float* rotation, const Row& row, const Shape& shape, int64_t begin,
            int64_t end, int64_t g, Scratch& scratch) {
    const int64_t K = shape.head_dim, C = shape.columns, R = shape.shared(), rows = (end - begin) * R;
    scratch.queries.resize(rows * K);
    scratch.scores.resize(rows * PAGE);
    scratch.sums.assign(rows * C, 0.0f);
    scratch.most.assign(rows, -INFINITY);
    scratch.total.assign(rows, 0.0f);
    float* queries = scratch.queries.data(), *scores = scratch.scores.data(), *sums = scratch.sums.data();
    float* most = scratch.most.data(), *total = scratch.total.data();
    for (int64_t at = begin; at < end; ++at)
        for (int64_t r = 0; r < R; ++r)
            rotate(qkv + (at - row.seen) * shape.width() + (g * R + r) * K, rotation, at, shape, shape.scale,
                   queries + ((at - begin) * R + r) * K, 1);
    // one query alone: on their own page, and where their windows begin, each sees other tokens than the one before
    auto alone = [&](int64_t at, int64_t page, int64_t limit) {
        const int64_t r = (at - begin) * R, first = std::max<int64_t>(0, shape.first(at) - page * PAGE);
        if (first < limit)
            visit(page_of(row, shape, page, g), shape, R, first, limit, queries + r * K, scores, sums + r * C,
                  most + r, total + r);
    };
    const int64_t last = begin / PAGE;
    for (int64_t page = shape.first(begin) / PAGE; page < last; ++page)
        if (shape.first(end - 1) <= page * PAGE)
            visit(page_of(row, shape, page, g), shape, rows, 0, PAGE, queries, scores, sums, most, total);
        else
            for (int64_t at = begin; at < end; ++at) alone(at, page, PAGE);
    for (int64_t at = begin; at < end; ++at) alone(at, last, at % PAGE + 1);
    for (int64_t at = begin; at < end; ++at)
        for (int64_t r = 0; r < R; ++r) {
            const int64_t i = (at - begin) * R + r;
            float* to = out + (at - row.seen) * shape.heads * K + (g * R + r) * K;
            const float share = 1.0f / total[i];
            for (int64_t k = 0; k < K; ++k) to[k] = sums[i * C + k] * share;
        }
}

struct Attention {
    int64_t heads, kv_heads, head_dim, rotary_dims, window;  // window: 0 for none
    float scale, softcap;                                    // 0 for 1 / sqrt(head_dim), and for none
    const void *qkv, *out;  // packed matrices, or NULL
    Products products;
};

// y [B, T, H * K] of qkv [B, T, (H + 2 G) * K]
void attend_all(const Attention& layer, float* y, const float* qkv, const float* rotation, const int64_t* rows_B3,
                int64_t B, int64_t T, int64_t threads) {
    const int64_t H = layer.heads, G = layer.kv_heads, K = layer.head_dim;
    const float scale = layer.scale > 0 ? layer.scale : 1.0f / std::sqrt(static_cast<float>(K));
    const Shape shape{H, G, K, (K + LANES - 1) / LANES * LANES, layer.rotary_dims, layer.window, scale, layer.softcap};
    std::vector<Row> rows(B);
    std::vector<int64_t> first_item(B + 1, 0);  // of each row, counting blocks of queries of one key/value head
    int64_t block = 8, work = 0;  // tokens of a block, a part of a page; about 64 queries
    while (block < 32 && block * shape.shared() < 64) block *= 2;
    for (int64_t b = 0; b < B; ++b) {
        const int64_t* row = rows_B3 + 3 * b;
        rows[b] = {reinterpret_cast<const float* const*>(row[0]), row[1], row[2]};
        first_item[b + 1] = first_item[b] + G * ((row[2] + T - 1) / block - row[2] / block + 1);
        work += (row[2] + T - shape.first(row[2])) * T * H * K;
    }
    parallel(threads, B * G, T * 2 * K, [&](int64_t i, int64_t end) {
        for (; i < end; ++i) {
            const int64_t b = i / G;
            remember(qkv + b * T * shape.width(), rotation, rows[b], shape, T, i % G);
        }
    });
    parallel(threads, first_item[B], work / std::max<int64_t>(1, first_item[B]), [&](int64_t i, int64_t last) {
        static thread_local Scratch scratch;
        for (; i < last; ++i) {
            int64_t b = 0;
            while (first_item[b + 1] <= i) ++b;
            const int64_t item = i - first_item[b], seen = rows[b].seen;
            const int64_t at = (seen / block + item / G) * block;
            const int64_t begin = at > seen ? at : seen, end = at + block < seen + T ? at + block : seen + T;
            attend(y + b * T * H * K, qkv + b * T * shape.width(), rotation, rows[b], shape, begin, end, item % G,
                   scratch);
        }
    });
}

}  // namespace

// rotation [positions, rotary_dims / 2, 2]: cos and sin; rows_B3: the address of a row's table of pages, the row's
// offset in a page in floats, and how many tokens it has seen. The pages have room for the new tokens.
extern "C" int64_t attention_over_pages(int64_t threads, const void* layer, float* y, const float* qkv,
                                        const float* rotation, const int64_t* rows_B3, int64_t B, int64_t T) {
    return guarded([&] {
        attend_all(*static_cast<const Attention*>(layer), y, qkv, rotation, rows_B3, B, T, threads);
    });
}

// The same with both products: out [B, T, D] of x [B, T, D].
extern "C" int64_t packed_attention(int64_t threads, const void* of, float* out, const float* x, const float* rotation,
                                    const int64_t* rows_B3, int64_t B, int64_t T) {
    const Attention& layer = *static_cast<const Attention*>(of);
    static thread_local std::vector<float> qkv, y;  // kept from call to call
    return guarded([&] {
        qkv.resize(std::max<size_t>(qkv.size(), B * T * (layer.heads + 2 * layer.kv_heads) * layer.head_dim));
        y.resize(std::max<size_t>(y.size(), B * T * layer.heads * layer.head_dim));
        layer.products.linear(layer.qkv, x, B * T, qkv.data(), threads);
        attend_all(layer, y.data(), qkv.data(), rotation, rows_B3, B, T, threads);
        layer.products.linear(layer.out, y.data(), B * T, out, threads);
    });
}
