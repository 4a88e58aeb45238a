"""Scores and limits by hand: what each factor of the ranking is, and what happens at every limit."""

import math

import pytest

from tests.search.test_index import doc, ids
from tryplicity import LeftOut
from tryplicity.search import index as index_module
from tryplicity.search.building import build_index
from tryplicity.search.index import PassageIndex
from tryplicity.search.query import LONGEST_QUESTION, MOST_TERMS, terms


@pytest.fixture
def made(tmp_path):
    def make(*documents, **options):
        return PassageIndex(build_index(documents, tmp_path / "index.sqlite", **options))

    return make


def by_bm25(opened, question):
    """The scores before the order is reconsidered."""
    known = sorted((opened._frequency(term), term) for term in terms(question) if opened._frequency(term))
    return dict(opened._candidates(known, 40))


def rarity(passages, count):
    return math.log(1 + passages / count)


FILL = [doc(f"fill{n}", f"Fill {n}\n\nnothing of it {n}\n") for n in range(4)]


@pytest.mark.parametrize("title, question, factor", [
    ("Zebra", "zebra", 1 + 1 + 1),
    ("Zebra of Africa", "zebra", 1 + 1 / 2 + 1),            # half of the title
    ("Page", "zebra", 1 + 0 + 1),
    ("zebra.cc", "zebra", 0.85 * (1 + 1 / 2 + 1)),           # a part of a dotted name
    ("aa.zebra.cc", "zebra", 0.85**2 * (1 + 1 / 3 + 1)),
    ("aa.zebra.cc", "zebra.cc", 1 + 2 / 3 + 1 + 1),         # the name itself: no part costs, and it counts once more
    ("Zebra", "zebra fill", 1 + 1 + rarity(5, 1) / (rarity(5, 1) + rarity(5, 4))),
    ("Zebra", "zebra xylophone", 1 + 1 + 1),                # a word that no passage has is no part of the question
    ("Zebra", "create zebra", 1 + 1 + 1),                   # `make`, in the text, is as good
])
def test_what_raises_and_lowers_a_score(made, title, question, factor):
    opened = made(doc("z", f"{title}\n\nzebra make\n"), *FILL)
    before, [(number, score), *_] = by_bm25(opened, question), opened.rank(question, 9)
    assert number == 1 and score == pytest.approx(before[1] * factor)


def test_better_passages_of_a_page_lower_those_below_and_of_other_pages_do_not(made):
    page = "{}: {}\n\nzebra{}\n"
    opened = made(doc("a", page.format("Page", "A", "")), doc("b", page.format("Page", "B", " x")),
                  doc("c", page.format("Other", "C", " x x")), doc("d", page.format("Page", "D", " x x x")), *FILL)
    before, after = by_bm25(opened, "zebra"), dict(opened.rank("zebra", 9))
    # the titles' own words are not asked for; what comes before the colon is the page
    assert [after[n] / (2 * before[n]) for n in (1, 2, 3, 4)] == pytest.approx([1, 0.8, 1, 0.64])


def test_of_equal_scores_the_first_in_the_index_comes_first(made, monkeypatch):
    """Where a better passage of the page leaves nothing to the others, all of these are equal."""
    opened = made(*(doc(f"z{n}", f"Page: {n}\n\nzebra{' x' * (9 - n)}\n") for n in range(5)), *FILL)
    assert [number for number, _ in opened.rank("zebra", 9)] == [5, 4, 3, 2, 1]
    monkeypatch.setattr(index_module, "_AGAIN", 0.0)
    assert [number for number, _ in opened.rank("zebra", 9)] == [5, 1, 2, 3, 4]


def test_those_that_are_not_reconsidered_keep_their_order_and_their_ratio_below_the_rest(made):
    opened = made(*(doc(f"z{n}", f"Page{n} {n}\n\nzebra{' x' * n}\n") for n in range(60)), *FILL)
    before, ranked = by_bm25(opened, "zebra"), opened.rank("zebra", 60)
    known = [(opened._frequency(term), term) for term in terms("zebra")]
    whole = opened._candidates(known, 60)
    assert len(before) == 40 and len(ranked) == 60 and [number for number, _ in ranked] == list(range(1, 61))
    scores = [score for _, score in ranked]
    assert scores[40] == pytest.approx(scores[39]) and scores == sorted(scores, reverse=True)
    assert [score / scores[40] for score in scores[40:]] == pytest.approx([s / whole[40][1] for _, s in whole[40:]])


def test_how_many_come_back(made):
    opened = made(*(doc(f"z{n}", f"Page {n}\n\nzebra {n}\n") for n in range(30)))
    assert len(opened.search("zebra")) == 5
    for limit in (1, 2, 29, 30, 31):
        assert len(opened.search("zebra", limit)) == len(opened.rank("zebra", limit)) == min(limit, 30)
    for limit in (0, -1):
        assert opened.search("zebra", limit) == opened.rank("zebra", limit) == []
    assert opened.rank("xylophone", 5) == opened.rank("", 5) == []


def test_more_passages_than_one_question_of_sqlite_holds_are_read(made):
    """Numbers that there are not are left out."""
    opened = made(*(doc(f"z{n}", f"Page {n}\n\nzebra {n}\n") for n in range(1100)))
    ranked = [(number, 1.0 / number) for number in range(1101, 0, -1)]
    read = opened.passages_at(ranked)
    assert ids(read) == [f"z{number - 1}" for number in range(1100, 0, -1)]
    assert [passage.score for passage in read] == [score for _, score in ranked[1:]]


