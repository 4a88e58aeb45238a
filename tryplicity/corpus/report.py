"""What became of a corpus: as one object, and as a page of Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tryplicity.corpus import report_page
from tryplicity.files import write_text


def write_report(folder: Path, name: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of a corpus, which is written into its folder and given back."""
    said = report(name, summaries)
    write_text(folder / "report.json", json.dumps(said, indent=1, ensure_ascii=False))
    write_text(folder / "report.md", markdown(said))
    write_text(folder / "report.html", report_page.page(said))
    return said


def report(name: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the shards: kept and dropped by source and reason, what judges said, agreement of pairs, samples."""
    sources: dict[str, dict[str, Any]] = {}
    examples: dict[str, list[dict[str, str]]] = {}
    judges: dict[str, Counter[str]] = {}
    pairs: dict[str, Counter[str]] = {}
    domains: Counter[str] = Counter()
    for summary in summaries:
        own = sources.setdefault(summary["source"], {"kept": Counter(), "dropped": Counter()})
        own["kept"].update(summary["kept"])
        own["dropped"].update(summary["dropped"])
        domains.update(summary["domains"])
        _add(judges, summary["judges"])
        _add(pairs, summary["pairs"])
        for what, some in summary["examples"].items():
            examples[what] = (examples.get(what, []) + some)[:3]
    return {
        "name": name,
        "documents": sum(own["kept"]["documents"] for own in sources.values()),
        "bytes": sum(own["kept"]["bytes"] for own in sources.values()),
        "dropped": sum(own["dropped"].total() for own in sources.values()),
        "domains": dict(domains.most_common()),
        "sources": {source: {"kept": dict(own["kept"]), "dropped": dict(own["dropped"].most_common())}
                    for source, own in sources.items()},
        "judges": {judge: dict(counts) for judge, counts in judges.items()},
        "agreement": {pair: {"documents": counts.total(), "kappa": kappa(counts)} for pair, counts in pairs.items()},
        "examples": examples,
    }


def _add(sums: dict[str, Counter[str]], more: Mapping[str, Mapping[str, int]]) -> None:
    for name, counts in more.items():
        sums.setdefault(name, Counter()).update(counts)


def kappa(pairs: Mapping[str, int]) -> float | None:
    """Cohen's kappa of two judges (Cohen, "A coefficient of agreement for nominal scales", 1960): 1 where they always
    agree, 0 where they agree as often as chance would have it; None where chance alone would always agree.

    pairs: how often it was "keep / drop" and so on.
    """
    both = Counter({tuple(pair.split(" / ")): count for pair, count in pairs.items()})
    total = both.total()
    words = {word for pair in both for word in pair}
    by_chance = sum(sum(count for (a, _), count in both.items() if a == word) *
                    sum(count for (_, b), count in both.items() if b == word) for word in words) / total**2
    agreed = sum(count for (a, b), count in both.items() if a == b) / total
    return None if by_chance >= 1 else (agreed - by_chance) / (1 - by_chance)


def markdown(said: Mapping[str, Any]) -> str:
    """The page of a report."""
    lines = [f"# {said['name']}", "",
             f"{said['documents']:,} documents kept ({said['bytes'] / 1e6:,.1f} MB of text); {said['dropped']:,} not",
             "", *_table(["source", "kept", "MB", "left out"],
                         [[name, f"{own['kept'].get('documents', 0):,}", f"{own['kept'].get('bytes', 0) / 1e6:,.1f}",
                           f"{sum(own['dropped'].values()):,}"] for name, own in said["sources"].items()])]
    reasons: Counter[str] = Counter()
    for own in said["sources"].values():
        reasons.update(own["dropped"])
    if reasons:
        rows = [[reason, f"{count:,}", _quoted(said["examples"].get(reason, []))]
                for reason, count in reasons.most_common()]
        lines += ["", "## Why", "", *_table(["reason", "documents", "such as"], rows)]
    if said["judges"]:
        words = ("keep", "drop", "no opinion")
        lines += ["", "## Judges", "", *_table(["judge", *words], [
            [judge, *(f"{counts.get(word, 0):,}" for word in words)] for judge, counts in said["judges"].items()])]
    if said["agreement"]:
        lines += ["", "Agreement on the documents that both were asked about (Cohen's kappa; the dear judges are asked "
                  "only where the vote is open, which lowers it):", "",
                  *_table(["judges", "documents", "kappa"], [
                      [pair, f"{own['documents']:,}", "-" if own["kappa"] is None else f"{own['kappa']:.2f}"]
                      for pair, own in said["agreement"].items()])]
    if kept := said["examples"].get("kept"):
        lines += ["", "## Kept, for example", "", *(f"- `{one['id']}`: {_plain(one['text'])}" for one in kept)]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head),
            *(f"| {' | '.join(map(_plain, row))} |" for row in rows)]


def _plain(text: str) -> str:
    """Text that is no Markdown of ours."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _quoted(examples: Sequence[Mapping[str, str]]) -> str:
    return f"{examples[0]['id']}: {examples[0]['text'][:80]}" if examples else ""
