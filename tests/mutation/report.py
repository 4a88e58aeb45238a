"""The score of each package, and what survived."""

from __future__ import annotations

import json
from collections import defaultdict
from math import sqrt
from pathlib import Path
from typing import TextIO

from tests.mutation.coverage_map import ROOT
from tests.mutation.mutants import mutants_of

#: mutants that change nothing a user could see, by their key, each with its reason
EQUIVALENT: dict[str, str] = json.loads((Path(__file__).parent / "equivalent.json").read_text())


def wilson(caught: int, tried: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z, share = 1.96, caught / tried
    middle = (share + z * z / (2 * tried)) / (1 + z * z / tried)
    half = z * sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried)) / (1 + z * z / tried)
    return middle - half, middle + half


def page(results: Path, out: TextIO) -> None:
    """Markdown: a table of scores, and the survivors by file; of the mutants that the code has today."""
    latest = {r["lot"]: r for r in map(json.loads, results.read_text().splitlines())}
    files = {r["file"] for r in latest.values() if (ROOT / r["file"]).exists()}
    today = {mutant.lot for file in files for mutant in mutants_of(ROOT, file)}
    by_package = defaultdict(list)
    for result in latest.values():
        if result["lot"] in today and result["key"] not in EQUIVALENT:
            by_package[result["package"]].append(result)
    print("| package | tried | caught | score | 95 % interval |\n|---|---:|---:|---:|---|", file=out)
    for package, tried in sorted(by_package.items()):
        caught = sum(r["outcome"] in ("killed", "time") for r in tried)
        low, high = wilson(caught, len(tried))
        print(f"| {package} | {len(tried)} | {caught} | {caught / len(tried):.1%} | {low:.0%} to {high:.0%} |",
              file=out)
    survivors = sorted((r for those in by_package.values() for r in those
                        if r["outcome"] not in ("killed", "time")), key=lambda r: (r["file"], r["line"]))
    print(f"\n{len(survivors)} survive; {len(EQUIVALENT)} are noted as equivalent "
          "(tests/mutation/equivalent.json).\n", file=out)
    why = {"unreached": ", no test reaches it", "unsure": ", its tests fail without it too"}
    for r in survivors:
        print(f"- `{r['key']}` (line {r['line']}{why.get(r['outcome'], '')})", file=out)
