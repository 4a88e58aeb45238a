import math

import numpy as np
import pytest

from tryplicity.data.bigram import bits_of_pairs, bits_per_byte, count_pairs


def test_a_tiny_example_worked_out_by_hand():
    # training text "aab": start->a, a->a, a->b; single counts a 2, b 1 of 3
    def p(byte):
        return ((2 if byte == "a" else 1) + 1) / (3 + 256)

    p_a_after_start = (1 + 1 * p("a")) / (1 + 1)     # one different byte after the start
    p_a_after_a = (1 + 2 * p("a")) / (2 + 2)         # two different bytes after a
    p_b_after_a = (1 + 2 * p("b")) / (2 + 2)
    p_a_after_b = (0 + 1 * p("a")) / (0 + 1)         # nothing was seen after b: the byte's own frequency
    expected = -sum(map(math.log2, [p_a_after_start, p_a_after_a, p_b_after_a, p_a_after_b])) / 4
    assert bits_per_byte([b"aab"], [b"aaba"]) == pytest.approx(expected, rel=1e-12)


def test_every_row_is_a_distribution():
    rng = np.random.default_rng(0)
    counts = count_pairs([rng.integers(0, 256, 5000, dtype=np.uint8).tobytes(), b"", b"x"])
    assert counts.sum() == 5001 and counts[256].sum() == 2
    assert np.allclose((2.0 ** -bits_of_pairs(counts)).sum(1), 1)


def test_counting_in_pieces_equals_counting_one_by_one():
    rng = np.random.default_rng(1)
    texts = [rng.integers(97, 103, size, dtype=np.uint8).tobytes() for size in (3, 700_000, 1, 900_000, 5)]
    plain = np.zeros((257, 256), dtype=np.int64)
    for text in texts:
        pairs = np.histogram2d([256, *text[:-1]], list(text), bins=(257, 256), range=((0, 257), (0, 256)))[0]
        plain += pairs.astype(int)
    assert np.array_equal(count_pairs(texts), plain)


def test_it_learns_what_there_is_to_learn():
    assert bits_per_byte([b"ab" * 5000], [b"ab" * 500]) < 0.05
    rng = np.random.default_rng(2)
    noise = [rng.integers(0, 256, 300_000, dtype=np.uint8).tobytes() for _ in range(2)]
    assert 8 < bits_per_byte(noise[:1], noise[1:]) < 8.2
