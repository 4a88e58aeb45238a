// The pool of threads that the loops of the kernels and of the layers share.
//
// A token is a hundred and more loops of some ten microseconds each, on cores that a browser wants, too. So nobody is
// waited for who has not come: the caller cuts a loop into parts and takes them one after the other; workers that are
// awake take parts as well; at the end the caller waits for the parts that a worker has begun, and for nothing else.
// A worker that lost its core in the middle of a part is noticed by that wait. Then the caller works alone for a while.
//
// One loop at a time has the workers. A loop inside it, or another thread's meanwhile, runs on its own thread.

#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr auto SPIN = microseconds(200);    // that a worker stays awake without work
constexpr auto YIELD = microseconds(20);    // that a caller waits before it offers its core
constexpr auto STALL = microseconds(200);   // and before it takes the worker for stopped
constexpr int PAUSES = 32;                  // between looks at the clock
constexpr int ALONE = 2;                    // times as long as it waited for nothing the caller stays alone
constexpr int64_t MOST = 1 << 30;           // parts of a loop

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Pool {
    // parts of the loop that nobody has taken. Whoever takes one may read `loop` until it has counted it in `done`
    alignas(64) std::atomic<int64_t> left{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int> helpers{0};  // workers that the loop wants: those of a smaller number
    std::atomic<int> asleep{0};
    std::atomic<bool> taken{false};  // by a loop
    std::atomic<int> problem{0};     // of any of its parts
    struct {
        int (*run)(const void*, int64_t, int64_t);
        const void* f;
        int64_t n, grain, parts;
    } loop;
    int workers = 0;
    Clock::time_point alone{};  // until then

    std::mutex mutex;
    std::condition_variable wake;

    bool wants(int worker) const { return worker < helpers.load() && left.load() > 0; }

    bool take_part() {
        int64_t before = left.load(std::memory_order_relaxed);
        do {
            if (before == 0) return false;
        } while (!left.compare_exchange_weak(before, before - 1, std::memory_order_acquire, std::memory_order_relaxed));
        const int64_t from = (loop.parts - before) * loop.grain;
        if (const int found = loop.run(loop.f, from, std::min(from + loop.grain, loop.n)))
            problem.store(found, std::memory_order_relaxed);
        done.fetch_add(1, std::memory_order_release);
        return true;
    }

    void work(int worker) {
#if defined(SCHED_BATCH)
        sched_param none{};  // do not take the core from anyone who runs, least of all from the caller who wakes us
        pthread_setschedparam(pthread_self(), SCHED_BATCH, &none);
#endif
        for (;;) {
            const auto ends = Clock::now() + SPIN;
            bool found = false;
            do {
                for (int i = 0; i < PAUSES && !(found = wants(worker)); i++) pause();
                if (!found) sched_yield();  // the caller may be waiting for this very core
            } while (!found && Clock::now() < ends);
            if (found) {
                while (take_part()) {}
                continue;
            }
            std::unique_lock<std::mutex> lock(mutex);
            asleep++;
            wake.wait(lock, [&] { return wants(worker); });
            asleep--;
        }
    }

    // Until there are so many, or the system gives no more. They leave signals to the threads that expect them.
    void hire(int wanted) {
        if (workers >= wanted) return;
        sigset_t every, before;
        sigfillset(&every);
        pthread_sigmask(SIG_SETMASK, &every, &before);
        try {
            for (; workers < wanted; workers++) std::thread(&Pool::work, this, workers).detach();
        } catch (const std::system_error&) {
        } catch (const std::bad_alloc&) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void run(int threads) {
        hire(threads - 1);
        helpers.store(threads - 1, std::memory_order_relaxed);
        done.store(0, std::memory_order_relaxed);
        problem.store(0, std::memory_order_relaxed);
        const auto start = Clock::now();
        left.store(loop.parts);
        if (asleep.load()) {  // both in one order with a worker's asleep++ and its last look
            std::lock_guard<std::mutex> lock(mutex);
            wake.notify_all();
        }
        int64_t own = 0;
        while (take_part()) own++;
        for (int i = 0; i < PAUSES; i++) {
            if (done.load(std::memory_order_acquire) == loop.parts) return;
            pause();
        }
        const auto finished = Clock::now();
        auto waited = Clock::duration::zero();
        while (done.load(std::memory_order_acquire) != loop.parts) {
            waited = Clock::now() - finished;
            if (waited > YIELD) sched_yield();
            else pause();
        }
        if (waited > STALL + 4 * (finished - start) / std::max<int64_t>(1, own))
            alone = finished + waited + ALONE * waited;
    }
};

// Never freed: its threads run to the end of the process. A child of fork has none of them, and starts anew.
Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new (std::nothrow) Pool; });
    return new (std::nothrow) Pool;
}();

}  // namespace

extern "C" int tryplicity_parallel(int32_t threads, int64_t n, int64_t grain,
                                   int (*run)(const void* f, int64_t from, int64_t to), const void* f) {
    if (n <= 0) return 0;
    const int64_t parts = (n + grain - 1) / grain;
    if (threads > 1 && parts > 1 && parts < MOST && pool && !pool->taken.exchange(true, std::memory_order_acquire)) {
        const bool alone = Clock::now() < pool->alone;
        int problem = 0;
        if (!alone) {
            pool->loop = {run, f, n, grain, parts};
            pool->run(static_cast<int>(std::min<int64_t>(threads, parts)));
            problem = pool->problem.load(std::memory_order_relaxed);
        }
        pool->taken.store(false, std::memory_order_release);
        if (!alone) return problem;
    }
    return run(f, 0, n);
}
