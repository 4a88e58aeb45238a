"""The pool of threads: every item once, whoever else calls it or wants the cores."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from tryplicity import kernels

SOURCE = """
#include "parallel.h"
#include <atomic>
#include <cmath>
using Parallel = decltype(&tryplicity_parallel);

struct Count {
    Parallel loop;
    int32_t threads;
    int64_t n, inner;
    std::atomic<int32_t>* times;
};

// times[i * inner + j] += 1 for all i < n and j < inner, the j's by a loop inside the first
extern "C" void count(Parallel loop, int32_t threads, int64_t n, int64_t grain, int64_t inner, int32_t* times) {
    Count all{loop, threads, n, inner, reinterpret_cast<std::atomic<int32_t>*>(times)};
    loop(threads, n, grain, [](const void* f, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) {
            Count row = *static_cast<const Count*>(f);
            row.times += i * row.inner;
            row.loop(row.threads, row.inner, 1, [](const void* g, int64_t from, int64_t to) {
                for (int64_t j = from; j < to; j++) static_cast<const Count*>(g)->times[j]++;
                return 0;
            }, &row);
        }
        return 0;
    }, &all);
}

// the same loop again and again, each with work enough for others to come; gives how many items were not done once
extern "C" int64_t wrong(Parallel loop, int32_t threads, int64_t repeats) {
    struct Item { double value; int32_t times; };
    static thread_local Item items[64];
    int64_t bad = 0;
    for (int64_t r = 0; r < repeats; r++) {
        for (Item& item : items) item = {0, 0};
        loop(threads, 64, 3, [](const void* f, int64_t from, int64_t to) {
            for (int64_t i = from; i < to; i++) {
                Item& item = static_cast<Item*>(const_cast<void*>(f))[i];
                for (int k = 0; k < 300; k++) item.value += std::sqrt(double(i + k));
                item.times++;
            }
            return 0;
        }, items);
        for (Item& item : items) bad += item.times != 1 || item.value <= 0;
    }
    return bad;
}

// what the loop gives when the item `which` runs out of memory; -1: none does
extern "C" int without_memory(Parallel loop, int32_t threads, int64_t which) {
    return loop(threads, 64, 1, [](const void* f, int64_t from, int64_t to) {
        return guarded([&] {
            for (int64_t i = from; i < to; i++)
                if (i == *static_cast<const int64_t*>(f)) throw std::bad_alloc();
            return 0;
        });
    }, &which);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The functions above."""
    folder = tmp_path_factory.mktemp("loops")
    (folder / "parallel.h").write_text((kernels.library.SOURCES[0].parent / "parallel.h").read_text())
    (folder / "loops.cpp").write_text(SOURCE)
    made = kernels.compile_library(folder / "loops.cpp")
    assert made is not None, kernels.why_not()
    made.wrong.restype = ctypes.c_int64
    return made


def counts(library, threads, n, grain, inner=1):
    times = (ctypes.c_int32 * max(1, n * inner))()
    library.count(ctypes.c_void_p(kernels.entry("parallel")), ctypes.c_int32(threads), ctypes.c_int64(n),
                  ctypes.c_int64(grain), ctypes.c_int64(inner), times)
    return list(times)[: n * inner]


def wrong(library, repeats, threads=2):
    return library.wrong(ctypes.c_void_p(kernels.entry("parallel")), ctypes.c_int32(threads), ctypes.c_int64(repeats))


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 7, 2])
def test_every_item_exactly_once(library, threads):
    for n in (0, 1, 2, 3, 63, 64, 65, 1000):
        for grain in (1, 2, 3, 64, 5000):
            assert counts(library, threads, n, grain) == [1] * n


def test_a_part_that_runs_out_of_memory_fails_its_own_loop_alone(library):
    """Whichever it is, and in whatever thread."""
    loop = ctypes.c_void_p(kernels.entry("parallel"))
    for threads in (1, 2, 3):
        for which in (*range(64), -1):
            assert library.without_memory(loop, ctypes.c_int32(threads), ctypes.c_int64(which)) == (which >= 0)
    assert wrong(library, 50) == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_loop_inside_a_loop(library, threads):
    assert counts(library, threads, 40, 2, inner=50) == [1] * 2000


def test_loops_of_several_threads_at_once(library):
    found = []
    callers = [threading.Thread(target=lambda: found.append(wrong(library, 3000, threads=3))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert found == [0, 0, 0]


def test_it_ends_while_others_have_the_cores(library):
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert wrong(library, 2000) == 0
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_has_threads_of_its_own(library):
    assert wrong(library, 10) == 0  # the parent's are awake
    child = os.fork()
    if child == 0:
        os._exit(wrong(library, 1000) != 0 or counts(library, 2, 1000, 1) != [1] * 1000)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert wrong(library, 10) == 0


def test_a_process_ends_with_its_threads_awake_and_hears_signals(library):
    program = textwrap.dedent("""
        import os, signal, torch
        from tryplicity import kernels
        torch.set_num_threads(3)
        heard = []
        signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
        digits = torch.ones(2000, 2000, dtype=torch.int8)
        kernels.pack(digits)
        os.kill(os.getpid(), signal.SIGTERM)
        kernels.pack(digits)
        print(len(heard))
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
