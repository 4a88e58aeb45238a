"""Rows: every token once an epoch, exact resume, masks at document ends; held-out bits per byte."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import UserError
from tryplicity.data.documents import collect
from tryplicity.data.packing import IGNORE, PackedStream, Piece, permutation
from tryplicity.data.prepared import prepare
from tryplicity.data.tokenizer import BOS, EOS, load_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, make_source):
    return prepare(make_source(documents=250), 280, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def stream(prepared):
    return prepared.stream(seed=7)


def plain_epoch(stream, epoch):
    """The tokens of an epoch and each one's document, put together document by document."""
    tokens = stream.tokens
    order = permutation(len(stream.chosen), stream.seed, epoch)
    documents = [stream.chosen[place] for place in order]
    ids = [list(tokens.tokens_N[tokens.start_D[d]:tokens.end_D[d]]) for d in documents]
    docs = [[(epoch, place)] * len(text) for place, text in enumerate(ids)]
    return list(itertools.chain(*ids)), list(itertools.chain(*docs))


def test_an_epoch_holds_every_token_of_every_document_once(stream):
    ids_N, docs_N = stream.run(0, stream.tokens_per_epoch)
    documents = np.split(ids_N, np.flatnonzero(np.diff(docs_N)) + 1)
    ends = zip(stream.tokens.start_D, stream.tokens.end_D, strict=True)
    assert sorted(map(tuple, documents)) == sorted(tuple(stream.tokens.tokens_N[s:e]) for s, e in ends)
    assert all(d[0] == BOS and d[-1] == EOS for d in documents)


def test_epochs_differ_in_order_and_so_do_seeds(prepared, stream):
    n = stream.tokens_per_epoch
    first, second = stream.run(0, n)[0], stream.run(n, n)[0]
    other = prepared.stream(seed=8).run(0, n)[0]
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    assert np.array_equal(np.sort(first), np.sort(second))
    assert np.array_equal(prepared.stream(seed=7).run(0, n)[0], first)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_batch_anywhere_equals_rows_put_together_by_hand(stream, data):
    n = stream.tokens_per_epoch
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 90))
    first = data.draw(st.integers(0, 3 * n // length))
    batch = stream.batch(first * length, rows, length)
    for row in range(rows):
        epoch = (first + row) * length // n
        ids, docs = plain_epoch(stream, epoch)
        next_ids, next_docs = plain_epoch(stream, epoch + 1)
        ids, docs = ids + next_ids, docs + next_docs
        # rows of an endless stream; those that lie in this epoch whole are delivered in another order, before the last
        earlier = math.ceil(epoch * n / length)
        whole = (epoch + 1) * n // length - earlier
        place, offset = first + row - earlier, earlier * length - epoch * n
        if place < whole:
            place = int(permutation(whole, stream.seed + 1, epoch)[place])
        start = offset + place * length
        at = range(start, start + length)
        assert batch.ids_BT[row].tolist() == [ids[i] for i in at]
        expected = [ids[i + 1] if docs[i + 1] == docs[i] else IGNORE for i in at]
        assert batch.targets_BT[row].tolist() == expected
        distinct = list(dict.fromkeys(docs[i] for i in at))
        assert batch.doc_ids_BT[row].tolist() == [distinct.index(docs[i]) for i in at]
    assert [t.dtype for t in batch[:3]] == [torch.int64, torch.int64, torch.int32]


def delivered(stream, cuts):
    """Where in the file each token stood that was delivered, in order; every resume goes through JSON."""
    state, places = {}, []
    for rows, length in cuts:
        pieces = []
        for _ in range(rows):
            row, state = stream.next_row(json.loads(json.dumps(state)), length)
            pieces += row
        places.append(stream.stretches(pieces).places())
    return np.concatenate(places)


@pytest.mark.parametrize("length", [7, 64, 4001, 100_000])
def test_the_rows_of_an_epoch_hold_every_token_once(stream, length):
    n = stream.tokens_per_epoch
    places = delivered(stream, [(math.ceil(2 * n / length), length)])
    for epoch in (0, 1):
        assert sorted(places[epoch * n:(epoch + 1) * n]) == list(range(n))
    if n / length > 20:
        assert not np.array_equal(places[:length], stream.stretches([Piece(0, 0, length)]).places())


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 700)), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_every_token_comes_once_an_epoch_whatever_the_lengths_of_rows(stream, cuts):
    """However a curriculum changes the rows: of the first n tokens delivered each is another one, of the next n too."""
    n = stream.tokens_per_epoch
    places = delivered(stream, cuts)
    for start in range(0, len(places), n):
        epoch = places[start:start + n]
        assert len(set(epoch.tolist())) == len(epoch) == min(n, len(places) - start)


