"""Where memory runs out inside C, that is an error like any other, in whatever thread: the process goes on."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import ctypes, resource, sys, time, torch
    from tryplicity_plugins.layers import native
    from tryplicity_plugins.layers.attention import AttentionInC
    from tryplicity_plugins.layers.router import RouterInC
    from tryplicity_plugins.layers.c_structs import Products

    def within(room, call):
        # what a call gives where the process may have so many more bytes
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + room, hard))
        try:
            call()
            said = "done"
        except MemoryError:
            said = "MemoryError"
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        return said

    torch.set_num_threads(int(sys.argv[1]))
    assert native.library() is not None
    generator = torch.Generator().manual_seed(0)
"""

ROUTE = """
    N, D, E, K = 100_000, 8, 64, 2
    x, weight, bias = torch.randn(N, D, generator=generator), torch.randn(E, D, generator=generator), torch.zeros(E)
    struct = RouterInC(D, E, K, False, True, 1, 1, 2, weight.data_ptr(), bias.data_ptr(), None, None, None, 0, 0, 0, 1)
    row, expert = torch.zeros(2, N * K, dtype=torch.int64).unbind()
    weights = torch.zeros(N * K)
    count = ctypes.c_int64()
    function = native.function("route", "ppipppp")

    def call(tokens=N):
        function(ctypes.addressof(struct), x.data_ptr(), tokens, row.data_ptr(), expert.data_ptr(), weights.data_ptr(),
                 ctypes.addressof(count))

    call(5000)  # the threads are there
    before = weights[:5000 * K].clone()
    print(within(1 << 20, call), end=" ")
    call()
    print(bool(torch.equal(weights[:5000 * K], before)), count.value == N * K)
"""

ATTENTION = """
    H, K, T = 256, 512, 32
    qkv, y = torch.randn(1, T, (H + 2) * K, generator=generator), torch.zeros(1, T, H * K)
    rotation = torch.stack((torch.ones(64, K // 2), torch.zeros(64, K // 2)), -1).contiguous()
    page = torch.zeros(64 * 2 * K)
    pages = (ctypes.c_void_p * 1)(page.data_ptr())
    rows = (ctypes.c_int64 * 3)(ctypes.addressof(pages), 0, 0)
    struct = AttentionInC(H, 1, K, K, 0, 0.0, 0.0, None, None, Products())
    function = native.function("attention_over_pages", "pppppii")

    def call():
        function(ctypes.addressof(struct), y.data_ptr(), qkv.data_ptr(), rotation.data_ptr(), rows, 1, T)

    # the threads are there, and have no room of theirs yet
    native.function("rms_norm", "pppiif")(qkv.data_ptr(), rotation.data_ptr(), y.data_ptr(), 4096, K, 1e-6)
"""

ALONE = """
    print(within(1 << 18, call), end=" ")
    call()
    # the first token sees only itself
    print(bool(torch.allclose(y[0, 0].view(H, K), qkv[0, 0, (H + 1) * K:].expand(H, K), atol=1e-5)), True)
"""


IN_A_WORKER = """
    torch.set_num_threads(1)
    call()  # now the calling thread has all the room it needs
    torch.set_num_threads(2)
    wanted = y.clone()

    def until_a_worker_comes():
        ends = time.monotonic() + 10
        while time.monotonic() < ends:
            call()

    print(within(1 << 18, until_a_worker_comes), end=" ")
    call()
    print(bool(torch.equal(y, wanted)), True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux bounds a process's addresses")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("work", [ROUTE, ATTENTION + ALONE], ids=["route", "attention"])
def test_no_memory_inside_c_is_an_error_and_the_next_call_works(work, threads):
    assert run(work, threads) == "MemoryError True True"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux bounds a process's addresses")
def test_no_memory_in_a_worker_is_an_error_of_who_called():
    said, *rest = run(ATTENTION + IN_A_WORKER, 2).split()
    assert rest == ["True", "True"] and said in ("MemoryError", "done")  # "done": no worker came, on a busy machine


def run(work, threads):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(work), str(threads)],
                          capture_output=True, text=True, timeout=120,
                          # glibc gives each thread addresses in advance otherwise
                          env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.strip()
