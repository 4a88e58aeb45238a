"""Errors that are a user's to mend: each ends in one clear line, never in a traceback. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input. The message says where, what, and what to do. The command line prints it and exits with 2."""


class Refused(Exception):
    """The input is right and the answer is no (it does not fit, a check failed). Exits with 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean x?)', or the list of what there is when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]}?)"
    return f" (there are: {', '.join(known)})" if known else ""
