"""Small things of data, each counted by hand: parts of long texts, names of documents, what progress is told."""

import hashlib
import itertools
import json

import numpy as np
import pytest

from tryplicity import Conversation, Document, Source
from tryplicity.data import prepare
from tryplicity.data.conversations import prepare_conversations
from tryplicity.data.documents import HELD_OUT_SHARE, collect, in_parts, split_hash, unit_hash
from tryplicity.data.packing import PackedStream
from tryplicity.data.tokenizer import save_tokenizer, train_tokenizer
from tryplicity.data.yardsticks import xz_bits_per_byte


def parts(text, longest, id="work"):
    return [(part.id, part.text) for part in in_parts(Document(id, text, "text", "u"), longest)]


@pytest.mark.parametrize("text, longest, cut", [
    ("abcd", 4, ["abcd"]), ("abcde", 4, ["abcd", "e"]), ("abcdefgh", 4, ["abcd", "efgh"]),
    ("abc defg", 6, ["abc ", "defg"]),      # behind the space
    ("ab\ncd efgh", 6, ["ab\ncd ", "efgh"]), ("a bcdefgh", 6, ["a bcde", "fgh"]),      # the first half has no place
    ("abc\n d efgh", 8, ["abc\n d ", "efgh"]),
    ("abcd\ne f gh", 8, ["abcd\n", "e f gh"]),     # a line rather than a space, though this lies further behind
    ("abcde\n\ne\nf gh", 10, ["abcde\n\n", "e\nf gh"]),      # and an empty line rather than a line
    ("a b c d e f", 3, ["a ", "b ", "c ", "d ", "e f"])])
def test_where_a_long_text_is_cut(text, longest, cut):
    assert [part for _, part in parts(text, longest)] == cut


def test_parts_are_numbered_from_one_and_stay_together():
    assert [id for id, _ in parts("x" * 25, 10)] == ["work#1", "work#2", "work#3"]
    assert [id for id, _ in parts("x" * 25, 10, "work#code")] == ["work#code.1", "work#code.2", "work#code.3"]
    assert len({split_hash(id) for id, _ in parts("x" * 25, 10)}) == 1 and parts("x" * 10, 10) == [("work", "x" * 10)]


def test_a_hash_is_the_same_everywhere_and_spread_evenly():
    numbers = [unit_hash(str(n)) for n in range(2000)]
    assert all(0 <= number < 1 for number in numbers) and len(set(numbers)) == 2000
    assert 0.47 < sum(numbers) / 2000 < 0.53
    number = int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "big")
    assert unit_hash("a", "salt") != unit_hash("a") == pytest.approx(number / 2**64, abs=1e-15)


@pytest.fixture
def told():
    """What progress was told, and the function that is told."""
    said = []
    return said, lambda stage, done, total: said.append((stage, done, total))


def test_progress_is_told_of_every_64_documents(make_source, tmp_path, told):
    said, progress = told
    collect(make_source(documents=200), tmp_path, progress)
    assert [(stage, done) for stage, done, total in said] == [("reading documents", n) for n in (64, 128, 192)]
    said.clear()
    collect(make_source(documents=200), tmp_path, progress)
    assert said == []       # it is there


def test_the_share_that_is_held_out_is_by_hash(make_source, tmp_path):
    collection = collect(make_source(documents=400), tmp_path)
    ids = [document.id for document in collection.documents()]
    held_out = [document.id for document in collection.documents(held_out=True)]
    assert held_out == [id for id in ids if split_hash(id) < HELD_OUT_SHARE] and 0 < len(held_out) < 40
    assert [d.id for d in collection.documents(held_out=False)] == [id for id in ids if id not in held_out]


@pytest.mark.parametrize("number, said", [
    (1, "the document a"), (2, "the documents a, b"), (5, "the documents a, b, c, d, e"),
    (6, "the documents a, b, c, d, e and 1 more"), (8, "the documents a, b, c, d, e and 3 more")])
def test_the_documents_of_a_batch_in_words(make_source, tmp_path, number, said):
    tokens = prepare(make_source(documents=250), 280, tmp_path).train
    names = {tokens.names([n])[0]: letter for n, letter in zip(range(8), "abcdefgh", strict=True)}
    rows = [np.array([n, 0, -1]) for n in range(number)]        # twice the same, and padding
    told = tokens.describe(rows)
    for name, letter in sorted(names.items(), key=lambda pair: -len(pair[0])):
        told = told.replace(name, letter)
    assert told == said


def test_rows_of_changing_lengths_deliver_every_token_once(make_source, tmp_path):
    """Cut anew again and again inside an epoch, down to rows of one token: nothing twice, nothing never."""
    tokens = prepare(make_source(documents=60), 280, tmp_path).train
    stream = PackedStream(tokens, 3, documents=np.arange(3))
    for lengths in ((7, 3, 5), (16, 1), (2, 9, 2, 1), (1,), (5, 5, 30)):
        state, seen = {}, []
        for length in itertools.cycle(lengths):
            pieces, after = stream.next_row(state, length)
            assert sum(piece.end - piece.start for piece in pieces) == length
            seen += [place for piece in pieces if piece.epoch == 0 for place in range(piece.start, piece.end)]
            if after["epoch"]:
                break
            state = json.loads(json.dumps(after))       # as it is kept in a checkpoint
        assert sorted(seen) == list(range(stream.tokens_per_epoch)), lengths


def test_xz_that_was_primed_looks_back_over_all_of_it():
    """What stands at the beginning of a long text before is found again at the end of what comes after."""
    rng = np.random.default_rng(0)
    first, between = (rng.integers(0, 256, size, dtype=np.uint8).tobytes() for size in (40_000, 60_000))
    assert xz_bits_per_byte(first, first + between) < 0.2
    assert 7.9 < xz_bits_per_byte(first, between) < 8.2 and 7.9 < xz_bits_per_byte(first) < 8.2


def test_conversations_keep_the_tokenizer_that_they_were_made_with(prepared_chats):
    prepared, tokenizer = prepared_chats
    assert prepared.tokenizer_path.read_bytes() == tokenizer.read_bytes()
    assert prepared.folder.parent.name == "tokens" and prepared.tokenizer_path.parent == prepared.folder


class Talks(Source):
    name = "talks"

    def fingerprint(self):
        return "1"

    def conversations(self):
        for n in range(60):
            yield Conversation(f"talk/{n}", ({"role": "user", "content": f"What is {n}?"},
                                             {"role": "assistant", "content": f"It is {n}."}), "")


@pytest.fixture
def prepared_chats(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    save_tokenizer(train_tokenizer(["what is the answer"], 270), tokenizer)
    return prepare_conversations(Talks(), tokenizer, 270, tmp_path / "cache"), tokenizer
