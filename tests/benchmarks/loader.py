"""How fast rows come, how fast text becomes tokens, and what memory a corpus of many gigabytes takes.

    python -m tests.benchmarks.loader                   all three
    python -m tests.benchmarks.loader --gb 1 10 50      other sizes (of text; the tokens are a hole in a file)

The memory is the process's own (RssAnon), sampled while it reads through two changes of stage; what is mapped from
files the system takes back when it needs it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from pathlib import Path

BYTES_PER_DOCUMENT, BYTES_PER_TOKEN = 4000, 4      # of web text


def rows(folder: Path) -> None:
    import torch

    from tests.data.fake import fake_tokens
    from tryplicity.data.packing import PackedStream

    torch.set_num_threads(1)
    tokens = fake_tokens(folder, 20_000, mean=BYTES_PER_DOCUMENT // BYTES_PER_TOKEN)
    for length in (256, 512, 1024, 4096):
        stream, state, speeds = PackedStream(tokens, 0), {}, []
        for _ in range(5):
            began, steps = time.process_time(), 2_000_000 // (16 * length)
            for _ in range(steps):
                _, state = stream.take(state, 16, length)
            speeds.append(steps * 16 * length / (time.process_time() - began))
        print(f"rows of {length:>5}: {statistics.median(speeds) / 1e6:6.2f} M tokens a second of one core")


def tokenising(rounds: int) -> None:
    """Beside encode_batch of the same texts, and encode_batch_fast, in turn; CPU seconds too, which a busy machine
    changes less."""
    from tryplicity import load_plugins
    from tryplicity.data import parse_source
    from tryplicity.data.cache import cache_root
    from tryplicity.data.documents import collect, no_progress
    from tryplicity.data.prepared import trained_tokenizer
    from tryplicity.data.token_files import _batches, write_tokens
    from tryplicity.data.tokenizer import load_tokenizer

    collection = collect(parse_source(load_plugins().registry, "python-docs"), cache_root())
    path = trained_tokenizer(collection, 8192, cache_root(), no_progress)
    tokenizer = load_tokenizer(path)
    batches = [[document.text for document in batch] for batch in _batches(collection.documents())]

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_bytes(path.read_bytes())
            write_tokens(collection, tokenizer, Path(folder), no_progress)

    ways = {"encode_batch": lambda: [tokenizer.encode_batch(texts, add_special_tokens=False) for texts in batches],
            "encode_batch_fast": lambda: [tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                                          for texts in batches],
            "documents' file to token files": ours}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter(), time.process_time()
            way()
            spent[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    *_, own = spent.values()
    for name, seconds in spent.items():
        wall, cpu = (statistics.median(s[i] / o[i] for s, o in zip(seconds, own, strict=True)) for i in (0, 1))
        middle = [statistics.median(s[i] for s in seconds) for i in (0, 1)]
        print(f"{name:<32}{middle[0]:7.2f} s, {middle[1]:7.2f} of CPU; ours at {wall:.0%} of its speed, "
              f"{cpu:.0%} by CPU")


def memory(gigabytes: float, folder: Path) -> None:
    from tests.data.fake import fake_tokens
    from tryplicity.data.mixture import Mixture

    documents = int(gigabytes * 1e9 / BYTES_PER_DOCUMENT)
    tokens = fake_tokens(folder / f"{gigabytes:g}", documents, mean=BYTES_PER_DOCUMENT // BYTES_PER_TOKEN)
    peak, ended = [own_memory()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], own_memory())

    Mixture(tokens, 0).batch({}, 1, 1024)       # what torch and numpy load is no corpus
    threading.Thread(target=watch).start()
    began, positions = time.perf_counter(), {}
    for shares, length in ((None, 1024), (None, 4096), ({"code": 1.0, "text": 2.0}, 1024)):
        mixture = Mixture(tokens, 0, shares)
        for _ in range(200):
            _, positions = mixture.batch(positions, 16, length)
    ended.set()
    print(f"{gigabytes:>5g} GB of text, {documents:>12,} documents: {peak[0]:6.1f} MB of its own at most, "
          f"{time.perf_counter() - began:5.1f} s")


def own_memory() -> float:
    """MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gb", type=float, nargs="*", default=[1, 10, 50])
    options.add_argument("--only", choices=("rows", "tokenising", "memory"))
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.only in (None, "rows"):
            rows(Path(folder) / "rows")
        if given.only in (None, "memory"):
            for size in given.gb:       # a process each: what one took another does not have
                process = multiprocessing.get_context("spawn").Process(target=memory, args=(size, Path(folder)))
                process.start()
                process.join()
        if given.only in (None, "tokenising"):
            tokenising(given.rounds)


if __name__ == "__main__":
    main()
