"""A source's documents, read once into the cache and split into a training and a held-out part.

Loads no torch.

What the data is, its documents alone say: their ids, domains and texts in order. Where they lie, when they were written
and how the source was called make a key of the cache (`Source.fingerprint`) under which they are found without being
read again; the same documents from elsewhere are the same data.

A document is held out by a hash of its identity alone, so the split depends neither on order nor on what else
the corpus holds. Where an id has a `#`, what stands before it decides: the parts of one work never come
apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.data.cache import building
from tryplicity.errors import UserError
from tryplicity.files import write_text
from tryplicity.leftout import LeftOut
from tryplicity.progress import Progress, no_progress

if TYPE_CHECKING:
    from tryplicity.components import Document, Source

FORMAT = 2              # raise when the files written here change
HELD_OUT_SHARE = 0.02
LONGEST = 1 << 18       # characters of a document; a longer one becomes several

def unit_hash(text: str, salt: str = "") -> float:
    """A number in [0, 1) from a text, the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, key=salt.encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


# what ends a work (#), a document (:), a path, a query (?), a number (%) or a line
_SEPARATOR = re.compile(r"[%#:?\x00-\x1f\x7f\ud800-\udfff]")


def escaped(name: str) -> str:
    """A foreign name (of a file, a data set) as a piece of a document's id, where `#` and `:` have a meaning: these,
    `%` and what cannot be written as text become %XX, as in a URL. Different names stay different."""
    return _SEPARATOR.sub(lambda match: "".join(f"%{byte:02X}" for byte in _bytes(match[0])), name)


def _bytes(sign: str) -> bytes:
    try:
        return sign.encode("utf-8", "surrogateescape")      # a byte of a file's name that is not UTF-8
    except UnicodeEncodeError:
        return sign.encode("utf-8", "surrogatepass")


def split_hash(document_id: str) -> float:
    """The number that decides a document's part; one for all parts `work#part` of a work."""
    return unit_hash(document_id.split("#", 1)[0])


@dataclass(frozen=True)
class Collection:
    """The documents of one source in a folder of the cache. left_out: what was passed over when it was read."""

    folder: Path
    manifest: dict[str, Any]
    left_out: LeftOut

    @property
    def identity(self) -> str:
        """The same for the same documents, wherever they came from."""
        return self.manifest["identity"]

    @property
    def path(self) -> Path:
        return self.folder / "documents.jsonl"

    def is_held_out(self, document_id: str) -> bool:
        return split_hash(document_id) < self.manifest["held_out_below"]

    def documents(self, held_out: bool | None = None) -> Iterator[Document]:
        """All documents in the source's order, or those of one part. Without their URLs, which say where they lay."""
        from tryplicity.components import Document

        with open(self.path, encoding="utf-8", newline="\n") as lines:
            for line in lines:
                document = Document(**json.loads(line), url="")
                if held_out is None or self.is_held_out(document.id) == held_out:
                    yield document


def collect(source: Source, root: Path, progress: Progress = no_progress, longest: int | None = LONGEST,
            single: bool = False) -> Collection:
    """Read a source into the cache at `root`, or find it there.

    longest: characters beyond which a document is cut into parts of one work; None: none is. single: whether one work
    alone will do, as where nothing is trained on.
    Costs disk space of the size of the text. Raises UserError when there is no text, or a single work, of
    which nothing could be held out.
    """
    described = json.dumps([FORMAT, HELD_OUT_SHARE, source.name, source.fingerprint()])
    note = root / "sources" / f"{hashlib.sha256(described.encode()).hexdigest()[:24]}.json"
    known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if known is None or not (root / "documents" / known["documents"]).exists():
        manifest: dict[str, Any] = {}
        with building(root / "documents" / "new", lambda: manifest["identity"][:24]) as temporary:
            manifest |= {"format": FORMAT, **_write_documents(source, temporary / "documents.jsonl", progress, longest)}
            _check_single(source, manifest, single)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        left_out = source.left_out
        known = {"documents": manifest["identity"][:24], "kind": left_out.kind, "left_out": left_out.as_dict(),
                 "examples": left_out.examples}
        write_text(note, json.dumps(known, indent=1))
    folder = root / "documents" / known["documents"]
    found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    _check_single(source, found, single)
    return Collection(folder, found, LeftOut(known["kind"], known["left_out"], known["examples"]))


def in_parts(document: Document, longest: int) -> Iterator[Document]:
    """A document, or its parts of at most so many characters, which join to its text: cut after an empty line, a line
    or a space where there is one in their second half."""
    text, start, number = document.text, 0, 0
    if len(text) <= longest:
        yield document
        return
    while start < len(text):
        end = start + longest
        if end < len(text):
            places = (text.rfind(mark, start + longest // 2, end) + len(mark) for mark in ("\n\n", "\n", " "))
            end = next((place for place in places if place > start + longest // 2), end)
        number += 1
        # behind a `#`, so that the parts are trained on or held out together
        yield document._replace(id=f"{document.id}{'.' if '#' in document.id else '#'}{number}", text=text[start:end])
        start = end


def _check_single(source: Source, manifest: dict[str, Any], allowed: bool) -> None:
    if manifest.get("one_work") and not allowed:
        raise UserError(f"source {source.name}: the corpus is a single document; at least two are needed, "
                        "since one is held out to measure the model on text it has not seen")


def _write_documents(source: Source, path: Path, progress: Progress, longest: int | None) -> dict[str, Any]:
    domains: dict[str, dict[str, int]] = {}
    digest, number = hashlib.sha256(), 0
    lowest, below, highest = 1.0, 0, 0.0
    with open(path, "wb") as file:
        for document in (part for whole in source.documents()
                         for part in (in_parts(whole, longest) if longest else [whole])):
            text = document.text.encode("utf-8", "replace").decode()     # a lone surrogate has no bytes
            if not text.strip():
                source.left_out.add("empty", document.id)
                continue
            line = json.dumps({"id": document.id, "text": text, "domain": document.domain}, ensure_ascii=False) + "\n"
            encoded = line.encode("utf-8", "replace")
            file.write(encoded)
            digest.update(encoded)
            number += 1
            counts = domains.setdefault(document.domain, {"documents": 0, "bytes": 0})
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            place = split_hash(document.id)
            lowest, highest, below = min(lowest, place), max(highest, place), below + (place < HELD_OUT_SHARE)
            if number % 64 == 0:
                share = getattr(source, "read_share", None)
                progress("reading documents", *((number, None) if share is None else (share, 1.0)))
    if number == 0:
        raise UserError(f"source {source.name}: the corpus is empty: no document with any text in it")
    held_out_below = HELD_OUT_SHARE
    if below == 0:                  # a small corpus: hold out the one document that comes first
        held_out_below = math.nextafter(lowest, 1.0)
    elif highest < HELD_OUT_SHARE:  # everything would be held out: train on the one that comes last
        held_out_below = highest
    return {"documents": number, "bytes": sum(d["bytes"] for d in domains.values()),
            "domains": dict(sorted(domains.items())), "held_out_below": held_out_below,
            "identity": digest.hexdigest(), **({"one_work": True} if lowest == highest else {})}
