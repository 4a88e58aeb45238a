"""Triton's ternary products against the C++, to the last bit: on a card, or in Triton's interpreter."""

import pytest
import torch

from tests.interpreted import DEVICE
from tryplicity import kernels
from tryplicity.kernels import TernaryMatrix, cards, plain, triton_ternary

SHAPES = [(1, 1), (5, 7), (64, 128), (37, 300), (18, 1025)]  # out, in


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_digits(*shape, seed=0):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def linear(x_ND, matrix, bias=None):
    asked = on_device(x_ND, matrix.planes, matrix.scale_E, bias)
    return triton_ternary.linear(*asked[:3], matrix.out_features, asked[3]).cpu()


def experts(x_ND, matrix, row_S, expert_S):
    asked = on_device(x_ND, matrix.planes, matrix.scale_E, row_S, expert_S)
    return triton_ternary.experts(*asked[:3], matrix.out_features, *asked[3:]).cpu()


def test_the_compiled_library_is_what_it_is_compared_with():
    assert kernels.why_not() is None, kernels.why_not()


@pytest.mark.parametrize("out, columns", SHAPES)
def test_any_number_of_tokens_has_the_bits_of_the_cpu(out, columns):
    matrix, bias, x_ND = TernaryMatrix.from_digits(random_digits(out, columns), 0.3), drawn(out), drawn(17, columns)
    for count, given in ((1, None), (1, bias), (2, bias), (16, None), (17, bias)):
        right = kernels.packed_linear(x_ND[:count], matrix, given)
        assert torch.equal(linear(x_ND[:count], matrix, given), right), count


@pytest.mark.parametrize("columns", [1, 31, 128, 2000])
def test_tokens_are_quantised_to_the_same_bits(columns):
    x_ND = drawn(6, columns) * torch.tensor([1e-30, 1e-6, 1e-3, 1.0, 50.0, 1e18])[:, None]
    x_ND[3] = (torch.arange(columns) % 255 - 127.0) / 2  # halfway between two steps, now and then
    x_ND[0, 0], x_ND[1] = 0.0, 0.0
    padded = -(-columns // plain.COLUMNS) * plain.COLUMNS
    found = triton_ternary.ternary_quantise(x_ND.to(DEVICE), padded)
    for got, right in zip(found, kernels.quantise(x_ND), strict=True):
        assert torch.equal(got.cpu(), right)


def test_a_token_that_is_no_number_spoils_no_other():
    matrix, x_ND = TernaryMatrix.from_digits(random_digits(5, 40), 0.3), drawn(3, 40)
    x_ND[1, 7] = torch.nan
    got = linear(x_ND, matrix)
    assert got[1].isnan().all() and torch.equal(got[::2], kernels.packed_linear(x_ND, matrix)[::2])


@pytest.mark.parametrize("digit", [-1, 1])
def test_the_largest_sums_do_not_overflow(digit):
    matrix, x_ND = TernaryMatrix.from_digits(torch.full((6, 8192), digit), 1.0), torch.ones(2, 8192)
    x_ND[1] = -1
    for count in (1, 2):
        assert torch.equal(linear(x_ND[:count], matrix), kernels.packed_linear(x_ND[:count], matrix))


@pytest.mark.parametrize("tokens, pairs", [(1, 4), (5, 11)])
def test_chosen_experts_have_the_bits_of_the_cpu(tokens, pairs):
    matrix = TernaryMatrix.from_digits(random_digits(4, 21, 150), torch.tensor([0.1, 2.0, 0.3, 0.7]))
    x_ND = drawn(tokens, 150)
    ids = torch.Generator().manual_seed(2)
    row_S, expert_S = (torch.randint(0, most, (pairs,), generator=ids) for most in (tokens, 4))
    got = experts(x_ND, matrix, row_S, expert_S)
    assert torch.equal(got, kernels.packed_experts(x_ND, matrix, row_S, expert_S))
    assert torch.equal(got, experts(x_ND, matrix, row_S.int(), expert_S.int()))
    own = experts(x_ND, matrix, None, expert_S[:tokens])
    assert torch.equal(own, kernels.packed_experts(x_ND, matrix, None, expert_S[:tokens]))

    weight_S, out_NO = drawn(pairs), drawn(tokens, 21, seed=3)
    sums = out_NO.to(DEVICE, copy=True)
    triton_ternary.add_weighted_rows(sums, *on_device(got, weight_S, row_S))
    assert torch.equal(sums.cpu(), kernels.packed_experts(x_ND, matrix, row_S, expert_S, weight_S, out_NO))


def test_a_pair_that_is_not_there_makes_zeros():
    """So that a graph of fixed shape can hold fewer pairs than it has room for."""
    matrix, x_ND = TernaryMatrix.from_digits(random_digits(3, 21, 150), torch.ones(3)), drawn(2, 150)
    got = experts(x_ND, matrix, torch.tensor([0, 0, 0, 2, -1]), torch.tensor([1, 3, -1, 1, 1]))
    assert torch.equal(got[:1], kernels.packed_experts(x_ND, matrix, torch.tensor([0]), torch.tensor([1])))
    assert torch.equal(got[1:], torch.zeros(4, 21))


def test_operators_keep_torchs_rules():
    matrix, x_ND = TernaryMatrix.from_digits(random_digits(3, 9, 130), torch.ones(3)), drawn(2, 130)
    x_ND, planes, scale_E, bias, rows, ids = on_device(x_ND, matrix.planes, matrix.scale_E, drawn(9),
                                                       torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]))
    torch.library.opcheck(triton_ternary.ternary_quantise, (x_ND, matrix.padded))
    quantised = triton_ternary.ternary_quantise(x_ND, matrix.padded)
    torch.library.opcheck(triton_ternary.ternary_rows, (*quantised, planes[:1], scale_E[:1], 9, bias, None, None))
    torch.library.opcheck(triton_ternary.ternary_rows, (*quantised, planes, scale_E, 9, None, rows, ids))
    y_SO = triton_ternary.ternary_rows(*quantised, planes, scale_E, 9, None, rows, ids)
    torch.library.opcheck(triton_ternary.add_weighted_rows, (bias.new_zeros(2, 9), y_SO, scale_E, rows))


