"""What 1, 2, 3 and 8 ranks read is the same rows in the same global order, resumed at other world sizes and across
changes of stage too; and of every epoch each token once."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fake import DOMAINS, fake_tokens
from tryplicity.data.mixture import Mixture
from tryplicity.data.packing import joined
from tryplicity.world import World

SEED = 5
#: a stage: the shares of domains (None: as they are), which documents, and the length of rows
stages = st.tuples(st.sampled_from([None, {"code": 1.0, "text": 3.0}, {"code": 1.0, "math": 1.0, "text": 1.0}]),
                   st.sampled_from([None, 20]), st.integers(1, 60))
#: a part of a run: its stage, steps, rows of a step
parts = st.tuples(stages, st.integers(1, 5), st.integers(1, 9))
worlds = st.sampled_from([1, 2, 3, 8])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Each token is another one."""
    return fake_tokens(tmp_path_factory.mktemp("tokens"), 24, mean=20, real=True)


def read(tokens, run, sizes):
    """The rows of a run's parts, in global order, each with its stage; every part a new start on so many ranks."""
    found, positions = [], {}
    for ((shares, most, length), steps, rows), size in zip(run, sizes, strict=True):
        positions = json.loads(json.dumps(positions))       # as it is kept in a checkpoint
        ranks = [Mixture(tokens, SEED, shares, None if most is None else np.arange(most)) for _ in range(size)]
        for _ in range(steps):
            of_ranks = [mixture.batch(positions, rows, length, World(rank, size).part(rows))
                        for rank, mixture in enumerate(ranks)]
            assert all(after == of_ranks[0][1] for _, after in of_ranks)
            positions = of_ranks[0][1]
            whole = joined([batch for batch, _ in of_ranks if len(batch.ids_BT)], length)
            assert whole.ids_BT.shape == (rows, length)
            found.append(whole)
    return found, positions


@given(st.lists(parts, min_size=1, max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_any_ranks_read_the_same_rows_in_the_same_order(tokens, run, data):
    alone, end = read(tokens, run, [1] * len(run))
    ranks, same_end = read(tokens, run, [data.draw(worlds) for _ in run])
    assert same_end == end and len(ranks) == len(alone)
    for one, other in zip(alone, ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
        assert [list(row) for row in one.documents] == [list(row) for row in other.documents]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), worlds), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_every_token_once_whoever_reads_it(tokens, parts_of_run):
    """Rows of changing lengths, read by changing numbers of ranks, on to the end of the second epoch."""
    run = [((None, None, length), 3, rows) for length, rows, _ in parts_of_run]
    sizes = [size for *_, size in parts_of_run]
    n, length, rows = len(tokens), run[-1][0][2], run[-1][2]
    run.append(((None, None, length), 2 * n // (length * rows) + 1, rows))
    found, _ = read(tokens, run, [*sizes, sizes[-1]])
    ids = torch.cat([batch.ids_BT.flatten() for batch in found])
    for epoch in (ids[:n], ids[n:2 * n]):
        assert epoch.sort().values.tolist() == list(range(n))


@given(st.lists(st.tuples(st.sampled_from([{"code": 1.0, "text": 3.0}, {"code": 2.0, "math": 1.0, "text": 1.0}]),
                          st.integers(1, 60), st.integers(1, 9), worlds), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_each_domain_of_a_mixture_comes_once_an_epoch_across_stages_and_worlds(tokens, parts_of_run):
    found, _ = read(tokens, [((shares, None, length), 4, rows) for shares, length, rows, _ in parts_of_run],
                    [size for *_, size in parts_of_run])
    place = torch.cat([batch.ids_BT.flatten() for batch in found]).numpy()
    domain = tokens.domain_D[np.searchsorted(tokens.end_D, place, side="right")]
    for number in range(len(DOMAINS)):
        own = place[domain == number]
        n = tokens.size_of(tokens.choose([DOMAINS[number]]))
        for start in range(0, len(own), n):
            assert len(np.unique(own[start:start + n])) == len(own[start:start + n])
