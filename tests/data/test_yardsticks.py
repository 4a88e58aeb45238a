"""What a model is held against: compressors of the same text, and what the training text gives away."""

import lzma
import random
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity.data import yardsticks
from tryplicity.data.prepared import prepare
from tryplicity.data.yardsticks import overlap, ppm_bits_per_byte, xz_bits_per_byte

RNG = random.Random(0)
DIGITS = "".join(RNG.choice("0123456789abcdef") for _ in range(60_000)).encode()
WORDS = [f"word{i}" for i in range(2000)]
TEXT = " ".join(RNG.choice(WORDS) for _ in range(4000)).encode()


@pytest.mark.parametrize("measure, slack", [(xz_bits_per_byte, 0.35), (ppm_bits_per_byte, 0.35)])
def test_what_a_compressor_reaches_is_bounded_by_what_the_text_says(measure, slack):
    assert 4 <= measure(DIGITS) < 4 + slack                     # uniform digits: 4 bits each
    assert 4 <= measure(DIGITS[:30_000], DIGITS[30_000:]) < 4 + slack
    assert measure(DIGITS[:30_000], DIGITS) < 0.1               # it has read all of it before
    assert measure(TEXT, TEXT[:10_000]) < measure(TEXT)         # knowing the words helps


def test_xz_is_what_the_command_gives(tmp_path):
    if shutil.which("xz"):
        size = len(subprocess.run(["xz", "-9e", "-c"], input=TEXT, capture_output=True, check=True).stdout)
    else:
        size = len(lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(TEXT) == 8 * size / len(TEXT)


def test_ppm_of_a_training_text_is_what_seven_zip_would_add():
    """Decoded again, so that what is counted is really all that is needed."""
    import pyppmd

    encoder = pyppmd.Ppmd7Encoder(6, 256 << 20)
    coded = encoder.encode(TEXT) + encoder.flush()
    assert pyppmd.Ppmd7Decoder(6, 256 << 20).decode(coded, len(TEXT)) == TEXT
    assert ppm_bits_per_byte(TEXT) == 8 * len(coded) / len(TEXT)


@given(st.lists(st.lists(st.sampled_from(["a", "b", "A", "über"]), max_size=60), max_size=6), st.integers(0, 6))
@settings(max_examples=80, deadline=None)
def test_overlap_counts_the_windows_of_thirteen_words(texts, parted):
    held_out, train = texts[:parted], texts[parted:]

    def windows(words):
        words = [word.lower() for word in words]
        return [tuple(words[i:i + 13]) for i in range(len(words) - 12)]

    seen = {window for words in train for window in windows(words)}
    all_of_it = [window for words in held_out for window in windows(words)]
    expected = sum(window in seen for window in all_of_it) / len(all_of_it) if all_of_it else 0
    assert overlap([" ".join(words) for words in held_out], ["\n ".join(words) for words in train]) == expected


def test_they_are_measured_on_the_held_out_text_and_kept(tmp_path, make_source):
    shared = " ".join(f"shared{i}" for i in range(30))
    texts = [f"{shared} and {RNG.random()}" for _ in range(50)]
    prepared = prepare(make_source(texts=texts), 300, tmp_path)
    found = prepared.yardsticks()
    held_out, train = ([d.text for d in prepared.collection.documents(part)] for part in (True, False))
    scored, before = "".join(held_out).encode(), "".join(train).encode()
    assert found.bigram == prepared.bigram_bits_per_byte() and found.xz == xz_bits_per_byte(scored)
    assert found.xz_primed == xz_bits_per_byte(scored, before) < found.xz
    assert found.ppm == ppm_bits_per_byte(scored, before) < found.bigram
    assert found.overlap == overlap(held_out, train) and 0.8 < found.overlap < 1
    assert found.primed_bytes == found.compared_bytes == found.train_bytes == len(before)
    assert f"order 6 primed with the training text {found.ppm:.3f}" in found.sentences()[0]
    assert found.sentences()[1] == f"{found.overlap:.1%} of the held-out text's windows of 13 words stand in the " \
                                   "training text too"
    prepared.collection.path.unlink()
    assert prepared.yardsticks() == found


def test_a_large_corpus_is_sampled_and_that_is_said(tmp_path, make_source, monkeypatch):
    for name, size in (("PRIMED", 2000), ("SCORED", 1000), ("COMPARED", 5000)):
        monkeypatch.setattr(yardsticks, name, size)
    found = prepare(make_source(documents=800), 280, tmp_path).yardsticks()
    for name, size in (("primed", 2000), ("scored", 1000), ("compared", 5000)):
        assert 0.3 * size < getattr(found, f"{name}_bytes") < 3 * size < found.train_bytes
    assert "(a sample of 0 MB)" in found.sentences()[0] and "as far as a sample" in found.sentences()[1]
