// Matrix products of ggml (the tensor library of llama.cpp), for tests/benchmarks/ternary.py to time beside ours.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ggml.h"
#include "ggml-cpu.h"

struct bench {
    struct ggml_context* context;
    struct ggml_threadpool* pool;
    struct ggml_cgraph* graph;  // the products with every matrix, one after the other, as in a model
    struct ggml_cplan plan;
    struct ggml_tensor *x, *first;
};

// `copies` matrices [out, in] of weights (floats, [out, in]) in ggml's `format`, and products with x [tokens, in].
struct bench* bench_new(const char* format, const float* weights, const float* x, int64_t out, int64_t in,
                        int64_t tokens, int copies, int threads) {
    enum ggml_type type = GGML_TYPE_COUNT;
    for (int t = 0; t < GGML_TYPE_COUNT; t++)
        if (ggml_type_name(t) && !strcmp(ggml_type_name(t), format)) type = t;
    if (type == GGML_TYPE_COUNT) return NULL;
    struct bench* b = calloc(1, sizeof(struct bench));
    const size_t matrix = ggml_row_size(type, in) * out;
    const size_t size = copies * (matrix + (size_t)tokens * out * 4 + 4096) + (size_t)tokens * in * 4 +
                        ggml_graph_overhead_custom(2 * copies + 16, false) + (1 << 20);
    b->context = ggml_init((struct ggml_init_params){size, NULL, false});
    ggml_cpu_init();
    b->graph = ggml_new_graph_custom(b->context, 2 * copies + 16, false);
    b->x = ggml_new_tensor_2d(b->context, GGML_TYPE_F32, in, tokens);
    memcpy(b->x->data, x, (size_t)tokens * in * 4);
    struct ggml_tensor* w0 = NULL;
    for (int i = 0; i < copies; i++) {
        struct ggml_tensor* w = ggml_new_tensor_2d(b->context, type, in, out);
        if (!w0) {
            ggml_quantize_chunk(type, weights, w->data, 0, out, in, NULL);
            w0 = w;
        } else {
            memcpy(w->data, w0->data, matrix);
        }
        struct ggml_tensor* y = ggml_mul_mat(b->context, w, b->x);
        if (!b->first) b->first = y;
        ggml_build_forward_expand(b->graph, y);
    }
    struct ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    b->pool = ggml_threadpool_new(&params);
    b->plan = ggml_graph_plan(b->graph, threads, b->pool);
    b->plan.work_data = malloc(b->plan.work_size + 64);
    return b;
}

int bench_run(struct bench* b) { return ggml_graph_compute(b->graph, &b->plan); }

const float* bench_result(const struct bench* b) { return b->first->data; }  // [tokens, out], of the first matrix

void bench_free(struct bench* b) {
    ggml_threadpool_free(b->pool);
    free(b->plan.work_data);
    ggml_free(b->context);
    free(b);
}
