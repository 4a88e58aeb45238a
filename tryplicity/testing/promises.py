"""What a promise is, and how one that is broken is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from tryplicity.testing.trial import Trial

#: the page that says of each promise what is owed and how
PAGE = "docs/plugins.md"


class Broken(Exception):
    """A promise that is not kept: what came, and what was due."""


class NotAsked(Exception):
    """A promise that cannot be tried here, or has no meaning for this component: why."""


@dataclass(frozen=True)
class Promise:
    """One thing that the components of some families owe."""

    what: str
    """In a sentence."""
    families: tuple[str, ...]
    read: str
    """The heading of `PAGE` under which it stands."""
    trying: Callable[[Trial], None]
    """Raises Broken or NotAsked; anything else that it raises is the component's own failure."""
    several_ranks: bool
    """Whether it starts other processes: seconds rather than tenths."""


class Finding(NamedTuple):
    """What became of one promise."""

    promise: Promise
    verdict: Literal["kept", "broken", "not asked"]
    why: str = ""

    def __str__(self) -> str:
        more = f": {self.why}" if self.why else ""
        where = f" ({PAGE}#{self.promise.read})" if self.verdict == "broken" else ""
        return f"{self.promise.what}{more}{where}"


#: in the order in which they are tried: what the later ones rest on comes first
PROMISES: list[Promise] = []

LAYERS = ("mixer", "feed_forward")
#: families that are tried as a part of a layer, and keep what a layer promises there
IN_A_LAYER = ("linear", "norm", "activation", "router", "residual")
MODULES = (*LAYERS, *IN_A_LAYER, "head", "objective")


def promised(*families: str, read: str, several_ranks: bool = False) -> Callable[[Callable], Callable]:
    """A function of a Trial as a promise of these families; its docstring's first sentence says what is promised."""

    def add(trying: Callable[[Trial], None]) -> Callable[[Trial], None]:
        what = trying.__doc__.partition(".")[0].replace("\n", " ")
        PROMISES.append(Promise(" ".join(what.split()), families, read, trying, several_ranks))
        return trying

    return add


def tried(trial: Trial, promises: list[Promise]) -> Iterator[Finding]:
    """What becomes of each."""
    from tryplicity.errors import Unreachable
    from tryplicity.testing.offline import without_network

    for promise in promises:
        try:
            with without_network():
                promise.trying(trial)
            yield Finding(promise, "kept")
        except Broken as error:
            yield Finding(promise, "broken", " ".join(str(error).split()))
        except (NotAsked, Unreachable) as error:
            yield Finding(promise, "not asked", " ".join(str(error).split()))
        except Exception as error:  # a stranger's component may fail in any way
            yield Finding(promise, "broken", " ".join(f"{type(error).__name__}: {error}".split())[:500])
