"""Reading level: a hand-computed grade, prose alone is graded, and the folder keeps the result."""

import math
import socket

import numpy as np
import pytest

from tryplicity import Document, Source
from tryplicity.data import grades
from tryplicity.data.prepared import prepare

EASY = ("The cat sat on the mat. It was a big red cat. The dog ran to the cat. The cat ran up a tree. The dog sat by "
        "the tree. Then the cat and the dog had a nap.")
MIDDLE = ("The river begins in the mountains and flows through three small towns before it reaches the sea. In spring "
          "the melting snow makes it rise, and farmers open the gates to water their fields. Many birds rest there.")
HARD = ("Notwithstanding considerable methodological heterogeneity, contemporary epidemiological investigations "
        "consistently demonstrate statistically significant associations between socioeconomic disadvantage and "
        "deteriorating cardiovascular outcomes, necessitating comprehensive interdisciplinary interventions.")


def graded(text, domain="text"):
    return grades.grade(Document("a", text, domain, ""))


def prose(text, domain="text"):
    return grades.prose(Document("a", text, domain, ""))


def test_a_grade_computed_by_hand():
    # 30 words of 4 letters in 3 sentences; the full stops count as characters
    text = "Many cats like warm milk when they come home late. " * 3
    assert len(text.split()) == 30 and sum(c.isalpha() for c in text) == 120
    assert graded(text) == pytest.approx(4.71 * 123 / 30 + 0.5 * 30 / 3 - 21.43, abs=0.05)
    longer = text.replace("cats", "grandmothers").replace(". Many", " and many")
    words, characters = len(longer.split()), sum(not c.isspace() for c in longer)
    assert graded(longer) == pytest.approx(4.71 * characters / words + 0.5 * words - 21.43, abs=0.05)


def test_harder_texts_have_higher_grades():
    easy, middle, hard = graded(EASY), graded(MIDDLE), graded(HARD)
    assert easy <= 2 < middle <= 10 < hard


def test_too_little_prose_has_no_grade():
    words = "one two three four five six seven eight nine ten "
    assert math.isnan(graded(words + words[:-4])) and not math.isnan(graded(words * 2))
    assert math.isnan(graded("")) and math.isnan(graded("x = 1\ny = f(x)\n" * 50, "code"))
    assert math.isnan(graded("1 + 1 = 2, 3.14 \\frac{a}{b} " * 50, "math"))


@pytest.mark.parametrize("around", [
    "{}\n\n>>> from module import thing\n>>> thing.method(argument)\n'the console says quite a lot of words here'\n",
    "x_1 = call(y); z += [a, b]\n{}\nfor_each(element) -> {{value: 1, other: 2}}\n",
    "{}\n\n12 34 56.7 89,1 0x1f 3e-4 12:30 2024-01-01\n",
    "{} https://example.org/a/very/long/address?that=is&no=word\n",
], ids=["a console session", "code", "numbers", "an address"])
def test_what_is_no_prose_is_left_out(around):
    assert prose(around.format(MIDDLE)).split() == prose(MIDDLE).split()


def test_identifiers_and_markup_end_no_sentence():
    text = "Call `os.path.join()` (see *notes*), e.g. with **two** parts. Then use an_identifier again. HEADING\n\nMore"
    assert prose(text) == "Call see notes with two parts. Then use again. HEADING. More."


def test_headings_and_entries_of_lists_are_sentences():
    assert prose("A heading\n\nWrapped\nlines go on.\n- one entry\n- another entry\n1. a third") == (
        "A heading. Wrapped lines go on. one entry. another entry. a third.")


def test_of_code_the_comments_and_docstrings_are_graded():
    code = f'''#!/usr/bin/env python
def interdisciplinary_heterogeneity(considerable="not # a comment", other='nor this'):
    """{EASY}"""
    return considerable  # a short remark follows the statement
    # and so do two lines
    # that are one
'''
    assert prose(code, "code") == f"{EASY} a short remark follows the statement and so do two lines that are one."
    assert graded(code, "code") <= 2
    c = f'/* {EASY} */\nint divide(int a) {{ return a / 2; }} // halves it\nchar *url = "http://x.y/z";\n'
    assert prose(c, "code") == f"{EASY} halves it."
    assert graded("x = 1\n" + f"# {HARD}\n", "code") > 10


def test_the_work_is_bounded():
    book = EASY + " " + MIDDLE
    long = "\n\n".join([book] * 500)
    assert grades.LENGTH <= len(prose(long)) <= grades.LENGTH + len(book)
    assert abs(graded(long) - graded("\n\n".join([book] * 50))) < 0.05
    assert math.isnan(graded("=" * 10 * grades.READ + HARD))
    # nothing here takes quadratic time
    for sign in ("/* ", '"""', "'", '"', "# \n\n", "\n ", "\\", '"\\'):
        graded(sign * (grades.READ // len(sign)), "code")


def test_nothing_is_asked_from_the_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert graded(MIDDLE + " Nothing is downloaded for this sentence.") > 0


class Graded(Source):
    name = "graded"
    read = 0

    def fingerprint(self):
        return "1"

    def documents(self):
        for i in range(90):
            text = (EASY, MIDDLE, HARD, "x = 1\n")[i % 4]
            yield Document(f"d/{i}", f"{text} {text}\n", "text", "")


def test_the_training_documents_are_graded_once_in_their_order(tmp_path):
    prepared = prepare(Graded(), 280, tmp_path)
    calls = []
    found = prepared.grades(lambda *progress: calls.append(progress))
    documents = list(prepared.collection.documents(held_out=False))
    np.testing.assert_array_equal(found, np.array([grades.grade(d) for d in documents], dtype=np.float32))
    assert found.dtype == np.float32 and len(found) == len(prepared.train.end_D)
    assert calls == [("grading how hard the documents read", 64, len(documents))]
    again = prepare(Graded(), 280, tmp_path).grades(lambda *progress: pytest.fail("graded a second time"))
    np.testing.assert_array_equal(found, again)
    assert not [path for path in prepared.folder.iterdir() if path.name.startswith(".")]
