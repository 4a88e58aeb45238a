// Loops shared with the pool of threads. See parallel.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

// run(f, from, to) for parts of [0, n) of `grain` (the last may be less), each once, at the same time on at most
// `threads` threads, the calling one among them. What a part computes must not depend on where it begins. No exceptions:
// a part gives 0, or 1 where memory ran out, and so does the whole.
extern "C" int tryplicity_parallel(int32_t threads, int64_t n, int64_t grain,
                                   int (*run)(const void* f, int64_t from, int64_t to), const void* f);

// of items that cost `each`, as many as `budget` pays for
inline int64_t as_many(int64_t budget, int64_t each) { return std::max<int64_t>(1, budget / std::max<int64_t>(1, each)); }

// What f gives, or 1 where memory ran out: nothing is thrown into C, or into another library.
template <class F>
inline int guarded(const F& f) {
    try {
        return f();
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// f(from, to)
template <class F>
inline void parallel(int32_t threads, int64_t n, int64_t grain, const F& f) {
    if (threads <= 1 || n <= grain) {
        if (n > 0) f(int64_t(0), n);
        return;
    }
    const int problem = tryplicity_parallel(threads, n, grain, [](const void* of, int64_t from, int64_t to) {
        return guarded([&] { return (*static_cast<const F*>(of))(from, to), 0; });
    }, &f);
    if (problem) throw std::bad_alloc();
}