def test_a_half_and_a_full_length_leave_nothing_out(stream):
    n = stream.tokens_per_epoch
    half = n // 2 // 24
    batches, state = stream.take({}, half, 24)
    rest, state = stream.take(state, (n - half * 24) // 48, 48)
    counts = np.bincount(delivered(stream, [(half, 24), ((n - half * 24) // 48, 48)]), minlength=n)
    assert counts.max() == 1 and (counts == 0).sum() < 48
    inputs = torch.cat([batches.ids_BT.flatten(), rest.ids_BT.flatten()])
    expected = torch.bincount(torch.from_numpy(stream.tokens.tokens_N.astype(np.int64)), minlength=280)
    assert (expected - torch.bincount(inputs, minlength=280)).sum() == n - len(inputs) < 48


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 90)), min_size=2, max_size=8))
@settings(max_examples=20, deadline=None)
def test_what_does_not_follow_in_the_text_is_another_document_in_the_row(stream, cuts):
    """After a change of length a row may hold two pieces of one document, or what stood far apart."""
    tokens, state = stream.tokens, {}
    places = iter(delivered(stream, cuts).tolist())
    for rows, length in cuts:
        batch, state = stream.take(state, rows, length)
        assert batch.ids_BT.shape == (rows, length)
        for ids_T, targets_T, docs_T, documents in zip(*batch[:3], batch.documents, strict=True):
            at = [next(places) for _ in range(length)]
            assert ids_T.tolist() == [tokens.tokens_N[place] for place in at]
            number = 0
            for t, place in enumerate(at):
                document = int(np.searchsorted(tokens.end_D, place, side="right"))
                if t and (place != at[t - 1] + 1 or place == tokens.start_D[document]):
                    number += 1
                assert docs_T[t] == number and documents[number] == document
                last = place + 1 == tokens.end_D[document]
                assert targets_T[t] == (IGNORE if last else tokens.tokens_N[place + 1])
            assert len(documents) == number + 1


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_world_size_goes_through_the_same_rows(stream, world):
    rows, length, steps = 12 // world, 16, 5
    seen, position = [], 0
    for _ in range(steps):
        starts = [position + rank * rows * length for rank in range(world)]
        ranks = [stream.batch(start, rows, length).ids_BT for start in starts]
        seen.append(torch.cat(ranks))
        position += world * rows * length
    assert torch.equal(torch.cat(seen), stream.batch(0, 12 * steps, length).ids_BT)


def test_going_on_at_a_position_needs_nothing_else(prepared):
    length = 24
    whole = [prepared.stream(3).batch(step * 2 * length, 2, length) for step in range(9)]
    for stopped in range(1, 9):
        fresh = prepared.stream(3)
        for step in range(stopped, 9):
            again = fresh.batch(step * 2 * length, 2, length)
            assert all(torch.equal(a, b) for a, b in zip(again[:3], whole[step][:3], strict=True))


def test_the_end_of_a_document_has_no_target_and_the_next_one_begins(stream):
    batch = stream.batch(0, 1, stream.tokens_per_epoch)
    ends = batch.ids_BT[0] == EOS
    assert ends.sum() == len(stream.chosen)
    assert torch.equal(batch.targets_BT[0] == IGNORE, ends)
    assert (batch.targets_BT != BOS).all()
    assert torch.equal(batch.doc_ids_BT[0], (torch.cumsum(ends, 0) - ends.long()).int())


def test_the_order_is_the_same_on_every_machine():
    # worked out once with Python's own unbounded integers, as splitmix64 is written down
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF     # the generator's published first number for seed 0
    key = mix(mix(5) ^ 2)
    assert permutation(50, 5, 2).tolist() == sorted(range(50), key=lambda i: mix(i ^ key))


def test_the_documents_of_a_batch_can_be_named(prepared, stream):
    ids = [d.id for d in prepared.collection.documents(held_out=False)]
    order = [ids[d] for d in permutation(len(ids), stream.seed, 0)]
    whole = stream.batch(0, 1, stream.tokens_per_epoch)
    assert stream.tokens.names(whole.documents[0].tolist()) == order
    assert stream.tokens.describe(whole.documents) == f"the documents {', '.join(order[:5])} and {len(ids) - 5} more"
    pair = stream.batch(8, 1, 2)
    assert stream.tokens.describe(pair.documents) in {f"the document {name}" for name in ids}


def test_domains_can_be_asked_for_alone(prepared):
    code = prepared.stream(seed=0, domains=["code"])
    assert code.tokens_per_epoch == prepared.manifest["parts"]["train"]["domains"]["code"]["tokens"]
    both = prepared.stream(0, ["code", "text"])
    assert both.tokens_per_epoch == len(prepared.train)
    with pytest.raises(UserError, match=r"no domain 'maths'.*code, text"):
        prepared.stream(0, ["maths"])


@pytest.mark.parametrize("rows, length", [(1, 7), (3, 16), (4, 1000)])
def test_held_out_rows_hold_every_token_once(prepared, rows, length):
    held_out = prepared.held_out()
    batches = list(held_out.batches(rows, length))
    ids = torch.cat([b.ids_BT.flatten() for b in batches])
    assert ids[:held_out.length].tolist() == list(prepared.heldout.tokens_N)
    assert len(ids) - held_out.length < length and not ids[held_out.length:].any()
    # every token but the first of each document is a target, once
    targets = torch.cat([b.targets_BT.flatten() for b in batches])
    expected = [int(t) for t in prepared.heldout.tokens_N if t != BOS]
    assert targets[targets != IGNORE].tolist() == expected
    padding = torch.cat([b.doc_ids_BT.flatten() for b in batches])[held_out.length:]
    last = batches[-1]
    assert not set(padding.tolist()) & set(last.doc_ids_BT[-1][last.ids_BT[-1] != 0].tolist())


def test_the_bytes_of_the_targets_are_the_bytes_of_the_text(prepared):
    texts = [d.text for d in prepared.collection.documents(held_out=True)]
    assert sum(b.bytes for b in prepared.held_out().batches(2, 13)) == sum(len(t.encode()) for t in texts)
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    for batch in prepared.held_out().batches(1, 31):
        text = tokenizer.decode([t for t in batch.targets_BT[0].tolist() if t != IGNORE])
        if "\ufffd" not in text:    # a row may be cut inside a character
            assert batch.bytes == len(text.encode())


def test_a_uniform_model_pays_what_the_count_of_targets_says(prepared):
    vocabulary, nats, size = 280, 0.0, 0
    for batch in prepared.held_out().batches(4, 32):
        logits = torch.zeros(*batch.ids_BT.shape, vocabulary)
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(),
                                                  ignore_index=IGNORE, reduction="sum").item()
        size += batch.bytes
    counts = prepared.manifest["parts"]["heldout"]
    scored = counts["tokens"] - counts["documents"]
    expected = scored * math.log2(vocabulary) / counts["bytes"]
    assert nats / math.log(2) / size == pytest.approx(expected, rel=1e-4)


