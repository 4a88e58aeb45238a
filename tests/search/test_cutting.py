"""Passages end between paragraphs, keep their headings, and lose no text."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import Document
from tryplicity.search.cutting import LONGEST_CODE, MOST, cut, measure


def of(text, domain="text", id="folder/notes.md"):
    return cut(Document(id, text, domain, "u:"))


def words(count, word="word"):
    return " ".join(f"{word}{n}" for n in range(count)) + "."


def test_paragraphs_are_gathered_and_never_cut():
    paragraphs = [words(50, f"p{n}x") for n in range(10)]
    passages = of("\n\n".join(paragraphs))
    assert "\n\n".join(p.text for p in passages) == "\n\n".join(paragraphs)
    assert [len(p.text.split()) for p in passages] == [150, 150, 150, 50]


def test_a_long_paragraph_is_cut_between_sentences():
    sentences = [f"Sentence {n} has {words(20)}" for n in range(60)]
    passages = of(" ".join(sentences))
    assert len(passages) > 3 and all(measure(p.text) <= MOST for p in passages)
    assert all(p.text.startswith("Sentence") and p.text.endswith(".") for p in passages)
    assert " ".join(p.text for p in passages) == " ".join(sentences)


@pytest.mark.parametrize("text, titles", [
    ("# Guide\n\nHello there.\n\n## Paths\n\nJoin them.\n\n### Deep\n\nMore.\n\n## Lists ##\n\nAppend.",
     ["Guide", "Guide: Paths", "Guide: Paths: Deep", "Guide: Lists"]),
    ("Guide\n=====\n\nHello there.\n\nPaths\n-----\n\nJoin them.", ["Guide", "Guide: Paths"]),
    ("os.path.join\n\nJoin them.", ["os.path.join"]),
    ("Just a sentence here.\n\nAnd one more.", ["notes.md"]),
    ("A first line, that goes on\nin a second one", ["notes.md"]),
    ("```\n# a comment\n```\n", ["notes.md"]),
    ("#!/bin/sh is no heading", ["notes.md"]),
    ("", []), ("\n \n", []), ("# Only a heading", []),
])
def test_titles(text, titles):
    assert [passage.title for passage in of(text)] == titles


def test_code_stays_whole():
    code = "```python\n" + "\n\n".join(f"x{n} = {n} + 1" for n in range(60)) + "\n```"
    passages = of(f"{words(100)}\n\n{code}\n\n{words(30)}")
    assert sum(code in p.text for p in passages) == 1
    doctest = "\n".join(f">>> f({n}) + 1\n{n}" for n in range(70))
    assert sum(doctest in p.text for p in of(f"{words(20)}\n\n{doctest}")) == 1
    passages = of("```\n" + "\n".join(f"line {n} of much code" for n in range(1000)) + "\n```")
    assert len(passages) > 5 and all(measure(p.text) <= LONGEST_CODE for p in passages)


def test_a_file_of_code_is_cut_at_empty_lines():
    functions = [f"def f{n}(x):\n    # {words(30)}\n    return x + {n}" for n in range(20)]
    passages = of("\n\n\n".join(functions), "code", "pack/module.py#code")
    assert len(passages) > 3 and {p.title for p in passages} == {"module.py"}
    assert all(p.text.startswith("def f") for p in passages)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["word", "Two words.", "# Head", "====", "---", "```", "~~~", ">>> x", "    code", "",
                                 "", "\t", "x" * 5000, "a b " * 900, "語" * 3000, "- item", "é. Über"]), max_size=30)
       .map("\n".join) | st.text(max_size=300), st.sampled_from(["text", "code"]))
def test_whatever_the_text(text, domain):
    passages = of(text, domain)
    assert all(p.text.strip() and p.title and measure(p.text) <= LONGEST_CODE + MOST for p in passages)
    # everything but headings and spaces is there, in order
    held = re.sub(r"\s+", "", "".join(p.text for p in passages))
    left = iter(re.sub(r"\s+", "", text))
    assert all(sign in left for sign in held)
    assert cut(Document("i", text, domain, "u:")) == cut(Document("i", text, domain, "u:"))


def sizes(*counts, first=0):
    """The words of each passage, of paragraphs of so many."""
    texts = of("\n\n".join(" ".join(["ab"] * count) for count in counts))
    return [[len(part.split()) for part in passage.text.split("\n\n")] for passage in texts]


@pytest.mark.parametrize("counts, passages", [
    ([119, 81], [[119, 81]]), ([119, 82], [[119], [82]]), ([120, 5], [[120], [5]]), ([119, 1, 5], [[119, 1], [5]]),
    ([119, 81, 119, 81], [[119, 81]] * 2), ([120, 119, 81, 5], [[120], [119, 81], [5]]),
    ([200, 1], [[200], [1]]), ([201], [[200], [1]]), ([119, 201], [[119], [200], [1]])])
def test_a_passage_ends_after_enough_words_and_has_no_more_than_the_most(counts, passages):
    assert sizes(*counts) == passages


def test_a_word_is_what_spaces_part_or_twelve_signs_that_they_do_not():
    assert [measure(text) for text in ("a", "a b", "a\nb c", "x" * 23, "x" * 24, "語" * 120, "a b" + "x" * 33)] == [
        1, 2, 3, 1, 2, 10, 3]
    assert [passage.text for passage in of("x" * 12 * 450)] == ["x" * 12 * 200, "x" * 12 * 200, "x" * 12 * 50]
    assert [p.text for p in of("語" * 2388 + " " + "本" * 60)] == ["語" * 2388 + " " + "本" * 11, "本" * 49]


def test_code_is_parted_at_lines_after_as_many_words_as_stay_together():
    lines = [" ".join(["ab"] * 100) for _ in range(7)]
    whole = "```\n" + "\n".join(lines) + "\n```"    # the fences are a word each
    assert [len(passage.text.split()) for passage in of(whole)] == [501, 201]
    six = "    " + "\n    ".join(lines[:6])           # 4 spaces of 6 lines count too
    assert [len(passage.text.split()) for passage in of(six)] == [500, 100]
    five = "```\n" + "\n".join([*lines[:5], "ab " * 97 + "ab"]) + "\n```"
    assert [measure(passage.text) for passage in of(five)] == [LONGEST_CODE]


@pytest.mark.parametrize("text, titles", [
    ("# A\n\nText.\n\n# B\n\n## C\n\n### D\n\nText.\n\n## E\n\nText.\n\n# F\n\nText.",
     ["A", "A: C: D", "A: B: E", "A: F"]),              # the title, and the two headings above
    ("####### no\n\nText.", ["####### no"]), ("###### Six\n\nText.", ["Six"]), ("   # In\n\nText.", ["In"]),
    ("    # code\n\nText.", ["notes.md"]), ("# C# ##\n\nText.", ["C#"]), ("#none\n\nText.", ["#none"]),
    ("A\n--\n\nText.", ["notes.md"]), ("A\n---\n\nText.", ["A"]), ("Five5five\n-----\n\nText.", ["Five5five"]),
    ("Five5five55\n-----\n\nText.", ["notes.md"]), ("One\nTwo\n---\n\nText.", ["notes.md"]),
    ("T\n===\n\nA\n---\n\nText.\n\nB\n===\n\nText.", ["T: A", "T: B"]),
    ("T\n###\n\nA\n***\n\nB\n===\n\nC\n---\n\nD\n^^^\n\nE\n\"\"\"\n\nText.\n\nF\n---\n\nText.", ["T: D: E", "T: B: F"]),
    (" ".join(["word"] * 12) + "\n\nText.", [" ".join(["word"] * 12)]), (" ".join(["word"] * 13) + "\n\nText.",
                                                                    ["notes.md"]),
    ("Is it?\n\nText.", ["Is it?"]), ("It is!\n\nText.", ["notes.md"]), ("It is:\n\nText.", ["notes.md"]),
    ("Alone", ["notes.md"]), (">>> f()\n\nText.", ["notes.md"]), ("    code\n\nText.", ["notes.md"])])
def test_headings_and_titles(text, titles):
    assert [passage.title for passage in of(text)] == titles


@pytest.mark.parametrize("id, title", [("folder/notes.md", "notes.md"), ("folder/", "folder"), ("a/b#part", "b"),
                                       ("#part", "part"), ("", "")])
def test_without_a_title_it_is_the_end_of_the_identity(id, title):
    assert [passage.title for passage in of("It is a sentence.", id=id)] == [title]


def test_a_fence_ends_where_it_is_closed_or_nowhere():
    text = "Text.\n```\n# no heading\n\n```\n# Heading\n\nEnd."
    assert [(p.title, p.text) for p in of(text)] == [
        ("notes.md", "Text.\n\n```\n# no heading\n\n```"), ("notes.md: Heading", "End.")]
    fenced = "~~~~\n```\n# no\n~~~\n# no\n~~~~"
    assert [p.text for p in of(f"{fenced}\nEnd.")] == [f"{fenced}\n\nEnd."]
    assert [p.text for p in of("```\n# never closed\n\nEnd.")] == ["```\n# never closed\n\nEnd."]
    assert [p.text for p in of("It is a\tb.\n\n\tcode\r\n")] == ["It is a b.\n\n    code"]


def test_a_file_of_code_keeps_its_empty_lines_only_between_parts():
    assert [p.text for p in of("# no heading\n\n\n\nx = 1\r\n\r\n\r\ny\n", "code")] == ["# no heading\n\nx = 1\n\ny"]


def test_a_paragraph_of_the_most_words_is_left_as_it_is():
    lines = "\n".join([" ".join(["ab"] * 100)] * 2)
    assert [passage.text for passage in of(lines)] == [lines]
    sentences = [" ".join(["Ab"] + ["ab"] * (size - 2) + ["ab."]) for size in (100, 100, 5)]
    assert [len(passage.text.split()) for passage in of(" ".join(sentences))] == [200, 5]
    assert [p.title for p in of("```\n```\n# Heading\n\nText.")] == ["notes.md", "notes.md: Heading"]
    assert [p.title for p in of("Ten4letter\n-----\n\nText.")] == ["Ten4letter"]
