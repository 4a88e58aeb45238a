"""What a corpus on the disk holds. Loads no torch."""

from __future__ import annotations

import heapq
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tryplicity.corpus import deduplicate, overlap, shards
from tryplicity.corpus.recipe import Recipe
from tryplicity.data.documents import unit_hash
from tryplicity.data.grades import grade
from tryplicity.errors import UserError
from tryplicity.progress import Progress

if TYPE_CHECKING:
    from tryplicity.components import Document


LENGTHS = (200, 1_000, 5_000, 20_000, 100_000)  # characters, the borders of the histogram
GRADES = (4, 8, 12, 16)
GRADED = 500  # documents whose reading level is measured: those with the least hashes of their ids
SAMPLES = 3


def inspect(recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    """Counts of the filtered corpus, or of the raw one where it is not filtered yet. Raises UserError where there is
    nothing."""
    filtered = (folder / "filtered" / "manifest.json").exists()
    files = sorted((folder / "filtered").glob("*.parquet")) if filtered else [
        path for name in recipe.names() for path in shards.shards(folder / "raw" / name)]
    if not files:
        raise UserError(f"{folder}: nothing is there yet; run tryplicity data download")
    by_domain: dict[str, Counter[str]] = {}
    by_source: dict[str, Counter[str]] = {}
    lengths: Counter[str] = Counter()
    some: list[tuple[float, str, Any]] = []

    def counted(path: Path) -> Iterator[Document]:
        for document, source in shards.read_shard(path):
            size = len(document.text.encode("utf-8", "replace"))
            for counts, key in ((by_domain, document.domain), (by_source, source)):
                counts.setdefault(key, Counter()).update(documents=1, bytes=size)
            lengths[_bin(len(document.text), LENGTHS)] += 1
            heapq.heappush(some, (-unit_hash(document.id, "grade"), document.id, document))
            if len(some) > GRADED:
                heapq.heappop(some)
            yield document

    with tempfile.TemporaryDirectory() as temporary:
        signed = [Path(temporary) / f"{number}.npy" for number in range(len(files))]
        for number, (path, signatures) in enumerate(zip(files, signed, strict=True)):
            progress("reading shards", number, len(files))
            deduplicate.write_signatures(signatures, counted(path))
        exact, near = ([int(found.sum()) for found in of_each] for of_each in deduplicate.copies(signed, True))
    progress("looking for held-out text", 0, None)
    held_out = overlap.overlap(lambda: (document for path in files for document, _ in shards.read_shard(path)))
    progress("reading shards", len(files), len(files))
    chosen = [document for *_, document in sorted(some, reverse=True)]
    grades = np.array([grade(document) for document in chosen])
    levels = Counter(_bin(float(g), GRADES) for g in grades[~np.isnan(grades)])
    return {"name": recipe.name, "part": "filtered" if filtered else "raw", "files": len(files),
            "documents": lengths.total(), "bytes": sum(c["bytes"] for c in by_domain.values()),
            "domains": {key: dict(counts) for key, counts in sorted(by_domain.items())},
            "sources": {key: dict(counts) for key, counts in sorted(by_source.items())},
            "characters": _in_order(lengths, LENGTHS), "copies": sum(exact), "near_copies": sum(near),
            "held_out": held_out,
            "school_grades": {"of": int((~np.isnan(grades)).sum()), **_in_order(levels, GRADES)},
            "samples": list(map(_sample, chosen[:SAMPLES])), "by_quality": list(map(_sample, _by_quality(chosen)))}


def _by_quality(documents: Sequence[Document]) -> list[Document]:
    """The worst, the middle one and the best, by what their source says; none where it says nothing."""
    scored = sorted((document for document in documents if document.quality is not None), key=lambda d: d.quality)
    return [scored[0], scored[len(scored) // 2], scored[-1]] if len(scored) >= 3 else scored


def _sample(document: Document) -> dict[str, Any]:
    return {"id": document.id, "domain": document.domain, "quality": document.quality,
            "text": " ".join(document.text[:1000].split())[:200]}


def _bin(value: float, borders: tuple[int, ...]) -> str:
    for border in borders:
        if value < border:
            return f"under {border:,}"
    return f"{borders[-1]:,} and more"


def _in_order(counts: Mapping[str, int], borders: tuple[int, ...]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in [*(f"under {b:,}" for b in borders), f"{borders[-1]:,} and more"]}


def page(said: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{said['name']} ({said['part']}): {said['documents']:,} documents, {said['bytes'] / 1e6:,.1f} MB of text "
             f"in {said['files']} files; {said['copies']:,} copies to the letter, {said['near_copies']:,} nearly so"]
    for title, key in (("domain", "domains"), ("source", "sources")):
        lines += ["", f"{title:<20}{'documents':>12}{'MB':>12}"]
        lines += [f"{name:<20}{own['documents']:>12,}{own['bytes'] / 1e6:>12,.1f}" for name, own in said[key].items()]
    for title, counts in (("characters", said["characters"]),
                          (f"school grade, of {said['school_grades']['of']:,}",
                           {k: v for k, v in said["school_grades"].items() if k != "of"})):
        most = max([1, *counts.values()])
        lines += ["", title, *(f"  {name:<18}{count:>10,}  {'#' * round(40 * count / most)}"
                               for name, count in counts.items())]
    lines += ["", *overlap.lines(said["held_out"])]
    if said["by_quality"]:
        lines += ["", "by quality"]
        lines += [f"  {one['quality']:g}  {one['id']}: {one['text'][:110]}" for one in said["by_quality"]]
    lines += ["", "for example", *(f"  {one['id']}: {one['text'][:120]}" for one in said["samples"])]
    return "\n".join(lines)
