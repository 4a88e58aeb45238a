"""SmolLM2-135M-Instruct at batch 1 through our engine, and through llama.cpp on the same GGUF file, in turn.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python     # compiles llama.cpp: cmake, minutes
    python -m tests.benchmarks.llama --llama /tmp/llama/bin/python [--threads 2] [--bursts 8] [--processor-time]

Each side is a process of its own that stays alive, and short bursts alternate, so that a drift in the machine's speed
meets all alike. A burst reads a prompt, decodes some tokens greedily untimed, and then those that are timed.
--processor-time counts the process's own time on processors, not the clock's, for machines that do other work beside:
then with one thread, since one that waits counts too. --no-repack keeps llama.cpp from storing weights anew for AMX and
the like, which it takes for usable on some virtual machines where it is not, and dies of.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from tests.benchmarks.hybrid import Worker, serve

PROMPT, WARM, DECODED = 256, 4, 48
LLAMA, FORMS = "llama.cpp", ("int8", "bf16", "fp32")


def prompt() -> list[int]:
    """Any tokens that are none of the special ones."""
    return [100 + (i * 7919) % 40000 for i in range(PROMPT)]


def ours(form: str, threads: int, clock: Callable[[], float]) -> Callable[[], float]:
    import itertools

    import torch

    from tryplicity import load_plugins
    from tryplicity.inference.engine import decode, ready_for_decoding
    from tryplicity.inference.packed import load_model
    from tryplicity.inference.sampler import Sampler, Sampling
    from tryplicity.named import resolve
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    torch.set_num_threads(threads)
    plugins = load_plugins()
    model = load_model(resolve("smollm2", plugins).path, plugins.registry, weights=form)[0]
    print(sum(p.numel() for p in model.parameters()), flush=True)
    ready_for_decoding(model)

    def burst() -> float:
        tokens = decode(model, prompt(), Sampler(Sampling(temperature=0, repetition_penalty=1.0)))
        started = clock()
        next(tokens)
        burst.reading = PROMPT / (clock() - started)
        for _ in itertools.islice(tokens, WARM):
            pass
        started = clock()
        for _ in itertools.islice(tokens, DECODED):
            pass
        seconds = clock() - started
        tokens.close()
        return DECODED / seconds

    return burst


def theirs(file: str, threads: int, clock: Callable[[], float], repack: bool) -> Callable[[], float]:
    import llama_cpp
    import numpy

    given = llama_cpp.llama_model_default_params

    def parameters():
        made = given()
        made.use_extra_bufts = repack
        return made

    llama_cpp.llama_cpp.llama_model_default_params = parameters
    model = llama_cpp.Llama(model_path=file, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(0, flush=True)

    def burst() -> float:
        def step(tokens: list[int]) -> int:
            model.eval(tokens)
            return int(numpy.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),)).argmax())

        model.reset()
        started = clock()
        token = step(prompt())
        burst.reading = PROMPT / (clock() - started)
        for _ in range(WARM):
            token = step([token])
        started = clock()
        for _ in range(DECODED):
            token = step([token])
        return DECODED / (clock() - started)

    return burst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="the interpreter of an environment with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bursts", type=int, default=8)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--reading", action="store_true", help="how fast prompts are read, and not decoding")
    parser.add_argument("--forms", default="int8", help="of ours: int8,bf16,fp32")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        clock = time.process_time if given.processor_time else time.perf_counter
        side = (theirs(given.file, given.threads, clock, not given.no_repack) if given.serve == LLAMA
                else ours(given.serve, given.threads, clock))

        def one() -> float:
            decoding = side()
            return side.reading if given.reading else decoding

        serve(one)
        return
    from tryplicity_plugins.models import smollm2

    options = ["--threads", str(given.threads), "--file", str(smollm2())]
    options += [f"--{name}" for name, wanted in (("processor-time", given.processor_time),
                                                 ("reading", given.reading),
                                                 ("no-repack", given.no_repack)) if wanted]
    workers = {form: Worker(form, "tests.benchmarks.llama", options) for form in given.forms.split(",")}
    if given.llama:
        workers[LLAMA] = Worker(LLAMA, "tests.benchmarks.llama", options, python=given.llama)
    for worker in workers.values():
        worker.burst()  # warm-up
    print(f"tokens per second{' of processor time' if given.processor_time else ''}, {given.threads} threads, "
          + ("reading" if given.reading else "decoding"))
    print("".join(f"{name:>12}" for name in workers))
    found: dict[str, list[float]] = {name: [] for name in workers}
    for burst in range(given.bursts):
        for name in workers if burst % 2 == 0 else reversed(workers):
            found[name].append(workers[name].burst())
        print("".join(f"{speeds[-1]:12.1f}" for speeds in found.values()), flush=True)
    for name, speeds in found.items():
        line = f"{name}: median {statistics.median(speeds):.1f}, best {max(speeds):.1f}"
        if LLAMA in found and name != LLAMA:
            ratio = statistics.median(a / b for a, b in zip(speeds, found[LLAMA], strict=True))
            line += f"; of llama.cpp's, pair by pair: median {ratio:.2f}"
        print(line)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
