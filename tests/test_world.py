"""Who has which rows, and what ranks tell one another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import together
from tryplicity import UserError, World


@given(st.integers(0, 100), st.integers(1, 17))
def test_every_row_is_of_one_rank_and_sizes_differ_by_one_at_most(rows, size):
    worlds = [World(rank, size) for rank in range(size)]
    parts = [range(rows)[world.part(rows)] for world in worlds]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert max(map(len, parts)) == worlds[0].most(rows)


def test_one_process_alone_agrees_with_itself():
    world, tensors = World(), [torch.ones(2), torch.zeros((), dtype=torch.int64)]
    assert world.total(tensors)[0] is tensors[0] and world.any(True) and not world.any(False)
    assert world.first("a") == "a" and world.gathered("a") == ["a"] and world.decided(lambda: 3) == 3


def agreeing(world):
    big = 2**24 + 1  # fp32 has no such number
    totals = world.total([torch.full((2, 1), float(world.rank)), torch.tensor(big), torch.zeros(0)])
    said = {"rank": world.rank}
    refused = None
    try:
        world.decided(lambda: refuse(world.rank))
    except UserError as error:
        refused = str(error)
    return {"totals": [(t.tolist(), t.dtype) for t in totals], "any": [world.any(world.rank == 2), world.any(False)],
            "first": world.first(said), "gathered": world.gathered(said), "decided": world.decided(lambda: world.rank),
            "refused": refused}


def refuse(rank):
    raise UserError(f"rank {rank} will not")


def test_all_ranks_come_to_the_same():
    found = together(3, agreeing)
    assert found == [{
        "totals": [([[3.0], [3.0]], torch.float32), (3 * (2**24 + 1), torch.int64), ([], torch.float32)],
        "any": [True, False], "first": {"rank": 0}, "gathered": [{"rank": 0}, {"rank": 1}, {"rank": 2}], "decided": 0,
        "refused": "rank 0 will not"}] * 3


def failing(world, how):
    if world.rank == 1 and how == "error":
        raise ValueError("this one rank")
    if world.rank == 1 and how == "exit":
        import os
        os._exit(7)
    world.first(None)
    if world.rank == 1 and how == "hang":
        while True:
            pass


@pytest.mark.parametrize(("how", "said", "limit"), [
    ("error", "rank 1: Traceback.*ValueError: this one rank", 30), ("exit", "rank 1: ended with exit code 7", 30),
    ("hang", "rank 1: .*in failing", 3)])
def test_a_test_of_several_ranks_says_which_failed_and_how(how, said, limit):
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        together(2, failing, how, limit=limit)
