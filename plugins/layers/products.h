// The ternary products of tryplicity.kernels: another library, whose functions C here is given by their addresses.
#pragma once

#include <cstdint>
#include <new>

#include "common.h"

struct Products {
    int (*linear_at)(const void* matrix, const float* x, int64_t tokens, const float* bias, float* y, int32_t threads);
    int (*experts_at)(const void* matrix, const float* x, int64_t tokens, const int64_t* row, const int64_t* expert,
                      int64_t pairs, float* y, const float* weight, const int64_t* into, float* total, int64_t totals,
                      int32_t threads);

    // y [tokens, out] = x [tokens, in] times the matrix. Throws std::bad_alloc, as those below do
    void linear(const void* matrix, const float* x, int64_t tokens, float* y, int64_t threads) const {
        check(linear_at(matrix, x, tokens, nullptr, y, static_cast<int32_t>(threads)));
    }

    // y [pairs, out] = row[s] of x [tokens, in] (NULL: s) times matrix expert[s]
    void experts(const void* matrix, const float* x, int64_t tokens, const int64_t* row, const int64_t* expert,
                 int64_t pairs, float* y, int64_t threads) const {
        check(experts_at(matrix, x, tokens, row, expert, pairs, y, nullptr, nullptr, nullptr, 0,
                         static_cast<int32_t>(threads)));
    }

    // total [totals, out] at into[s] += weight[s] * (x [pairs, in] at s times matrix expert[s]); y [pairs, out] is room
    void add_experts(const void* matrix, const float* x, const int64_t* expert, int64_t pairs, float* y,
                     const float* weight, const int64_t* into, float* total, int64_t totals, int64_t threads) const {
        check(experts_at(matrix, x, pairs, nullptr, expert, pairs, y, weight, into, total, totals,
                         static_cast<int32_t>(threads)));
    }

    static void check(int problem) {
        if (problem) throw std::bad_alloc();
    }
};
