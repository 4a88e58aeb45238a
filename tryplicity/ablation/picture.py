"""report.svg: a dot and its interval for each module on one axis. Its own dark ground: it reads on any page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

GROUND, TEXT, DIM, LINE = "#10101f", "#eeeef5", "#9a9ab0", "#3a3a55"
COLOURS = {"pays": "#4ade80", "costs": "#f87171"}
OTHER = "#8b5cf6"
LEFT, WIDTH, RIGHT, TOP, ROW, BOTTOM = 200, 420, 200, 64, 28, 56


def svg(report: Mapping[str, Any]) -> str:
    """The changes of held-out bits per byte, with their 95% intervals where there are several seeds."""
    rows = report["modules"]
    changes = [row["held_out_bits_per_byte"] for row in rows]
    shown = [0.0, *(c["change"] for c in changes if c["change"] is not None),
             *(end for c in changes if c["interval_95"] for end in c["interval_95"])]
    step = _step(max(shown) - min(shown))
    low, high = math.floor(min(shown) / step) * step, math.ceil(max(shown) / step) * step
    if low == high:
        low, high = low - step, high + step

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * WIDTH

    height, bottom = TOP + ROW * len(rows) + BOTTOM, TOP + ROW * len(rows)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" height="{height}" '
             f'viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" font-family="Inter, Helvetica, Arial, sans-serif" '
             f'font-size="13">', f'<rect width="100%" height="100%" rx="8" fill="{GROUND}"/>',
             _text(16, 26, f"{report['spec']}: what having each module changes", TEXT, "start", bold=True),
             _text(16, 46, "held-out bits per byte, mean and 95% interval over seeds; left of zero is better", DIM)]
    for i in range(round((high - low) / step) + 1):
        at = low + i * step
        zero = abs(at) < step / 2
        parts.append(f'<line x1="{x(at):.1f}" y1="{TOP}" x2="{x(at):.1f}" y2="{bottom}" '
                     f'stroke="{DIM if zero else LINE}" stroke-width="{1.5 if zero else 0.5}"/>')
        parts.append(_text(x(at), bottom + 18, "0" if zero else f"{at:+.{_digits(step)}f}", DIM, "middle"))
    for i, (row, change) in enumerate(zip(rows, changes, strict=True)):
        y, colour = TOP + ROW * i + ROW / 2, COLOURS.get(row["verdict"], OTHER)
        parts.append(_text(LEFT - 12, y + 4, row["module"], TEXT, "end"))
        said = row["verdict"]
        if change["interval_95"]:
            ends = [x(end) for end in change["interval_95"]]
            parts.append(f'<line x1="{ends[0]:.1f}" y1="{y}" x2="{ends[1]:.1f}" y2="{y}" stroke="{colour}" '
                         'stroke-width="2"/>')
            parts += [f'<line x1="{end:.1f}" y1="{y - 5}" x2="{end:.1f}" y2="{y + 5}" stroke="{colour}" '
                      'stroke-width="2"/>' for end in ends]
        if change["change"] is not None:
            parts.append(f'<circle cx="{x(change["change"]):.1f}" cy="{y}" r="5" fill="{colour}"/>')
            said = f"{change['change']:+.4f}  {said}"
        parts.append(_text(LEFT + WIDTH + 16, y + 4, said, colour))
    parts.append(_text(16, height - 14, f"{report['tokens']:,} tokens a cell, {report['seeds']} seeds", DIM))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _step(span: float) -> float:
    """A round distance between ticks, about five in all."""
    rough = span / 5 or 0.001
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))
