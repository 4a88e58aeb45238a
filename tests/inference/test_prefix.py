"""Kept states: the longest match, the least recently used dropped, shared memory counted once."""

import torch

from tryplicity.components import State
from tryplicity.inference.prefix import Prefixes, clone, tensors


def state(size=250, value=0.0):
    """One layer with one tensor of 4 * size bytes."""
    return [[State(x=torch.full((size,), value), seen=size), None]]


LAST = torch.zeros(0), torch.zeros(0)


def test_the_longest_beginning_wins():
    kept = Prefixes(1 << 20)
    for length in (2, 5, 3):
        kept.keep(range(length), state(value=length))
    found = kept.find([0, 1, 2, 3, 4, 9, 9])
    assert (found.read, float(found.state[0][0]["x"][0]), found.last, found.shared) == (5, 5.0, None, 5)
    assert kept.find([0, 1, 2, 3, 8])[0] == 3 and kept.find([0, 1, 2, 3, 8]).shared == 4
    assert kept.find([7, 1, 2]) == (0, None, None, 0)


def test_all_of_a_prompt_needs_what_came_last():
    kept = Prefixes(1 << 20)
    kept.keep([1, 2], state())
    kept.keep([1, 2, 3], state())
    assert kept.find([1, 2, 3]).read == 2  # its logits are not known
    kept.keep([1, 2, 3], state(), LAST)
    assert kept.find([1, 2, 3])[::2] == (3, LAST)
    kept.keep([1, 2, 3], state())  # knows less than what is there
    assert kept.find([1, 2, 3]).last is LAST and kept.find([1, 2, 3, 4]).last is None
    assert len(kept) == 2 and kept.bytes == 2000


def test_what_is_found_goes_its_own_way():
    kept = Prefixes(1 << 20)
    kept.keep([1], state(value=1.0))
    kept.find([1, 2]).state[0][0]["x"].fill_(9.0)
    assert float(kept.find([1, 2]).state[0][0]["x"][0]) == 1.0


def test_bytes_are_bounded_and_the_least_recently_used_goes_first():
    kept = Prefixes(3000)
    for token in (1, 2, 3):
        kept.keep([token], state())
    assert kept.bytes == 3000
    kept.find([1, 5])  # used
    kept.keep([4], state())
    assert [kept.find([token, 0]).read for token in (1, 2, 3, 4)] == [1, 0, 1, 1] and kept.bytes == 3000
    kept.keep([5], state(1000))  # more than there may be
    assert (len(kept), kept.bytes) == (0, 0)


def test_their_number_is_bounded():
    kept = Prefixes(1 << 30, most=10)
    for token in range(25):
        kept.keep([token], state(1))
    assert len(kept) == 10 and kept.find([24, 0]).read == 1 and kept.find([14, 0]).read == 0


def test_shared_memory_is_counted_once_and_freed_with_the_last():
    kept, pages = Prefixes(10_000), torch.zeros(1000)
    for token in (1, 2, 3):
        kept.keep([token], [[State(pages=[pages[:500], pages[500:]], tail=torch.zeros(100))]])
    assert kept.bytes == 4000 + 3 * 400
    kept.keep([1], state(1), LAST)
    assert kept.bytes == 4000 + 2 * 400 + 4
    kept.keep([4], state(2000))
    assert kept.bytes == 8000 + 4 and len(kept) == 2  # 2 and 3 had to go, and with them the pages
    kept.clear()
    assert (len(kept), kept.bytes) == (0, 0)


def test_the_states_of_a_model_are_found_and_cloned(packed_model):
    """Whatever its layers keep: a clone goes on exactly as the original would have."""
    with torch.inference_mode():
        original = packed_model.new_state(1)
        packed_model(torch.arange(10, 140)[None], state=original)
        twin = clone(original)
        assert sum(tensor.nbytes for tensor in tensors(original)) > 10_000
        ahead = packed_model(torch.arange(140, 150)[None], state=original)
        assert torch.equal(packed_model(torch.arange(140, 150)[None], state=twin), ahead)


def test_pages_that_clones_share_count_once(packed_model):
    with torch.inference_mode():
        grown, kept = packed_model.new_state(1), Prefixes(1 << 30)
        packed_model(torch.arange(10, 210)[None], state=grown)
        kept.keep(range(200), clone(grown))
        first = kept.bytes
        kept.keep(range(201), clone(grown))
        second = kept.bytes - first
    attention = next(own for layer in grown for own in layer if own is not None and "pages" in own)
    full = sum(page.nbytes for page in attention["pages"][:3])  # 192 of 200 tokens
    assert second == first - full > 0
