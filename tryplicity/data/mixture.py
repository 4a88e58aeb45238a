"""Rows of several domains at given shares, as a pure function of what each domain's stream has delivered.

Each domain has a PackedStream of its own. The next row is taken from the domain that lacks most of its share so far,
so that after any number of rows every domain is within one row of its share, without a random number. The state
is a dict that a checkpoint keeps as it is:

    {"text:1706": {"epoch": 0, "start": 0, "rows": [[512, 80]]}, "code:1068": ...       where each stream stands
     "code=0.25,text=0.75/text": 24576, "code=0.25,text=0.75/code": 8192}     tokens of each domain under these shares

A stream is named by its domain and the number of its documents: the stages of a curriculum that read the same
documents go on where the one before stopped, each with shares of its own, and one dict serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from tryplicity.data.ordering import numbers
from tryplicity.data.packing import Batch, PackedStream, Piece, TokenFile, joined
from tryplicity.errors import UserError

if TYPE_CHECKING:
    from typing import Self

    from tryplicity.data.prepared import Prepared

Positions = Mapping[str, Any]


class Mixture:
    """The training rows of some documents, mixed by domain.

    warning: one line for the user where some domains have nothing to give, else None.
    shares: the share of each domain that rows come from; empty where the documents are not mixed by domain.
    """

    def __init__(self, tokens: TokenFile, seed: int, mixture: Mapping[str, float] | None = None,
                 documents: np.ndarray | None = None, description: str = "") -> None:
        """mixture: the share of each domain, relative to the others; None: the documents as they are, in one
        stream. documents: only these; None: all. description: of those documents in messages.

        The share of a domain that has none of the documents goes to the others, in proportion. Raises UserError
        where nothing is left.
        """
        description = f" {description}" if description else ""
        there = {domain: tokens.choose([domain], documents) for domain in tokens.domains}
        there = {domain: chosen for domain, chosen in there.items() if tokens.size_of(chosen)}
        asked = dict.fromkeys(there, 1.0) if mixture is None else {d: s for d, s in mixture.items() if s > 0}
        absent = [domain for domain in asked if domain not in there]
        if not set(asked) & set(there):
            has = f"there is some in: {', '.join(there)}" if there else "there is none in any other either"
            easier = "raise the reading level (max_grade) or " if documents is not None else ""
            wanted = ", ".join(asked or tokens.domains)
            raise UserError(f"no training text{description} in the domains {wanted} ({has}); {easier}change the "
                            "mixture, or train on other data")
        self.warning, self.shares = None, {}
        if mixture is None:
            self._streams = {"": PackedStream(tokens, seed, documents=documents)}
        else:
            whole = sum(asked[domain] for domain in asked if domain in there)
            self.shares = {domain: asked[domain] / whole for domain in sorted(asked) if domain in there}
            self._streams = {domain: PackedStream(tokens, seed, documents=there[domain]) for domain in self.shares}
        if absent:
            became = ", ".join(f"{domain} {share:.0%}" for domain, share in self.shares.items())
            self.warning = (f"no training text{description} in the domain{'s' if len(absent) > 1 else ''} "
                            f"{', '.join(absent)}; the share goes to the others: {became}")
        signature = ",".join(f"{_name(domain)}={share:g}" for domain, share in self.shares.items())
        self._names = {domain: (f"{_name(domain) or 'all'}:{len(stream.chosen)}", f"{signature}/{_name(domain)}")
                       for domain, stream in self._streams.items()}

    @classmethod
    def graded(cls, prepared: Prepared, seed: int, mixture: Mapping[str, float] | None = None,
               max_grade: float | None = None) -> Self:
        """The training rows of the documents that read no harder than a school grade; None, or where that leaves
        nothing: of all."""
        if max_grade is None:
            return cls(prepared.train, seed, mixture)
        grades_D, level = prepared.grades(), f"up to grade {max_grade:g}"
        easy = numbers(len(grades_D), lambda some: grades_D[some] <= max_grade, prepared.folder)
        try:
            return cls(prepared.train, seed, mixture, easy, level)
        except UserError:
            whole = cls(prepared.train, seed, mixture)
            whole.warning = f"no training text {level}; it takes texts of any" + (
                f" ({whole.warning})" if whole.warning else "")
            return whole

    def batch(self, positions: Positions, rows: int, context_length: int,
              made: slice = slice(None)) -> tuple[Batch, dict[str, Any]]:
        """Of the `rows` rows that follow on `positions` ({} at the beginning) those that are to be `made`, and the
        positions after all of them."""
        positions, wanted = dict(positions), range(rows)[made]
        found: dict[str, list[tuple[int, list[Piece]]]] = {}
        for number in range(rows):
            domain = self._next(positions, context_length)
            at, delivered = self._names[domain]
            pieces, positions[at] = self._streams[domain].next_row(positions.get(at, {}), context_length)
            if number in wanted:
                found.setdefault(domain, []).append((number, pieces))
            if self.shares:
                positions[delivered] = positions.get(delivered, 0) + context_length
        whole = joined([self._streams[domain].rows([pieces for _, pieces in some], context_length)
                        for domain, some in found.items()], context_length)
        if len(found) > 1:      # as they came
            order = np.argsort([number for some in found.values() for number, _ in some])
            whole = whole._replace(ids_BT=whole.ids_BT[order], targets_BT=whole.targets_BT[order],
                                   doc_ids_BT=whole.doc_ids_BT[order],
                                   documents=tuple(whole.documents[row] for row in order))
        return whole, positions

    def tokens(self) -> dict[str, int]:
        """Tokens of each stream's documents; a stage that asks for more goes over them again."""
        return {domain or "all": stream.tokens_per_epoch for domain, stream in self._streams.items()}

    def _next(self, positions: Positions, context_length: int) -> str:
        """The domain that lacks most of its share, the next row counted; of several, the first by name."""
        if not self.shares:
            return ""
        delivered = {domain: positions.get(self._names[domain][1], 0) for domain in self.shares}
        total = sum(delivered.values()) + context_length
        return max(self.shares, key=lambda domain: self.shares[domain] * total - delivered[domain])


def _name(domain: str) -> str:
    """A domain, which any source may name as it likes, as a piece of a position's name."""
    return quote(domain, safe="")
