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


def tokenising() -> None:
    """Beside encode_batch of the same texts, in turn; CPU seconds too, which a busy machine does not change."""
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
    batches = list(_batches(collection.documents()))

    def raw() -> None:
        for batch in batches:
            tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_bytes(path.read_bytes())
            write_tokens(collection, tokenizer, Path(folder), no_progress)

    walls, cpus = [], []
    for _ in range(3):
        spent = []
        for what in (raw, ours):
            began = time.perf_counter(), time.process_time()
            what()
            spent.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        walls.append(spent[0][0] / spent[1][0])
        cpus.append(spent[0][1] / spent[1][1])
        print(f"encode_batch alone {spent[0][0]:6.2f} s ({spent[0][1]:.2f} of CPU), all of it "
              f"{spent[1][0]:6.2f} s ({spent[1][1]:.2f})")
    print(f"tokenising at {statistics.median(walls):.0%} of encode_batch's speed ({statistics.median(cpus):.0%} by CPU "
          f"time), {collection.manifest['bytes'] / 1e6:.1f} MB")


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
            tokenising()


if __name__ == "__main__":
    main()