@pytest.mark.parametrize("rows, found", [(10, {"rare", "both"}), (9, {"both"}), (6, {"both"})])
def test_terms_are_looked_for_as_long_as_there_is_room_for_their_rows(made, monkeypatch, rows, found):
    """Zebra is in 4 passages and lion in 6: ten rows."""
    opened = made(*(doc(f"both{n}", f"Both {n}\n\nzebra lion {n}\n") for n in range(4)),
                  *(doc(f"rare{n}", f"Rare {n}\n\nlion {n}\n") for n in range(2)), *FILL)
    monkeypatch.setattr(index_module, "_ROWS", rows)
    assert {name[:4] for name in ids(opened.search("zebra lion", 9))} == found


def test_where_every_term_is_too_frequent_all_together_or_the_title_decide(made, monkeypatch):
    opened = made(*(doc(f"lion{n}", f"Some {n}\n\nlion {n}\n") for n in range(4)), doc("t", "Lion\n\nin its title\n"),
                  doc("both", "Both\n\nzebra lion\n"), *(doc(f"zebra{n}", f"Any {n}\n\nzebra {n}\n") for n in range(9)))
    monkeypatch.setattr(index_module, "_ROWS", 3)
    assert sorted(ids(opened.search("lion zebra", 9))) == ["both", "t"]
    assert ids(opened.search("lion", 9)) == ["t"]
    # not one has it in its title: the first passages, as many as there is room for
    assert sorted(ids(opened.search("zebra", 9))) == [] and len(opened.search("lion zebra", 1)) == 1
    monkeypatch.setattr(index_module, "_ROWS", 8)
    assert sorted(ids(opened.search("zebra", 9))) == ["both", "zebra0", "zebra1"]


def test_titles_are_given_as_questions(made):
    opened = made(*(doc(f"d{n}", f"{title}\n\nzebra {n}\n") for n, title in enumerate(
        ["abc", "word", "two  words", "x" * 60, "y" * 61, "last one"])))
    assert opened.examples(6) == ["What is word?", "two words", f"What is {'x' * 60}?", "last one"]
    assert opened.examples(1) == ["What is word?"] and opened.examples(0) == []


class Told:
    """A source that says how far it is, and what it left out."""

    name, read_share, first = "told", 0.25, ""

    def __init__(self):
        self.left_out = LeftOut("files")


@pytest.mark.parametrize("source, cutting", [(None, (64, None)), (Told(), (0.25, 1.0))])
def test_how_far_it_is_is_told(tmp_path, source, cutting):
    """After each 64 documents the source's share where it knows it, else the number of passages."""
    told = []
    path = build_index((doc(f"d{n}", f"zebra {n}") for n in range(130)), tmp_path / "i.sqlite",
                       lambda *what: told.append(what), source=source)
    second = (128, None) if source is None else cutting
    assert told == [("cutting into passages", *cutting), ("cutting into passages", *second),
                    ("indexing words", 0.0, 1.0), ("indexing words", 1.0, 1.0)]
    opened = PassageIndex(path)
    assert (len(opened), opened.source, opened.fingerprint) == (130, "told" if source else "", "")
    assert [one.kind for one in opened.left_out] == [] and len(opened.identity) == 64


def test_passages_are_numbered_through_and_in_their_document(made):
    long = "\n\n".join(["word " * 130 + str(n) for n in range(3)])
    opened = made(doc("a", long), doc("b", long.replace("word", "other")))
    assert [p.id for p in opened.passages_at((n, 1.0) for n in range(1, 7))] == [
        "a:1", "a:2", "a:3", "b:1", "b:2", "b:3"]
    assert [text[:5] for _, text in opened.texts()] == ["word "] * 3 + ["other"] * 3


def test_a_question_is_read_to_its_limits():
    begin = "x" * (LONGEST_QUESTION - 6)
    assert [term.words for term in terms(f"{begin} zebra")] == [(begin,), ("zebra",)]
    assert [term.words for term in terms(f"{begin}x zebra")] == [(f"{begin}x",), ("zebr",)]
    assert len(terms(" ".join(f"w{n}" for n in range(99)))) == MOST_TERMS == 40


@pytest.mark.parametrize("question, wanted", [
    ("with statement", ["with statement", "statement"]), ("the with", ["the", "with"]),
    ("what is the statement", ["statement"]), ("an in operator", ["in operator", "operator"]),
    ("with with statements", ["with statements", "statements"]), ("with a statement", ["statement"]),
    ('"with" it', ["with"]), ("東京都 with", ["東 京", "京 都"]), ("of the", ["of", "the"]),
    ("a_b.c d", ["abc0", "b", "c", "d"]), ("zebra Zebra zebra", ["zebra"])])
def test_what_is_looked_for(question, wanted):
    assert [" ".join(term.words) for term in terms(question)] == wanted


def test_what_may_stand_for_a_word():
    [term] = terms("largest")
    assert term.forms == (("largest",), ("maximum",), ("max",))
    assert term.quoted == '("largest" OR "maximum" OR "max")'
    assert term.stems == [{"largest"}, {"maximum"}, {"max"}]
    assert terms("with statement")[0].forms == (("with", "statement"),)
