"""What the judge that counts keeps and leaves out, on texts made for each reason, and its measures by hand."""

from __future__ import annotations

import base64
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tryplicity import Document, load_plugins
from tryplicity_plugins.judges.measures import Text, repeated, sentences

PARAGRAPHS = [
    "The river rises in the hills above the village, and for most of the year it is no wider than a country lane. "
    "After heavy rain it spreads over the meadows that lie to the south, where cattle have grazed for centuries.",
    "People who live along its banks have learned to read the water. They know that a change of colour means rain "
    "in the hills, and that the sound of the weir tells them how soon the lower fields will be under water.",
    "A bridge was built in 1784 to replace the old ford. It was paid for by a toll of one penny, which farmers "
    "resented and mostly avoided by driving their animals through the shallows at night.",
    "Today the mill houses a small museum. Its keeper, a retired teacher, explains to visitors how the wheel turned "
    "two pairs of stones, and why the finest flour was always ground in the early morning.",
]
PROSE = "\n\n".join(PARAGRAPHS)
CODE = '''"""Shortest paths in a graph."""

import heapq


def shortest_paths(graph, source):
    """The length of the shortest path from `source` to every node that can be reached."""
    lengths, queue = {}, [(0, source)]
    while queue:
        length, node = heapq.heappop(queue)
        if node in lengths:
            continue
        lengths[node] = length
        for neighbour, weight in graph[node].items():
            if neighbour not in lengths:
                heapq.heappush(queue, (length + weight, neighbour))
    return lengths
'''
MATHEMATICS = (
    "Let $G$ be a finite group and let $p$ be a prime that divides its order. We write $|G| = p^n m$, $p \\nmid m$. "
    "A subgroup of order $p^n$ is called a Sylow subgroup.\n\n"
    "\\begin{align} |G : N_G(P)| &\\equiv 1 \\pmod p \\\\ |G : N_G(P)| &\\mid m \\end{align}\n\n"
    "The proof lets $G$ act by conjugation on the set of all such subgroups and counts the points that are fixed.")


@pytest.fixture(scope="module")
def judge():
    return load_plugins().registry.part("judge", "statistical").build()


def verdict(judge, text, domain="text"):
    return judge.judge([Document("it", text, domain, "")])[0]


@pytest.mark.parametrize(("text", "domain"), [(PROSE, "text"), (CODE, "code"), (MATHEMATICS, "math")])
def test_what_a_person_wrote_is_kept(judge, text, domain):
    assert verdict(judge, text, domain) == (1.0, True, "")


