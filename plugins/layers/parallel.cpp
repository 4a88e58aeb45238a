// Where the layers' loops find the threads that they share with the ternary products. See native.py.
#include "common.h"

static int alone(int32_t, int64_t n, int64_t, Loop* run, const void* f) { return run(f, 0, n); }

int (*share_loop)(int32_t threads, int64_t n, int64_t grain, Loop* run, const void* f) = alone;

extern "C" void use_threads(void* address) { share_loop = reinterpret_cast<decltype(share_loop)>(address); }
