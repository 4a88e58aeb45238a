"""Whether a sentence may rest on a sentence of a passage: how much of it that holds, and whether the two disagree.

    disagreement(Claim("no OSError is raised"), Claim("an OSError is raised"))  ->  "negation"

These are rules on words, not understanding. They lean to one side: what might contradict is not taken for support, and
much that does support in other words is lost. What they compare: negation by clause, numbers with their units, names,
opposites, the strength of a claim (all, only, must), and who does what to whom by the order of words.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from typing import NamedTuple

from tryplicity.search.words import STOP_WORDS, stem, words

_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[`]*[^\W_a-z])|\n\s*\n")


def sentences(text: str) -> list[str]:
    """Of a passage, each on one line."""
    return [joined for part in _SENTENCE.split(text) if (joined := " ".join(part.split()))]


# --- what is told apart ---

_NEGATES_CLAUSE = frozenset((
    "not", "never", "neither", "nor", "cannot", "nobody", "nothing", "nowhere", "hardly", "scarcely", "barely",
    "rarely", "seldom", "unless", "fail", "fails", "failed", "lack", "lacks", "avoid", "avoids"))
_NEGATES_NEXT = frozenset(("no", "none", "without", "non"))
_PARTS = frozenset((                # words that begin a clause
    "if", "when", "whenever", "unless", "but", "because", "while", "although", "though", "otherwise", "whereas",
    "which", "that", "who", "and", "or", "so", "then", "until", "except"))
_CONDITIONS = frozenset(("if", "when", "whenever", "unless"))
_DIRECTIONS = frozenset((
    "to", "from", "into", "onto", "before", "after", "by", "than", "over", "under", "through", "for"))
# how strong a claim is, and the words of a passage that are as strong; stems
_STRONG = {stem(word): frozenset(map(stem, strong)) for word, strong in (
    ("always", ("always", "all", "every", "each")), ("only", ("only",)), ("must", ("must",)),
    ("exactly", ("exactly",)), ("every", ("all", "every", "each", "any")), ("all", ("all", "every", "each", "any")))}
_NUMBERS = {word: str(number) for number, word in enumerate((
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"))}
_VALUES = frozenset(map(stem, ("true", "false", "none")))
# a sentence may begin with one of these though the passage does not say it
_HEADS = frozenset(map(stem, (
    "function", "method", "class", "module", "argument", "parameter", "statement", "object", "code", "python",
    "program", "value", "result", "example", "library", "package", "option", "keyword", "here", "yes", "note",
    "instead", "say", "source")))
_PREFIXES = ("un", "in", "im", "ir", "il", "dis", "non", "de", "mis", "under", "over")

# of each line, a sentence may not have a word of one side where the passage has one of another
_OPPOSITES = """
    raise raised throw thrown / suppress ignore swallow catch caught / lower
    keep kept preserve retain leave / discard drop remove delete lose lost ignore override replace
    before / after
    first / second / third / last / final
    true / false
    always / never / sometimes / usually
    all / some / few
    must required require mandatory / may might optional
    more greater larger bigger longer higher / less fewer smaller shorter lower
    least / most
    above over / below under
    minimum min smallest lowest / maximum max largest highest greatest
    longest / shortest
    oldest / newest latest
    older old / newer new young
    earlier early / later late
    faster fast quick / slower slow
    high / low
    upper uppercase / lower lowercase
    left / right
    top / bottom
    front head / back tail
    begin start starts beginning / end stop ends
    open opens / close closes shut
    increase grow rise ascending increasing / decrease shrink fall descending decreasing
    add append insert / remove delete pop
    prepend / append
    create make / delete destroy
    allow permit accept enable / forbid deny prevent reject refuse disable disallow
    include / exclude
    pass succeed success / fail failure
    encode / decode
    compress / decompress
    serialize pickle dump / deserialize unpickle load
    read / write
    load / save store
    import / export
    send / receive
    upload / download
    push / pop
    lock acquire / unlock release
    block / nonblock
    synchronous sync / asynchronous async
    parallel concurrent / sequential serial
    deep / shallow
    same equal identical / different unequal
    inside within / outside
    internal / external
    public / private
    local / global
    static / dynamic
    parent / child
    positive / negative
    even / odd
    empty / full nonempty
    forward / backward reverse reversed
    horizontal / vertical
    row / column
    key / value
    signed / unsigned
    text / binary
    integer / float / string
    list / tuple / dictionary dict / set
    stable / unstable
    safe secure / dangerous unsafe insecure
    mutable / immutable
    deprecated / recommended
    float finite / infinite
    input / output
    client / server
    strong / weak
    lazy / eager
    up / down
    on / off
    second / millisecond ms / microsecond us / nanosecond ns / minute / hour / day / week / month / year
    bit bits / byte bytes / kb kib kilobyte kilobytes / mb mib megabyte megabytes / gb gib gigabyte gigabytes
    mm millimetre / cm centimetre / m metre meter / km kilometre
    percent / times
    dollar dollars / euro euros / pound pounds
