"""What became of a corpus, as a page of its own: no script, nothing from elsewhere, plots as SVG. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

KEPT, DROPPED, OTHER = "#6ee7b7", "#8b5cf6", "#67678c"
LEFT, WIDTH, RIGHT, ROW = 210, 440, 130, 26
_STYLE = """
:root { color-scheme: dark }
body { margin: 0; background: #10101f; color: #eeeef5; font: 15px/1.5 Inter, Helvetica, Arial, sans-serif }
main { max-width: 860px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 17px; margin: 36px 0 8px }
p { color: #a9a9c4; margin: 0 0 8px } svg { display: block; max-width: 100%; height: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: 4px 12px 4px 0; vertical-align: top }
th { color: #a9a9c4; font-weight: 500; border-bottom: 1px solid #2c2c47 } td { border-bottom: 1px solid #1a1a2e }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.text { color: #d6d6e6; overflow-wrap: anywhere }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 }
.figures div { background: #1a1a2e; border-radius: 8px; padding: 10px 18px }
.figures b { display: block; font-size: 22px }
.legend span { margin-right: 18px }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
margin-right: 6px }
"""


def page(said: Mapping[str, Any]) -> str:
    """The page of a report, whole."""
    name = escape(said["name"])
    parts = [f"<h1>{name}</h1>", "<p>What was kept of the corpus, what was left out, and why.</p>",
             _figures([(f"{said['documents']:,}", "documents kept"), (f"{said['bytes'] / 1e6:,.1f} MB", "of text"),
                       (f"{said['dropped']:,}", "left out")])]
    sources = [(source, [own["kept"].get("documents", 0), sum(own["dropped"].values())])
               for source, own in said["sources"].items()]
    parts += ["<h2>By source</h2>", _legend([(KEPT, "kept"), (DROPPED, "left out")]),
              _bars("documents by source", sources, (KEPT, DROPPED))]
    if said["domains"]:
        domains = [(domain, [size / 1e6]) for domain, size in said["domains"].items()]
        parts += ["<h2>By domain</h2>", _bars("megabytes kept by domain", domains, (KEPT,), " MB", 1)]
    reasons: Counter[str] = Counter()
    for own in said["sources"].values():
        reasons.update(own["dropped"])
    if reasons:
        parts += ["<h2>Why documents were left out</h2>",
                  _bars("documents by reason", [(reason, [n]) for reason, n in reasons.most_common()], (DROPPED,)),
                  _table(("reason", "such as"), [(reason, _quoted(said["examples"].get(reason, [])))
                                                 for reason, _ in reasons.most_common()])]
    if said["judges"]:
        words = ("keep", "drop", "no opinion")
        judged = [(judge, [counts.get(word, 0) for word in words]) for judge, counts in said["judges"].items()]
        parts += ["<h2>Judges</h2>", _legend([(KEPT, "keep"), (DROPPED, "drop"), (OTHER, "no opinion")]),
                  _bars("votes by judge", judged, (KEPT, DROPPED, OTHER))]
    if said["agreement"]:
        parts += ["<p>Agreement on the documents that both were asked about (Cohen's kappa; the dear judges are asked "
                  "only where the vote is open, which lowers it):</p>",
                  _table(("judges", "documents", "kappa"), [
                      (pair, f"{own['documents']:,}", "-" if own["kappa"] is None else f"{own['kappa']:.2f}")
                      for pair, own in said["agreement"].items()], numbers=(1, 2))]
    if kept := said["examples"].get("kept"):
        parts += ["<h2>Kept, for example</h2>",
                  _table(("document", "text"), [(one["id"], one["text"]) for one in kept])]
    return (f"<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            f"<meta name=\"viewport\" content=\"width=device-width\"><title>{name}: corpus report</title>\n"
            f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n")


def _figures(figures: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in figures)
    return f'<div class="figures">{inner}</div>'


def _legend(colours: Iterable[tuple[str, str]]) -> str:
    return '<p class="legend">' + "".join(f'<span><i style="background:{colour}"></i>{escape(what)}</span>'
                                          for colour, what in colours) + "</p>"


def _bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], colours: Sequence[str], unit: str = "",
          digits: int = 0) -> str:
    """A bar a row, its parts one after the other, on one scale."""
    most = max((sum(values) for _, values in rows), default=0) or 1
    height = ROW * len(rows) + 8
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" role="img" '
             f'aria-label="{escape(title)}" font-size="13">']
    for i, (name, values) in enumerate(rows):
        y, x = 4 + ROW * i, float(LEFT)
        short = name if len(name) <= 32 else name[:31] + "…"
        parts.append(f'<text x="{LEFT - 10}" y="{y + 16}" fill="#eeeef5" text-anchor="end">{escape(short)}'
                     f"<title>{escape(name)}</title></text>")
        for value, colour in zip(values, colours, strict=True):
            if value:
                width = value / most * WIDTH
                parts.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{ROW - 9}" rx="2" '
                             f'fill="{colour}"><title>{value:,.{digits}f}{unit}</title></rect>')
                x += width
        written = " / ".join(f"{value:,.{digits}f}{unit}" for value in values)
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 16}" fill="#a9a9c4">{written}</text>')
    return "".join([*parts, "</svg>"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(tag: str, row: Sequence[str]) -> str:
        kinds = ["n" if i in numbers else "text" if i else "" for i in range(len(row))]
        cells = (f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(kinds, row, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _quoted(examples: Sequence[Mapping[str, str]]) -> str:
    return f"{examples[0]['id']}: {examples[0]['text'][:120]}" if examples else ""