def test_a_part_of_the_held_out_rows_is_spread_evenly_and_fixed(prepared):
    held_out = prepared.held_out()
    every = torch.cat([b.ids_BT for b in held_out.batches(8, 8)])
    some = [torch.cat([b.ids_BT for b in held_out.batches(2, 8, max_rows=5)]) for _ in range(2)]
    assert torch.equal(some[0], some[1]) and len(some[0]) == 5
    assert torch.equal(some[0], every[[i * len(every) // 5 for i in range(5)]])


def test_token_files_cut_short_are_refused(tmp_path, make_source):
    prepared = prepare(make_source(documents=250), 280, tmp_path)
    path = prepared.folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train\.bin: .* bytes where the manifest says"):
        _ = prepared.train


def test_seeds_of_any_size_and_sign_work(prepared):
    for seed in (0, -1, 2**70):
        assert isinstance(PackedStream(prepared.train, seed).batch(0, 1, 8).ids_BT, torch.Tensor)


def test_the_collection_is_the_truth_the_tokens_stand_for(prepared, make_source, tmp_path):
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    texts = [d.text for d in collect(make_source(documents=250), tmp_path).documents(held_out=False)]
    starts, ends = prepared.train.start_D, prepared.train.end_D
    decoded = [tokenizer.decode(prepared.train.tokens_N[s + 1:e - 1].tolist(), skip_special_tokens=False)
               for s, e in zip(starts, ends, strict=True)]
    assert decoded == texts


def text_of(tokenizer, tokens, document):
    ids = tokens.tokens_N[tokens.start_D[document]:tokens.end_D[document]]
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("length", [5, 64, 3000])
def test_each_row_says_which_documents_it_is_of(prepared, stream, length):
    """Over the end of an epoch too: the text of each piece of a row stands in the document named."""
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    rows = 6
    last = math.ceil(stream.tokens_per_epoch / length) * length
    for position in (0, last - 3 * length):
        batch = stream.batch(position, rows, length)
        assert len(batch.documents) == rows
        for ids_T, doc_ids_T, documents in zip(batch.ids_BT, batch.doc_ids_BT, batch.documents, strict=True):
            assert len(documents) == doc_ids_T.max() + 1
            for number, document in enumerate(documents):
                piece = ids_T[doc_ids_T == number].tolist()
                if BOS in piece and EOS in piece:
                    assert piece == stream.tokens.tokens_N[
                        stream.tokens.start_D[document]:stream.tokens.end_D[document]].tolist()
                text = tokenizer.decode(piece, skip_special_tokens=False).strip("\ufffd")
                assert text in text_of(tokenizer, stream.tokens, document)


def test_the_rows_of_the_held_out_part_say_it_too(prepared):
    held_out = prepared.held_out(["text"])
    tokens = prepared.heldout
    seen = {}
    for batch in held_out.batches(3, 50):
        for ids_T, doc_ids_T, documents in zip(batch.ids_BT, batch.doc_ids_BT, batch.documents, strict=True):
            assert len(documents) == doc_ids_T.max() + 1
            for number, document in enumerate(documents.tolist()):
                seen[document] = seen.get(document, []) + ids_T[doc_ids_T == number].tolist()
    padding = seen.pop(-1, [])
    assert not any(padding) and sorted(seen) == held_out.chosen.tolist()
    for document, ids in seen.items():
        assert ids == tokens.tokens_N[tokens.start_D[document]:tokens.end_D[document]].tolist()


def test_a_stream_of_some_documents_holds_these_alone(prepared):
    tokens = prepared.train
    wanted = np.array([41, 3, 3, 120, 77])
    some = PackedStream(tokens, 5, documents=wanted)
    assert some.chosen.tolist() == [3, 41, 77, 120]
    ids_N, docs_N = some.run(0, some.tokens_per_epoch)
    documents = np.split(ids_N, np.flatnonzero(np.diff(docs_N)) + 1)
    assert sorted(map(tuple, documents)) == sorted(
        tuple(tokens.tokens_N[tokens.start_D[d]:tokens.end_D[d]]) for d in (3, 41, 77, 120))
    assert set(np.concatenate(some.batch(0, 9, 40).documents)) <= {3, 41, 77, 120}
    every = PackedStream(tokens, 5, documents=np.arange(len(tokens.end_D)))
    for position in (0, 960):
        batches = every.batch(position, 3, 32), PackedStream(tokens, 5).batch(position, 3, 32)
        assert all(torch.equal(a, b) for a, b in zip(*(batch[:3] for batch in batches), strict=True))
    code = tokens.choose(["code"])[:2]
    assert PackedStream(tokens, 5, ["code"], np.append(code, tokens.choose(["text"])[:5])).chosen.tolist() == [*code]
    with pytest.raises(UserError, match="no training text in the domains text among the 2 documents asked for"):
        PackedStream(tokens, 5, ["text"], code)


@pytest.fixture(scope="module")
def masked(tmp_path_factory, make_source):
    """The same data, of which only every third token is to be learnt, and the mask."""
    prepared = prepare(make_source(documents=250), 280, tmp_path_factory.mktemp("masked"))
    for part in ("train", "heldout"):
        mask_N = np.arange(prepared.manifest["parts"][part]["tokens"]) % 3 == 0
        mask_N.astype(np.uint8).tofile(prepared.folder / f"{part}.mask.bin")
    return prepared


def test_only_unmasked_tokens_are_targets(prepared, masked, stream):
    length = 37
    whole, some = stream.batch(0, 8, length), masked.stream(7).batch(0, 8, length)
    assert torch.equal(whole.ids_BT, some.ids_BT) and torch.equal(whole.doc_ids_BT, some.doc_ids_BT)
    size = 0
    for row, places_N in enumerate(delivered(stream, [(8, length)]).reshape(8, length)):
        places_N = np.append(places_N, places_N[-1] + 1)
        wanted_T = torch.from_numpy(places_N[1:] % 3 == 0) & (whole.targets_BT[row] != IGNORE)
        assert wanted_T.any() and torch.equal(some.targets_BT[row], whole.targets_BT[row].where(wanted_T, IGNORE))
        size += int(prepared.train.token_bytes_V[whole.targets_BT[row][wanted_T]].sum())
    assert some.bytes == size > 0


def test_the_held_out_part_counts_the_bytes_of_unmasked_tokens_alone(masked):
    tokens = masked.heldout
    batches = list(masked.held_out().batches(2, 13))
    targets = torch.cat([b.targets_BT.flatten() for b in batches])
    expected = [int(t) for place, t in enumerate(tokens.tokens_N) if place % 3 == 0 and t != BOS]
    assert targets[targets != IGNORE].tolist() == expected
    assert sum(b.bytes for b in batches) == tokens.token_bytes_V[expected].sum() < tokens.bytes_D.sum()


def test_a_mask_of_another_length_is_refused(tmp_path, make_source):
    prepared = prepare(make_source(documents=250), 280, tmp_path)
    (prepared.folder / "train.mask.bin").write_bytes(b"\1" * 10)
    with pytest.raises(UserError, match=r"train\.mask\.bin: 10 bytes where the manifest says"):
        _ = prepared.train
