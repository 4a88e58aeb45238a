"""Products with rows of int8, bf16 and fp32: the weights that they stand for, and the same bits in any company."""

import copy
import pickle

import pytest
import torch

from tryplicity import kernels
from tryplicity.kernels import RowsMatrix

SHAPES = [(1, 1), (5, 7), (64, 128), (131, 333), (30, 4500), (700, 640)]  # out, in; the last wakes the threads
KINDS = ["int8", "bf16", "fp32"]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(kind, *shape):
    """(matrix, the weights that it stands for in fp64): rounded here by hand."""
    weight = drawn(*shape) * torch.logspace(-2, 2, shape[-2])[:, None]
    if kind == "int8":
        step = weight.abs().amax(-1, keepdim=True) / 127
        rows = torch.clamp((weight / step).round(), -127, 127)
        return RowsMatrix.from_rows(*kernels.int8_rows(weight)), rows.double() * step.double()
    rounded = weight.bfloat16() if kind == "bf16" else weight
    return RowsMatrix.from_rows(rounded), rounded.double()


def assert_products(found, x, weight):
    """To 1e-5 of what the terms of each sum amount to."""
    wanted, size = x.double() @ weight.mT, x.double().abs() @ weight.abs().mT
    assert (found.double() - wanted).abs().div(size + 1e-30).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out, columns", SHAPES)
def test_the_product_with_the_rounded_weights_for_any_number_of_tokens(kind, out, columns, two_threads):
    matrix, weight = made(kind, out, columns)
    x_ND, bias_O = drawn(40, columns, seed=1), drawn(out, seed=2)
    torch.set_num_threads(1)
    alone = torch.cat([kernels.packed_linear(x_ND[n : n + 1], matrix) for n in range(40)])
    assert_products(alone, x_ND, weight)
    torch.testing.assert_close(matrix.weight().double(), weight, rtol=1e-6, atol=0)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (*range(1, 20), 40):
            assert torch.equal(kernels.packed_linear(x_ND[:count], matrix), alone[:count]), (threads, count)
        assert torch.equal(kernels.packed_linear(x_ND[7:21], matrix, bias_O), alone[7:21] + bias_O)


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_is_near(kind):
    matrix, _ = made(kind, 70, 300)
    x_ND = drawn(9, 300, seed=1)
    compiled = kernels.packed_linear(x_ND, matrix, drawn(70, seed=2))
    matrix._library = None
    torch.testing.assert_close(kernels.packed_linear(x_ND, matrix, drawn(70, seed=2)), compiled, rtol=1e-4, atol=1e-3)


def test_the_largest_and_the_smallest_rows_in_int8():
    """Each row has a step of its own; one of zeros stays zeros."""
    weight = drawn(4, 50) * torch.tensor([1e6, 1.0, 1e-6, 0.0])[:, None]
    rows, scale = kernels.int8_rows(weight)
    assert rows.dtype == torch.int8 and rows[:3].abs().amax(-1).tolist() == [127] * 3 and not rows[3].any()
    error = (rows * scale[:, None] - weight).abs().amax(-1)
    assert (error <= weight.abs().amax(-1) / 254 * 1.0001).all()
    assert not kernels.packed_linear(drawn(3, 50), RowsMatrix.from_rows(rows, scale))[:, 3].any()


def test_what_is_no_number_spoils_its_own_token_only():
    matrix, _ = made("int8", 9, 200)
    x_ND = drawn(16, 200)
    x_ND[2, 7], x_ND[4, 0] = float("nan"), float("inf")
    y_NO = kernels.packed_linear(x_ND, matrix)
    assert not y_NO[[2, 4]].isfinite().any()
    others = [n for n in range(16) if n not in (2, 4)]
    assert torch.equal(y_NO[others], kernels.packed_linear(x_ND[others], matrix))


# ---- experts ----


def pairs(count, seed=4):
    """Some experts chosen often, expert 5 never."""
    generator = torch.Generator().manual_seed(seed)
    expert_S = (torch.rand(count, generator=generator).square() * 5).long()
    return torch.randint(0, 9, (count,), generator=generator), expert_S


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out, columns", [(40, 70), (300, 500)])
@pytest.mark.parametrize("count", [1, 2, 8, 120])
def test_each_pair_is_its_token_by_its_expert(kind, out, columns, count, two_threads):
    matrix, weight = made(kind, 6, out, columns)
    x_ND, (row_S, expert_S) = drawn(9, columns, seed=1), pairs(count)
    single = [RowsMatrix.from_rows(matrix.data[e], None if matrix.scale is None else matrix.scale[e]) for e in range(6)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y_SO = kernels.packed_experts(x_ND, matrix, row_S, expert_S)
        assert torch.equal(kernels.packed_experts(x_ND[row_S], matrix, None, expert_S), y_SO)
        for s in range(count):
            n, e = int(row_S[s]), int(expert_S[s])
            assert torch.equal(y_SO[s], kernels.packed_linear(x_ND[n : n + 1], single[e])[0])
            assert_products(y_SO[s : s + 1], x_ND[n : n + 1], weight[e])


def test_weighted_sums_and_their_twin():
    matrix, _ = made("int8", 6, 40, 70)
    x_ND, weight_S, (row_S, expert_S) = drawn(9, 70, seed=1), drawn(50, seed=2), pairs(50)
    y_SO = kernels.packed_experts(x_ND, matrix, row_S, expert_S)
    expected_NO = torch.zeros(9, 40)
    for s in range(50):
        expected_NO[row_S[s]] += weight_S[s] * y_SO[s]
    assert torch.equal(kernels.packed_experts(x_ND, matrix, row_S, expert_S, weight_S), expected_NO)
    matrix._library = None
    twin = kernels.packed_experts(x_ND, matrix, row_S, expert_S, weight_S)
    torch.testing.assert_close(twin, expected_NO, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(kernels.packed_experts(x_ND[row_S], matrix, None, expert_S), y_SO, rtol=1e-4, atol=1e-3)


def test_pairs_that_do_not_exist_are_refused():
    matrix, _ = made("bf16", 6, 8, 16)
    for row, expert in ((9, 0), (-1, 0), (0, 6), (0, -1)):
        with pytest.raises(IndexError, match="9 tokens, 6 experts"):
            kernels.packed_experts(drawn(9, 16), matrix, torch.tensor([row]), torch.tensor([expert]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_copied_and_pickled(kind):
    matrix, _ = made(kind, 3, 9, 40)
    x_ND, args = drawn(3, 40), (torch.arange(3), torch.arange(3))
    expected = kernels.packed_experts(x_ND, matrix, *args)
    for twin in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix)), matrix.to("cpu")):
        assert (twin.experts, twin.out_features, twin.in_features) == (3, 9, 40)
        assert torch.equal(kernels.packed_experts(x_ND, twin, *args), expected)
    assert matrix.nbytes == {"int8": 3 * 9 * (40 + 4), "bf16": 3 * 9 * 80, "fp32": 3 * 9 * 160}[kind]
