"""Errors that are a user's to mend: each ends in one clear line, never in a traceback. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input: the message says where, what and what to do. The command line then exits with 2."""


class Unreachable(UserError):
    """What is wanted is elsewhere, and cannot be had just now: whoever can wait may try again."""

    #: seconds to wait before that, where who was asked said so
    wait: float = 0.0


class Refused(Exception):
    """The input is right and the answer is no (it does not fit, a check failed). Exits with 1."""


class PluginFault(Exception):
    """A part of the program or a plugin failed at its work: the message names it, its file and line, and what to do.
    The command line then exits with 3."""


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely stands for, whatever its case; None if nothing is near."""
    by_lower = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """' (did you mean x?)', or the list of what there is when nothing is near."""
    known = sorted(known)
    near = nearest(word, known)
    if near:
        return f" (did you mean {near}?)"
    return f" (there are: {', '.join(known)})" if known else ""
