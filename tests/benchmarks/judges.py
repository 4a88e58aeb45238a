"""The judge that counts beside datatrove's own filters on the same documents, in turn, on one core.

    pip install datatrove spacy && python -m tests.benchmarks.judges
"""

from __future__ import annotations

import itertools
import statistics
import time

from tryplicity import Document, load_plugins
from tryplicity_plugins.judges.measures import Text
from tryplicity_plugins.judges.statistical import c4, fineweb, gopher_quality, gopher_repetition

RULES = (gopher_quality, gopher_repetition, fineweb, c4)
DOCUMENTS, ROUNDS = 472, 3


def prose() -> list[Document]:
    """Every third of the prose documents that come with this installation."""
    source = load_plugins().registry.part("source", "python-docs").build()
    found = (d for d in source.documents() if d.domain == "text" and len(d.text) > 400)
    return list(itertools.islice(itertools.islice(found, 2, None, 3), DOCUMENTS))


def ours(document: Document) -> bool:
    text = Text(document.text)
    return all(rule(text) is None for rule in RULES)


def main() -> None:
    try:
        from datatrove import data
        from datatrove.pipeline import filters
    except ImportError:
        raise SystemExit("this needs datatrove: pip install datatrove spacy") from None
    theirs = [filters.GopherQualityFilter(), filters.GopherRepetitionFilter(), filters.FineWebQualityFilter(),
              filters.C4QualityFilter()]

    def peer(document: Document) -> bool:
        # a document of its own for each filter: C4's changes the text
        return all(rule.filter(data.Document(text=document.text, id=document.id)) is True for rule in theirs)

    documents, seconds, verdicts = prose(), {"ours": [], "datatrove": []}, {}
    for _ in range(ROUNDS):
        for name, judge in (("ours", ours), ("datatrove", peer)):
            began = time.process_time()
            verdicts[name] = [judge(document) for document in documents]
            seconds[name].append(time.process_time() - began)
    agreed = statistics.mean(a == b for a, b in zip(verdicts["ours"], verdicts["datatrove"], strict=True))
    size = sum(len(document.text) for document in documents) / 1e6
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:<10} {middle:7.2f} s of CPU for {len(documents)} documents, {size / middle:6.2f} MB/s")
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["datatrove"], strict=True))
    print(f"{ratio:.1f} times as fast (both stop at the first rule that objects); the same verdict for {agreed:.1%}")


if __name__ == "__main__":
    main()
