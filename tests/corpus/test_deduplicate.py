"""Copies, to the letter and nearly."""

import random

import numpy as np

from tests.corpus.stories import story
from tryplicity import Document
from tryplicity.corpus.deduplicate import BANDS, copies, signature, write_signatures


def found(tmp_path, *shards, near=True):
    paths = []
    for number, texts in enumerate(shards):
        paths.append(tmp_path / f"{number}.npy")
        write_signatures(paths[-1], [Document(f"{number}:{i}", text, "text", "") for i, text in enumerate(texts)])
    exact, nearly = copies(paths, near)
    return [list(map(bool, e)) for e in exact], [list(map(bool, n)) for n in nearly]


def changed(text, words):
    """The text with so many of its words replaced, side by side."""
    said = text.split(" ")
    said[20:20 + words] = ["zebra"] * words
    return " ".join(said)


def test_the_first_of_several_stays_across_shards_too(tmp_path):
    a, b, c = story(1, 40), story(2, 40), story(3, 40)
    exact, nearly = found(tmp_path, [a, b, a], [], [f"  {b}\n", c, changed(a, 2)])
    assert exact == [[False, False, True], [], [True, False, False]]
    assert nearly == [[False, False, False], [], [False, False, True]]


def test_near_copies_stay_where_that_is_asked(tmp_path):
    a = story(1, 40)
    assert found(tmp_path, [a, changed(a, 2), a], near=False) == ([[False, False, True]], [[False, False, False]])


def test_short_texts_are_copies_to_the_letter_alone(tmp_path):
    assert found(tmp_path, ["a b c", "a b d", "a b c", ""]) == ([[False, False, True, False]], [[False] * 4])


def test_how_alike_two_texts_must_be(tmp_path):
    """By the formula 1 - (1 - s^8)^14 of shared 5-grams s: 0.9 is found in 99.9 of 100 cases, 0.3 in 0.1."""
    alike, apart = 0, 0
    for seed in range(40):
        draw = random.Random(seed)
        words = [f"w{draw.randrange(10**6)}" for _ in range(400)]
        text = " ".join(words)
        near = " ".join(words[:385] + [f"x{i}" for i in range(15)])  # 381 of 411 5-grams in common: 0.93
        far = " ".join(words[:190] + [f"x{i}" for i in range(210)])  # 186 of 606: 0.31
        alike += bool((signature(text)[:BANDS] == signature(near)[:BANDS]).any())
        apart += bool((signature(text)[:BANDS] == signature(far)[:BANDS]).any())
    assert alike == 40 and apart <= 2


def test_a_signature_is_the_same_everywhere_and_hardly_ever_another_text_s():
    """Bands of unrelated texts differ, so that a corpus is not joined into one by chance."""
    rows = np.stack([signature(story(seed, 40)) for seed in range(300)])
    assert (signature(story(5, 40)) == rows[5]).all()
    assert all(len(np.unique(column)) == 300 for column in rows.T)
