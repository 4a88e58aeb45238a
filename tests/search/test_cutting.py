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
