"""Rows mixed by domain: the shares hold at every row, whatever the batches, and resuming is exact."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tryplicity import Document, Source, UserError
from tryplicity.data.mixture import Mixture
from tryplicity.data.prepared import prepare

LENGTH = 16
DOMAINS = ("text", "code", "math")


class ThreeDomains(Source):
    name = "three-domains"

    def fingerprint(self):
        return "1"

    def documents(self):
        for i in range(240):
            domain = DOMAINS[i % 3]
            yield Document(f"{domain}/{i}", f"{domain} number {i} " * (3 + i % 7), domain, "")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return prepare(ThreeDomains(), 280, tmp_path_factory.mktemp("cache")).train


def domains_of(tokens, batch):
    """The domain of each row, which all its documents share."""
    found = []
    for documents in batch.documents:
        row, = {tokens.domains[tokens.domain_D[d]] for d in documents}
        found.append(row)
    return found


def rows_of(mixture, rows, positions=None, length=LENGTH):
    batch, positions = mixture.batch(positions or {}, rows, length)
    return batch, positions


@given(st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any))
@settings(max_examples=40, deadline=None)
def test_after_any_number_of_rows_each_domain_is_within_one_row_of_its_share(tokens, weights):
    shares = {domain: weight / sum(weights) for domain, weight in zip(DOMAINS, weights, strict=True)}
    rows = domains_of(tokens, rows_of(Mixture(tokens, 0, shares), 90)[0])
    for count in range(1, len(rows) + 1):
        for domain, share in shares.items():
            assert abs(rows[:count].count(domain) - share * count) < 1


def test_each_domain_delivers_its_own_stream(tokens):
    """The rows of a domain are those of its stream alone, in its order."""
    from tryplicity.data.packing import PackedStream

    shares = {"text": 0.5, "code": 0.3, "math": 0.2}
    batch, _ = rows_of(Mixture(tokens, 3, shares), 60)
    domains = domains_of(tokens, batch)
    for domain in DOMAINS:
        mine = torch.tensor([d == domain for d in domains])
        alone = PackedStream(tokens, 3, [domain]).batch(0, int(mine.sum()), LENGTH)
        assert torch.equal(batch.ids_BT[mine], alone.ids_BT)
        assert torch.equal(batch.targets_BT[mine], alone.targets_BT)


def test_any_batch_size_and_any_stop_give_the_same_rows(tokens):
    shares = {"text": 0.65, "code": 0.2, "math": 0.15}
    whole, end = rows_of(Mixture(tokens, 1, shares), 48)
    for sizes in ([1] * 48, [7, 1, 16, 24], [47, 1]):
        positions, parts, sum_of_bytes = {}, [], 0
        for size in sizes:
            # as after a resume: another object, and positions that went through a checkpoint
            part, positions = Mixture(tokens, 1, shares).batch(json.loads(json.dumps(positions)), size, LENGTH)
            parts.append(part)
            sum_of_bytes += part.bytes
        assert positions == end and sum_of_bytes == whole.bytes
        assert torch.equal(torch.cat([part.ids_BT for part in parts]), whole.ids_BT)
        assert torch.equal(torch.cat([part.doc_ids_BT for part in parts]), whole.doc_ids_BT)


def test_positions_are_given_back_not_changed(tokens):
    mixture, positions = Mixture(tokens, 1, {"text": 0.5, "code": 0.5}), {"code:1": {"epoch": 5}}
    first, moved = mixture.batch(positions, 4, LENGTH)
    again, _ = mixture.batch(positions, 4, LENGTH)
    assert positions == {"code:1": {"epoch": 5}} and moved["code:1"] == {"epoch": 5}
    assert torch.equal(first.ids_BT, again.ids_BT)


def test_without_a_mixture_the_rows_are_those_of_the_plain_stream(tokens):
    from tryplicity.data.packing import PackedStream

    mixture, positions = Mixture(tokens, 4), {}
    for step in range(5):
        batch, positions = mixture.batch(positions, 6, LENGTH)
        plain = PackedStream(tokens, 4).batch(step * 6 * LENGTH, 6, LENGTH)
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], plain[:3], strict=True))
        assert batch.bytes == plain.bytes
        assert all(np.array_equal(a, b) for a, b in zip(batch.documents, plain.documents, strict=True))
    assert list(positions.values()) == [PackedStream(tokens, 4).at(5 * 6 * LENGTH, LENGTH)]


def test_a_stage_of_the_same_documents_goes_on_with_its_own_shares(tokens):
    """The second mixture owes nothing for what the first delivered, and does not begin the documents anew."""
    first, second = ({"text": 0.9, "code": 0.1}, {"text": 0.25, "code": 0.75})
    batch, positions = Mixture(tokens, 0, first).batch({}, 20, LENGTH)
    assert domains_of(tokens, batch).count("code") == 2
    later, after = Mixture(tokens, 0, second).batch(positions, 20, LENGTH)
    assert domains_of(tokens, later).count("code") == 15
    begun = Mixture(tokens, 0, second).batch({}, 20, LENGTH)[0]
    assert not torch.equal(later.ids_BT, begun.ids_BT)
    text, = (name for name in after if name.startswith("text:"))
    assert after[text]["rows"] == [[LENGTH, 18 + 5]]


def test_only_the_documents_asked_for_are_delivered(tokens):
    wanted = np.arange(0, len(tokens.end_D), 5)
    mixture = Mixture(tokens, 0, {"text": 0.5, "math": 0.5}, wanted)
    batch, _ = mixture.batch({}, 40, LENGTH)
    assert set(np.concatenate(batch.documents)) <= set(wanted)
    assert mixture.tokens().keys() == {"text", "math"}
    lengths = tokens.end_D - tokens.start_D
    assert sum(mixture.tokens().values()) == sum(
        lengths[d] for d in wanted if tokens.domains[tokens.domain_D[d]] in ("text", "math"))


def test_the_share_of_an_empty_domain_goes_to_the_others_and_is_said(tokens):
    no_math = np.flatnonzero(tokens.domain_D != tokens.domains.index("math"))
    mixture = Mixture(tokens, 0, {"text": 0.6, "code": 0.2, "math": 0.2}, no_math, "up to grade 6")
    rows = domains_of(tokens, mixture.batch({}, 40, LENGTH)[0])
    assert (rows.count("text"), rows.count("code")) == (30, 10)
    assert mixture.warning == ("no training text up to grade 6 in the domain math; the share goes to the others: "
                               "code 25%, text 75%")
    assert Mixture(tokens, 0, {"text": 1.0, "poetry": 0.5}).shares == {"text": 1.0}
    assert Mixture(tokens, 0, {"text": 1.0, "poetry": 0.0}).warning is None


def test_when_nothing_is_left_the_user_is_told_what_to_do(tokens):
    no_text = np.flatnonzero(tokens.domain_D != tokens.domains.index("text"))
    with pytest.raises(UserError, match=r"no training text up to grade 2 in the domains text \(there is some in: code, "
                                        r"math\); raise the reading level \(max_grade\) or change the mixture"):
        Mixture(tokens, 0, {"text": 1.0, "code": 0.0}, no_text, "up to grade 2")
    with pytest.raises(UserError, match=r"in the domains code, math, text \(there is none in any other either\)"):
        Mixture(tokens, 0, None, np.array([], dtype=int))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_make_the_rows_of_a_step_between_them(tokens, ranks):
    """Each row on one rank, in the order of one process; all go on at the same place, at any number of ranks too."""
    from tryplicity import World

    mixture, shares = Mixture(tokens, 3), Mixture(tokens, 3, {"text": 0.5, "code": 0.3, "math": 0.2})
    for one in (mixture, shares):
        positions = {}
        for length in (LENGTH, LENGTH, 2 * LENGTH):
            whole, after = one.batch(positions, 5, length)
            parts = [one.batch(positions, 5, length, World(rank, ranks).part(5)) for rank in range(ranks)]
            assert torch.equal(torch.cat([part.ids_BT for part, _ in parts]), whole.ids_BT)
            assert torch.equal(torch.cat([part.targets_BT for part, _ in parts]), whole.targets_BT)
            assert torch.equal(torch.cat([part.doc_ids_BT for part, _ in parts]), whole.doc_ids_BT)
            assert sum(part.bytes for part, _ in parts) == whole.bytes
            assert [list(d) for part, _ in parts for d in part.documents] == [list(d) for d in whole.documents]
            assert all(then == after for _, then in parts)
            positions = after
