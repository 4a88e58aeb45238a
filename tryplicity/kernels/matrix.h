// What C++ knows of a matrix, and what its products have in common.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "parallel.h"

enum Kind : int64_t { TERNARY, FP32, BF16, INT8 };

struct Matrix {
    int64_t kind, experts, out, in;
    int64_t groups, blocks;  // of TERNARY
    const float* scale;      // one an expert; of rows one a row, or NULL
    const void* data;
};

// Of one matrix: y [tokens, out] = x [tokens, in] times it, and the bias if there is one.
int rows_linear(const Matrix* m, const float* x, int64_t tokens, const float* bias, float* y, int32_t threads);

// As tryplicity_experts in ternary.cpp; the pairs are looked at already.
int rows_experts(const Matrix* m, const float* x, const int64_t* row, const int64_t* expert, int64_t pairs, float* y,
                 int32_t threads);

// Memory kept from call to call by the thread that calls.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }
    char* get(size_t wanted) {
        wanted = (wanted + 4095) & ~size_t(4095);
        if (wanted > size) {
            std::free(data);
            data = static_cast<char*>(std::aligned_alloc(4096, wanted));
            size = data ? wanted : 0;
            if (!data) throw std::bad_alloc();
        }
        return data;
    }
};

struct Layout {  // carves arrays out of one piece of memory
    char* next = nullptr;
    template <class T>
    T* take(int64_t count) {
        T* here = reinterpret_cast<T*>(next);
        next += (count * sizeof(T) + 63) & ~size_t(63);
        return here;
    }
};