# --- who chooses ---


def test_the_self_test_passes_and_notices(monkeypatch):
    device = torch.device(DEVICE)
    assert kernels.tried(cards._compared, device) is None
    for name, said in (("linear", "a product of 1 tokens is wrong"), ("experts", "chosen experts are wrong")):
        right = getattr(triton_ternary, name)
        with monkeypatch.context() as patch:
            patch.setattr(triton_ternary, name, lambda *asked, right=right: right(*asked) * (1 + 2**-23))
            assert said in kernels.tried(cards._compared, device)
    monkeypatch.setattr(triton_ternary, "add_weighted_rows", lambda *asked: None)
    assert "weighted sums are wrong" in kernels.tried(cards._compared, device)


def test_a_cpu_and_many_tokens_are_left_to_others():
    assert cards.products(torch.zeros(1, 4), 1, cards.FEW_TOKENS) is None
    if DEVICE == "cuda":
        x = torch.zeros(1, 4, device=DEVICE)
        assert cards.products(x, 16, cards.FEW_TOKENS) is triton_ternary
        assert cards.products(x, 17, cards.FEW_TOKENS) is None and cards.products(x, 0, cards.FEW_TOKENS) is None


def test_what_it_does_where_it_is_chosen(monkeypatch):
    """The core's own entrances, with the choice that a card would make."""
    matrix, x_ND, bias = TernaryMatrix.from_digits(random_digits(4, 21, 150), torch.ones(4)), drawn(3, 150), drawn(21)
    single = TernaryMatrix.from_digits(random_digits(21, 150, seed=5), 0.4)
    row_S, expert_S, weight_S = torch.tensor([0, 2, 2]), torch.tensor([3, 1, 0]), drawn(3, seed=4)
    asked = [lambda one, many, own: kernels.packed_linear(own(x_ND), one, own(bias)),
             lambda one, many, own: kernels.packed_linear(own(x_ND)[None, :1].bfloat16(), one),
             lambda one, many, own: kernels.packed_experts(own(x_ND), many, own(row_S), own(expert_S)),
             lambda one, many, own: kernels.packed_experts(own(x_ND), many, None, own(expert_S)),
             lambda one, many, own: kernels.packed_experts(own(x_ND), many, own(row_S), own(expert_S), own(weight_S)),
             lambda one, many, own: kernels.packed_experts(
                 own(x_ND), many, None, own(expert_S), own(weight_S), own(bias.repeat(3, 1)), own(row_S))]
    right = [ask(single, matrix, torch.clone) for ask in asked]
    single, matrix = single.to(DEVICE), matrix.to(DEVICE)
    if DEVICE == "cpu":
        single._library = matrix._library = None
        monkeypatch.setattr(cards, "products", lambda *asked: triton_ternary)
    monkeypatch.setattr(plain, "product", None)  # PyTorch has no part in it
    for ask, expected in zip(asked, right, strict=True):
        got = ask(single, matrix, lambda t: t.to(DEVICE, copy=True))
        assert got.dtype == expected.dtype and torch.equal(got.cpu(), expected)
