"""Long arrays are made in pieces and lie on the disk: the same comes out, and memory does not grow with them."""

import hashlib
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fake import fake_tokens
from tryplicity import UserError
from tryplicity.data import ordering, packing, remainder
from tryplicity.data.mixture import Mixture
from tryplicity.data.packing import HeldOut, PackedStream

STAGES = ((9, 64), (12, 16), (3, 128), (40, 64), (30, 48), (2, 700), (60, 32))


@pytest.fixture
def in_pieces(monkeypatch):
    """`in_pieces(size)`: from now on so many entries are worked on at a time."""
    def at(size):
        for module in (ordering, packing, remainder):
            monkeypatch.setattr(module, "AT_ONCE", size)

    return at


def read(tokens):
    """Rows of several lengths, of chosen documents, of a mixture, and held-out ones: as one digest."""
    stream, state, found = PackedStream(tokens, 11), {}, []
    for rows, length in STAGES:
        batch, state = stream.take(state, rows, length)
        found.append(batch)
    found.append(PackedStream(tokens, 5, ["code", "text"], np.arange(0, 150, 2)).take({}, 90, 64)[0])
    found.append(Mixture(tokens, 3, {"code": 0.5, "math": 0.5}, np.arange(20, 120)).batch({}, 60, 32)[0])
    found += HeldOut(tokens, ["math", "text"]).batches(7, 50)
    digest = hashlib.sha256()
    for batch in found:
        for array in (*(tensor.numpy() for tensor in batch[:3]), *batch.documents):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest(), state


def test_the_rows_are_the_same_however_small_the_pieces(tmp_path, in_pieces):
    whole = read(fake_tokens(tmp_path, 150, real=True))
    for size in (7, 64):
        in_pieces(size)
        tokens = fake_tokens(tmp_path, 150, real=True)
        assert read(tokens) == whole
        assert isinstance(PackedStream(tokens, 0)._epoch(0)[0].base, np.memmap)


@given(st.integers(0, 400), st.integers(0, 2**64), st.integers(0, 3), st.integers(8, 60))
@settings(max_examples=60, deadline=None)
def test_a_long_order_is_the_one_that_sorting_all_of_it_gives(tmp_path_factory, size, seed, epoch, at_once):
    whole = ordering.permutation(size, seed, epoch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "AT_ONCE", at_once)
        found = ordering.permutation(size, seed, epoch, tmp_path_factory.getbasetemp())
    assert found.tolist() == whole.tolist() and sorted(found.tolist()) == list(range(size))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=12), st.integers(1, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_left_is_what_counting_token_by_token_leaves(tmp_path_factory, gaps, length, data):
    at, places = 0, []
    for gap, size in gaps:
        at += gap
        places += range(at, at + size)
        at += size
    joined = [[place for _, place in run] for _, run in
              itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])]
    runs = np.array([run[0] for run in joined], np.int64), np.cumsum([len(run) for run in joined], dtype=np.int64)
    rows = len(places) // length
    gone = data.draw(st.lists(st.integers(0, rows - 1), unique=True)) if rows else []
    expected = [place for n, place in enumerate(places) if n // length not in gone]
    with pytest.MonkeyPatch.context() as patch:
        at_once = data.draw(st.integers(1, 20))
        for module in (ordering, remainder):
            patch.setattr(module, "AT_ONCE", at_once)
        start, end = remainder.without(runs, length, np.array(gone, np.int64), tmp_path_factory.getbasetemp())
    sizes = np.diff(end, prepend=0)
    assert [s + n for s, size in zip(start.tolist(), sizes.tolist(), strict=True) for n in range(size)] == expected
    assert all(a + n < b for a, n, b in zip(start, sizes, start[1:], strict=False))     # none touches the next


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """Five times as many documents and rows: as arrays in memory they would be 60 MB more."""
    peaks = []
    for documents in (300_000, 1_500_000):
        tokens = fake_tokens(tmp_path / str(documents), documents, mean=40)
        tracemalloc.start()
        stream, state = PackedStream(packing.TokenFile(tokens.folder, "train"), 0), {}
        for length in (64, 128, 64):
            _, state = stream.take(state, 40, length)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 20e6, peaks


def test_a_folder_that_cannot_be_written_and_a_full_disk(tmp_path, in_pieces, monkeypatch):
    in_pieces(8)
    tokens = fake_tokens(tmp_path, 60, real=True)
    monkeypatch.setattr(ordering.os, "access", lambda *asked: False)
    assert len(PackedStream(tokens, 0)._epoch(0)[0]) == 60
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(ordering, "_nameless", lambda folder: full)
        with pytest.raises(UserError, match=r"cannot keep the order of \d+ documents or rows there \(No space left"):
            PackedStream(tokens, 0)._epoch(1)


def test_the_order_is_what_it_was(tmp_path):
    """Runs that were begun go on in it."""
    tokens = fake_tokens(tmp_path, 150, real=True)
    assert read(tokens) == ("69b7946f15b011268a36f8a36b1a01c120223f8f7d95380aa2952ae4841d4fc3",
                            {"epoch": 1, "start": 6, "rows": [[32, 30]]})