"""
_SIDES: dict[str, list[tuple[int, int]]] = defaultdict(list)    # of a stem: (line, side) wherever it stands
for _line, _text in enumerate(_OPPOSITES.strip().splitlines()):
    for _side, _words in enumerate(_text.split("/")):
        for _word in {stem(word) for word in _words.split()}:
            _SIDES[_word].append((_line, _side))


class Claim:
    """A sentence, taken apart."""

    def __init__(self, text: str) -> None:
        text = text.replace("\u2019", "'").replace("None of", "none of")    # which is no value
        self.names = _names(text) & frozenset(words(text))
        self.order: list[str] = []                          # content, numbers and directions as they follow each other
        self.conditional: dict[str, set[bool]] = defaultdict(set)   # of each of these: whether in a condition
        self.signs: dict[str, set[bool]] = defaultdict(set)  # of each stem: whether a clause affirms it
        self.all: set[str] = set()                          # stems of all words
        # outside of names, where `ignore_errors` ignores nothing
        self.plain = {stem(_NUMBERS.get(word, word)) for word in words(_COMPOUND.sub(" ", text))}
        self.by = bool(_PASSIVE.search(text))
        clauses: list[list[tuple[str, bool]]] = [[]]
        negated = [False]
        condition = next_negated = False
        for token in _TOKEN.finditer(_separated(text)):
            for word in [token[2]] if token[2] else words(token[0]) or [""]:
                word = _NUMBERS.get(word, word)
                self.all.add(stem(word))
                if token[1] or word in _PARTS:
                    clauses.append([])
                    negated.append(False)
                    condition, next_negated = word in _CONDITIONS, False
                if word in _NEGATES_CLAUSE or (word == "t" and token[0].lower().endswith("n't")):
                    negated[-1] = not negated[-1]
                elif word in _NEGATES_NEXT and not (word == "none" and token[0] == "None"):
                    next_negated = not next_negated
                elif word in _DIRECTIONS:
                    self.order.append(word)
                    self.conditional[word].add(condition)
                elif word and (word not in STOP_WORDS or token[0] == "None"):
                    clauses[-1].append((stem(word), next_negated))
                    self.order.append(stem(word))
                    self.conditional[stem(word)].add(condition)
                    next_negated = False
        for clause, flip in zip(clauses, negated, strict=True):
            for stemmed, local in clause:
                self.signs[stemmed].add(flip == local)
        self.stems = frozenset(self.signs)
        self.numbers = frozenset(word for word in self.order if _NUMBER.fullmatch(word))
        head = next((word for word in self.order if word in self.stems), None)
        self.head = None if head in _HEADS else head        # what it is about, mostly


_NUMBER = re.compile(r"-?\d+(?:[.,:]\d+)*")
# a sign that ends a clause; a number; a word with its clitic
_TOKEN = re.compile(r"([,;:()\u2013\u2014]|\s-\s)|(?<![\w.])(-?\d+(?:[.,:]\d+)*)(?!\w)|"
                    r"[^\W_]+(?:'[^\W_]+)?(?:\+\+|#(?!\w))?")
_PASSIVE = re.compile(r"\b(?:is|are|was|were|be|been|being)\s+(?:\w+\s+)?\w+(?:ed|en|wn|un|t)\s+by\b", re.IGNORECASE)
_NAME = re.compile(r"`([^`]+)`|(?!e\.g\.|i\.e\.)"
                   r"(\w+(?:\.\w+)+|\w+_\w+|\w+(?=\(\))|\w*[a-z0-9][A-Z]\w*|[A-Z][A-Z0-9]+\b)")
_COMPOUND = re.compile(r"\w+(?:\.\w+)+|\w*_\w+")
_PROPER = re.compile(r"(?<=[\w,;] )[A-Z][a-z]\w*")


def _separated(text: str) -> str:
    return text.replace("_", " ").replace("non-", "non ")


def _names(text: str) -> frozenset[str]:
    """The words of names: in code, dotted, in camel case or capitals, or with a capital within the sentence."""
    found = [match[1] or match[2] for match in _NAME.finditer(text)] + _PROPER.findall(text)
    return frozenset(word for name in found if not _NUMBER.fullmatch(name) for word in words(name))


# --- comparing ---

def disagreement(said: Claim, written: Claim, title: frozenset[str] = frozenset()) -> str | None:
    """Why the sentence `said` may not rest on what is `written`, in a word; None where nothing speaks against it.
    title: words of what stands above, which may hold names."""
    if not said.numbers <= written.numbers | title:
        return "numbers"
    above = written.all | {stem(word) for word in title}
    if not {stem(name) for name in said.names} <= above:
        return "names"
    if any(signs.isdisjoint(written.signs[word]) for word, signs in said.signs.items() if word in written.stems):
        return "negation"
    if _opposite(said.plain - written.plain, written.plain - said.plain):
        return "opposites"
    for word in said.all & _STRONG.keys():
        if _STRONG[word].isdisjoint(above):
            return "strength"
    if _misplaced(said, written):
        return "values"
    moved = {sign for word in said.stems & written.stems for sign in said.conditional[word]
             if said.conditional[word].isdisjoint(written.conditional[word])}
    if len(moved) == 2:
        return "condition"
    straight, turned = _triples(said, written)
    if said.by == written.by:
        return "order" if turned else None
    return "order" if straight and not turned else None     # one says it in the passive: then the order is turned


def _opposite(said: set[str], written: set[str]) -> bool:
    sides: dict[int, set[int]] = defaultdict(set)
    for word in written:
        for line, side in _SIDES.get(word, ()):
            sides[line].add(side)
    if any(sides.get(line, {side}) - {side} for word in said for line, side in _SIDES.get(word, ())):
        return True
    return any(long.startswith(prefix) and long in (prefix + short, stem(prefix + short))
               for a in said for b in written for short, long in ((a, b), (b, a)) if len(short) > 2
               for prefix in _PREFIXES)


def _triples(said: Claim, written: Claim) -> tuple[bool, bool]:
    """Whether any two words stand on the same sides of a third in both, and whether any have changed places around
    one (`a to b`, `b to a`). A condition that is said last instead of first changes nothing."""
    here, there = ({word: at for at, word in enumerate(claim.order) if count[word] == 1}
                   for claim in (said, written) for count in [Counter(claim.order)])
    places = [(there[word], said.conditional[word] | written.conditional[word]) for word in here if word in there]
    triples = [(a[0], b[0], c[0], a[1] == c[1]) for a, b, c in itertools.combinations(places, 3)]
    return any(a < b < c for a, b, c, _ in triples), any(a > b > c and alike for a, b, c, alike in triples)


def _misplaced(said: Claim, written: Claim) -> bool:
    """Whether a value of the sentence stands where the passage has another: False if x, for True if x."""
    def neighbours(order: list[str]) -> dict[str, set[tuple[int, str]]]:
        found: dict[str, set[tuple[int, str]]] = defaultdict(set)
        order = [word for word in order if word not in _DIRECTIONS]
        for at, word in enumerate(order):
            if word in _VALUES or _NUMBER.fullmatch(word):
                found[word] |= {(side, order[at + side]) for side in (-1, 1) if 0 <= at + side < len(order)}
        return found

    there = neighbours(written.order)
    for value, around in neighbours(said.order).items():
        others = set().union(*(places for other, places in there.items() if other != value))
        if around & others and not around & there.get(value, set()):
            return True
    return False


class Support(NamedTuple):
    """What a passage gives a sentence."""

    shared: frozenset[str]      # stems of the sentence that its best sentence holds
    reason: str | None          # why it may not rest on it


class Evidence:
    """A passage, as claims are held against it."""

    def __init__(self, title: str, text: str) -> None:
        self.title = frozenset(words(title))
        self._titled = frozenset(map(stem, self.title))
        self._written = [Claim(sentence) for sentence in sentences(text)] or [Claim("")]

    def support(self, said: Claim) -> Support:
        """By the sentence that shares most with it; of several, by the first that does not disagree."""
        held = [said.stems & (written.stems | self._titled) for written in self._written]
        most = max(map(len, held))
        found = [Support(shared, disagreement(said, written, self.title))
                 for shared, written in zip(held, self._written, strict=True) if len(shared) == most]
        return next((support for support in found if support.reason is None), found[0])
