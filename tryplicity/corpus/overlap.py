"""How much of the text that a run would hold out stands in the text that it would train on. Loads no torch.

By 13 words in a row, as Brown et al., "Language models are few-shot learners" (2020), appendix C, look for it. The
split is the trainer's: by the hash of a document's id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tryplicity.data.documents import HELD_OUT_SHARE, split_hash
from tryplicity.data.yardsticks import windows

if TYPE_CHECKING:
    from tryplicity.components import Document

MOST_BYTES = 16_000_000     # of held-out text that is looked for; each takes a few bytes of memory
WORST = 5


def overlap(documents: Callable[[], Iterable[Document]]) -> dict[str, Any]:
    """documents: gives all of them, each time it is called. Counts of the held-out documents and their windows of 13
    words, of the windows that stand in a training document too, of the documents with any such and with half of
    theirs; and the worst of these."""
    held, every = _held_out(documents())
    distinct = np.unique(np.concatenate(every)) if every else np.empty(0, dtype=np.uint64)
    seen = np.zeros(len(distinct), dtype=bool)
    ids = {document_id for document_id in held}
    if len(distinct):
        for document in documents():
            if document.id not in ids and split_hash(document.id) >= HELD_OUT_SHARE:
                found = windows(document.text)
                place = np.minimum(np.searchsorted(distinct, found), len(distinct) - 1)
                seen[place[distinct[place] == found]] = True
    counts = [(int(seen[np.searchsorted(distinct, own)].sum()), len(own)) for own in every]
    shares = sorted(((there / of, name) for (there, of), name in zip(counts, held, strict=True) if of), reverse=True)
    windows_, found_ = sum(of for _, of in counts), sum(there for there, _ in counts)
    return {"held_out_documents": len(held), "windows": windows_, "windows_in_training": found_,
            "share": found_ / windows_ if windows_ else None,
            "documents_with_any": sum(share > 0 for share, _ in shares),
            "documents_with_half": sum(share >= 0.5 for share, _ in shares),
            "worst": [{"id": name, "share": share} for share, name in shares[:WORST] if share > 0]}


def _held_out(documents: Iterable[Document]) -> tuple[list[str], list[np.ndarray]]:
    """The ids of the held-out documents, of about MOST_BYTES at most, and the windows of each. Of a small corpus it is
    the one that comes first, as for the trainer."""
    held: list[str] = []
    every: list[np.ndarray] = []
    size, first = 0, (1.0, "", "")
    for document in documents:
        place = split_hash(document.id)
        if place < HELD_OUT_SHARE and size < MOST_BYTES:
            held.append(document.id)
            every.append(windows(document.text))
            size += len(document.text)
        elif place < first[0]:
            first = (place, document.id, document.text)
    if not held and first[1]:
        return [first[1]], [windows(first[2])]
    return held, every


def lines(said: dict[str, Any]) -> Sequence[str]:
    """The same for a person."""
    if said["share"] is None:
        return ["held out: no text of 13 words"]
    worst = "".join(f"\n  {one['share']:>6.1%}  {one['id']}" for one in said["worst"])
    return [f"held out: {said['held_out_documents']:,} documents; {said['share']:.2%} of {said['windows']:,} runs of "
            f"13 words stand in the training text too: any in {said['documents_with_any']:,} documents, half in "
            f"{said['documents_with_half']:,}{worst}"]