LETTERS = random.Random(1)
BAD = {
    "empty": " \n\t ",
    "not printable": PROSE[:200] + "\x00\x07\ufffd" * 40,
    "encoded or random": PROSE + "\n" + base64.b64encode(LETTERS.randbytes(3000)).decode(),
    "says the same again and again": "Buy it now and save more. " * 400,
    "fewer than 50 words": "A short note. It has two sentences.",
    "too few words with a letter": PROSE[:300] + " 1234 567890 -- 2345678" * 20,
    "too few common words": "Der Fluss entspringt in den Bergen oberhalb des Dorfes und ist meist recht schmal. " * 5
                            + "Nach langem Regen tritt er weit über seine Ufer. Danach weiden dort Kühe. Es regnet.",
    "hashes or ellipses": PROSE[:330] + " ..." * 14,
    "bullets": "\n".join(f"- {line}" for line in PROSE.replace("\n\n", " ").split(". ")),
    "lines that break off": "\n".join(f"{line[:60]}..." for line in PROSE.split(". ")) + "\nThe end of it is here.",
    "curly brackets in prose": PROSE + "\n\nThe function f() { return 1; } is what it says on this page of the book.",
    "lorem ipsum": PROSE + "\n\nLorem ipsum dolor sit amet, and so on to the end of the page.",
    "fewer than five sentences": PROSE.replace(".", "").replace("\n\n", " ") + " and so it ends.",
    "links": PROSE + " ".join(f"https://example.org/a/page/{number}/of/the/list" for number in range(12)) + ".",
    "capitals": PROSE.upper().replace("THE", "the").replace("TO", "to").replace("OF", "of"),
    "lines said again": PROSE + "\n" + "\n".join([PROSE.split("\n")[0]] * 2),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_bad_is_left_out_for_its_reason(judge, reason):
    said = verdict(judge, BAD[reason])
    assert (said.keep, said.score, said.reason) == (False, 0.0, reason)


@pytest.mark.parametrize(("text", "reason"), [
    ("x = [" + "first, second, " * 80 + "]\n" + CODE, "long lines"),
    ("# Automatically generated, do not edit.\n" + CODE, "written by a program"),
    ("{}[]();:,.<>!@#$%^&*\n" * 20 + "a", "too few letters and digits"),
    (CODE + "".join(f"    0x{LETTERS.randrange(256):02x},\n" for _ in range(400)), "encoded or random"),
    ("    handler.register(event_number, callback)\n" * 12 + CODE[:100], "lines said again"),
])
def test_bad_code(judge, text, reason):
    assert verdict(judge, text, "code")[1:] == (False, reason)


def test_bad_mathematics(judge):
    assert verdict(judge, "$x^2$ is $4$.", "math").reason == "fewer than 30 words"
    assert verdict(judge, MATHEMATICS + ("\n" + MATHEMATICS.split("\n")[0]) * 3, "math").reason == "lines said again"


def test_an_unknown_domain_is_judged_as_prose(judge):
    assert verdict(judge, PROSE, "poems").keep and not verdict(judge, CODE, "poems").keep


def test_lists_may_be_kept_without_the_five_sentences():
    part = load_plugins().registry.part("judge", {"type": "statistical", "c4": False})
    assert part.build().judge([Document("it", BAD["fewer than five sentences"], "text", "")])[0].keep


# --- measures, by hand ---

def test_words_hold_together_what_a_person_reads_as_one():
    said = Text("It's in os.path: https://x.org/a?b=1, e.g. f(x)... A.B").words
    assert said == ["It's", "in", "os.path", ":", "https://x.org/a?b=1,", "e.g.", "f(x", ")", "...", "A", ".", "B"]


def test_sentences():
    assert sentences("One. Two! Three? Four") == 4
    assert sentences('He said "no." Then he left.') == 2
    assert sentences("Version 2.13 is here.") == 1
    assert sentences("   ") == 0


def test_repeated_pieces():
    assert repeated(["a", "bb", "a", "bb", "bb"]) == (3, 5)


def plain_said_again(words, n):
    """The definition, word by word."""
    seen, at, characters = set(), 0, 0
    while at + n <= len(words):
        gram = tuple(words[at:at + n])
        if gram in seen:
            characters, at = characters + sum(map(len, gram)), at + n
        else:
            seen.add(gram)
            at += 1
    return characters


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=60))
def test_phrases_that_are_said_again_are_those_of_the_definition(words):
    """The walk of the definition passes over n-grams that lie across a copy; those the quick count knows too, so that
    it may only find more."""
    quick = Text(" ".join(words)).said_again([2, 3, 5])
    for n, found in zip([2, 3, 5], quick, strict=True):
        assert plain_said_again(words, n) <= found <= sum(map(len, words))
        if plain_said_again(words, n) == 0:
            assert found == 0


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=40), st.integers(2, 4))
def test_the_most_frequent_phrase(words, n):
    grams = [" ".join(words[i:i + n]) for i in range(len(words) - n + 1)]
    counted = Counter(grams)
    most = max(counted.values(), default=0)
    expected = next((len(gram) * most for gram in grams if counted[gram] == most), 0)
    assert Text(" ".join(words)).most_frequent(n) == expected
