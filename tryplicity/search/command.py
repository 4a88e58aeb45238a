"""What `tryplicity search index` and `tryplicity search ask` do; the command line shows what these return."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.search.building import DEFAULT_SOURCE, build_index, ensure_index
from tryplicity.search.index import PassageIndex

if TYPE_CHECKING:
    from tryplicity.progress import Progress
    from tryplicity.registry import Registry

_WIDTH, _LINES = 100, 4     # of a passage as it is shown


def index(source: str, out: str | Path | None, registry: Registry, progress: Progress | None = None) -> dict[str, Any]:
    """Index a folder, a file or a corpus (`source`, as --data names it) into the file `out`, or into the cache.

    Returns {"index", "passages", "left_out", "repeated", "megabytes", "seconds", "_left_out"}; left_out: how many of
    the source's files (or what it has) and why; repeated: passages left out for being the same as one before;
    _left_out: the same as lines with an example of each. Raises UserError as `parse_source` and `build_index` do.
    """
    began = time.perf_counter()
    if out is None:
        path = ensure_index(source, registry, progress)
    else:
        from tryplicity.data import parse_source

        given = parse_source(registry, source, "SOURCE")
        path = build_index(given.documents(), out, progress, source=given, fingerprint=given.fingerprint())
    opened = PassageIndex(path)
    counts = {one.kind: one.as_dict() for one in opened.left_out}
    repeated = sum(counts.pop("passages", {}).values())
    return {"index": str(path), "passages": len(opened),
            "left_out": next(iter(counts.values()), {}), "repeated": repeated,
            "megabytes": round(path.stat().st_size / 1e6, 1), "seconds": round(time.perf_counter() - began, 1),
            "_left_out": [str(one) for one in opened.left_out]}


def ask(question: str, path: str | Path | None, limit: int, registry: Registry,
        progress: Progress | None = None) -> dict[str, Any]:
    """The passages for a question. path: an index file; none: the index of this installation's documentation.

    Returns {"query", "results": [{"id", "title", "url", "text", "score"}], "seconds"}, as /api/search does.
    """
    opened = PassageIndex(path if path is not None else ensure_index(DEFAULT_SOURCE, registry, progress))
    began = time.perf_counter()
    results = opened.search(question, limit)
    return {"query": question, "results": [passage._asdict() for passage in results],
            "seconds": round(time.perf_counter() - began, 4)}


def as_json(answer: dict[str, Any]) -> str:
    """What a program reads: all but what begins with `_`."""
    return json.dumps({key: value for key, value in answer.items() if key[0] != "_"}, indent=1, ensure_ascii=False)


def index_page(answer: dict[str, Any]) -> str:
    """What a person reads of `index`."""
    left_out = "".join(f"{_printable(line)}\n" for line in answer["_left_out"])
    return (f"{answer['passages']:,} passages, {answer['megabytes']} MB, in {answer['seconds']} s: {answer['index']}\n"
            f"{left_out}ask it: tryplicity search ask \"...\" --index {answer['index']}")


def ask_page(answer: dict[str, Any]) -> str:
    """What a person reads of `ask`: each passage's title, where it is from, and how it begins."""
    if not answer["results"]:
        return "nothing found; other words may help"
    return "\n\n".join(_shown(number, result) for number, result in enumerate(answer["results"], 1))


def _shown(number: int, result: dict[str, Any]) -> str:
    lines = textwrap.wrap(_printable(" ".join(result["text"].split())), _WIDTH, max_lines=_LINES, placeholder=" ...")
    return "\n".join([f"[{number}] {_printable(result['title'])}", f"    {_printable(result['url'])}",
                      *(f"    {line}" for line in lines)])


def _printable(text: str) -> str:
    """Without signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
