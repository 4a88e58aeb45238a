"""Search over 100,000 passages: time to build, size, time per question; and how often the right passage is found.

    python -m tests.benchmarks.search [--passages 100000] [--questions 500] [--semantic]

The passages are cut from what is installed: reference pages, documentation and Python sources. The questions of the
timing are the written ones of tests/search/questions.yaml, names, and runs of words out of passages. The hits are
measured on the index that search has by default, and on that of Python's own documentation, with the questions whose
right passages are known: 40 and 36 of questions.yaml, of which the 40 have been looked at several times by now, and the
two halves of library.yaml, of which the ranking was worked on with `tuning` alone. --semantic adds the
retriever of that name, which needs its extra and embeds the reference once (minutes).
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.search.test_questions import hits, library
from tryplicity import Document, load_plugins
from tryplicity.data import parse_source
from tryplicity.search.building import build_index
from tryplicity.search.cutting import cut
from tryplicity.search.index import PassageIndex
from tryplicity.spec import parse_value

QUESTIONS = Path(__file__).parents[1] / "search" / "questions.yaml"


def installed_text(registry) -> Iterator[Document]:
    """Reference pages, documentation with sources, and then every Python file of the installed packages."""
    import torch

    yield from parse_source(registry, "python-reference").documents()
    yield from parse_source(registry, "python-docs").documents()
    root = Path(torch.__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        try:
            yield Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"), "code", path.as_uri())
        except (UnicodeDecodeError, OSError):
            continue


def so_many(documents: Iterator[Document], passages: int) -> list[Document]:
    """Documents that are cut into about so many passages, no two the same."""
    chosen, seen = [], set()
    for document in documents:
        before = len(seen)
        seen.update((title, " ".join(text.split())) for title, text in cut(document))
        if len(seen) > before:
            chosen.append(document)
        if len(seen) >= passages:
            break
    return chosen


def asked(documents: list[Document], written: list[str], number: int) -> list[str]:
    """Questions of several kinds, the same for the same documents."""
    rng = random.Random(0)
    questions = list(written)
    while len(questions) < number:
        document = rng.choice(documents)
        words = re.findall(r"[^\W\d]\w+", document.text)
        if len(words) < 20:
            continue
        start, length = rng.randrange(len(words) - 10), rng.randint(1, 10)
        kind = rng.randrange(3)
        if kind == 0:
            questions.append(f"What does {document.text.split(None, 1)[0][:60]} do?")
        else:
            questions.append(" ".join(words[start:start + length]))
    rng.shuffle(questions)
    return questions


def found(search, questions) -> tuple[float, float]:
    """hit@1 and hit@5."""
    return hits(search, questions, 1), hits(search, questions, 5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--semantic", action="store_true")
    options = parser.parse_args(arguments)
    registry = load_plugins().registry
    written = parse_value(QUESTIONS.read_text(encoding="utf-8"), QUESTIONS.name)
    sets = {f"{part} {len(those)}": those for part, those in written.items()}
    sets |= {f"library, {which} {len(library(which))}": library(which) for which in ("tuning", "unseen")}

    with tempfile.TemporaryDirectory() as folder:
        documents = so_many(installed_text(registry), options.passages)
        began = time.perf_counter()
        path = build_index(documents, Path(folder) / "all.sqlite")
        built = time.perf_counter() - began
        index = PassageIndex(path)
        questions = asked(documents, [q["ask"] for part in written.values() for q in part], options.questions)
        seconds = []
        for question in questions:
            began = time.perf_counter()
            index.search(question, 5)
            seconds.append(time.perf_counter() - began)
        cuts = statistics.quantiles(seconds, n=100)
        text = sum(len(document.text) for document in documents)
        print(f"{len(index):,} passages of {text / 1e6:.0f} MB text: built in {built:.1f} s, "
              f"{path.stat().st_size / 1e6:.0f} MB")
        print(f"{len(questions)} questions, each for the first time: p50 {1e3 * cuts[49]:.1f} ms, "
              f"p99 {1e3 * cuts[98]:.1f} ms, slowest {1e3 * max(seconds):.1f} ms")

        print(f"\n{'index':34}{'passages':>10}{'questions':>20}{'hit@1':>8}{'hit@5':>8}")
        for name, source in (("Python", {"type": "python-reference", "packages": ["python"]}),
                             ("Python and packages (the default)", "python-reference")):
            given = parse_source(registry, source)
            path = build_index(given.documents(), Path(folder) / f"{name[:8]}.sqlite", source=given)
            retrievers = {name: PassageIndex(path)}
            if options.semantic and name == "Python":
                retrievers[f"{name}, semantic"] = registry.part(
                    "retriever", {"type": "semantic", "index": str(path)}).build()
            for label, retriever in retrievers.items():
                for part, those in sets.items():
                    first, five = found(retriever.search, those)
                    print(f"{label:34}{len(PassageIndex(path)):>10,}{part:>20}"
                          f"{first:>8.3f}{five:>8.3f}")


if __name__ == "__main__":
    main()
