"""Ternary products against products of whole numbers, and the C++ against its PyTorch twin, to the last bit."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from tryplicity import kernels
from tryplicity.kernels import TernaryMatrix, plain
from tryplicity_plugins.layers.bitlinear import int8_input

SHAPES = [(1, 1), (5, 7), (64, 128), (130, 257), (96, 2049), (31, 4500)]  # out, in


@pytest.fixture
def two_threads():
    """What the tests of threads set and leave as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_digits(*shape, seed=0):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def tokens(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def truth(x_ND, digits_OD, scale):
    """The product in 64-bit integers of what the tokens are quantised to."""
    q_ND, step_N, _ = plain.quantise(x_ND, x_ND.shape[1])
    return (q_ND.long() @ digits_OD.long().T).float() * (step_N * torch.tensor(scale))[:, None]


def test_the_compiled_library_is_what_is_tested():
    """Without a compiler these tests would compare the twin with itself."""
    assert kernels.why_not() is None, kernels.why_not()


@pytest.mark.parametrize("out, columns", SHAPES)
def test_exactly_the_integer_product_for_any_number_of_tokens(out, columns):
    digits_OD, x_ND = random_digits(out, columns), tokens(40, columns)
    matrix = TernaryMatrix.from_digits(digits_OD, 0.3)
    expected_NO = truth(x_ND, digits_OD, 0.3)
    for count in (*range(1, 18), 40):
        assert torch.equal(kernels.packed_linear(x_ND[:count], matrix), expected_NO[:count]), count


@pytest.mark.parametrize("columns", [2048, 2176, 8192])
@pytest.mark.parametrize("digit", [-1, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_the_largest_sums_do_not_overflow(columns, digit, count):
    x_ND = torch.ones(count, columns)
    x_ND[1::2] = -1
    matrix = TernaryMatrix.from_digits(torch.full((6, columns), digit), 1.0)
    q_ND, step_N, sum_N = kernels.quantise(x_ND)
    assert q_ND[:, :columns].abs().min() == 127 and sum_N[0] == 127 * columns
    sums_NO = kernels.packed_linear(x_ND, matrix) / step_N[:, None]
    assert torch.equal(sums_NO.round().long(), (x_ND[:, :1] * 127 * columns * digit).long().expand(-1, 6))


def test_a_token_has_the_same_bits_in_any_company_with_any_threads(two_threads):
    digits_OD, x_ND = random_digits(515, 1100), tokens(33, 1100)  # large enough for the threads to wake
    matrix, bias_O = TernaryMatrix.from_digits(digits_OD, 0.02), tokens(515, seed=2)
    torch.set_num_threads(1)
    one_by_one = torch.cat([kernels.packed_linear(x_ND[i : i + 1], matrix, bias_O) for i in range(33)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(kernels.packed_linear(x_ND, matrix, bias_O), one_by_one)
        assert torch.equal(kernels.packed_linear(x_ND[:10], matrix, bias_O), one_by_one[:10])
        assert torch.equal(kernels.packed_linear(x_ND[7:8], matrix, bias_O), one_by_one[7:8])


def test_equals_bitlinear_in_floats():
    """What the layer computes while it trains: F.linear(int8_input(x), digits * scale)."""
    digits_OD, x_BTD, bias_O = random_digits(70, 300), tokens(2, 5, 300) * 3, tokens(70, seed=3)
    found = kernels.packed_linear(x_BTD, TernaryMatrix.from_digits(digits_OD, torch.tensor([[0.02]])), bias_O)
    torch.testing.assert_close(found, F.linear(int8_input(x_BTD)[0], digits_OD * 0.02, bias_O))


@pytest.mark.parametrize("columns", [1, 31, 128, 300, 2048])
def test_quantised_as_bitlinear_does(columns):
    x_ND = tokens(20, columns) * torch.logspace(-6, 6, 20)[:, None]
    x_ND[3] = 0
    q_ND, step_N, sum_N = kernels.quantise(x_ND)
    assert q_ND.shape[1] % 128 == 0 and not q_ND[:, columns:].any()
    assert torch.equal(sum_N.long(), q_ND.long().sum(-1))
    torch.testing.assert_close(q_ND[:, :columns] * step_N[:, None], int8_input(x_ND)[0])
    for found, twin in zip((q_ND, step_N, sum_N), plain.quantise(x_ND, q_ND.shape[1]), strict=True):
        assert torch.equal(found, twin)


def test_zeros_stay_zeros():
    matrix = TernaryMatrix.from_digits(random_digits(9, 200), 0.5)
    assert torch.equal(kernels.packed_linear(torch.zeros(3, 200), matrix), torch.zeros(3, 9))


def test_what_is_no_number_spoils_its_own_token_only():
    x_ND = tokens(6, 200)
    x_ND[2, 7], x_ND[4, 0] = float("nan"), float("inf")
    matrix = TernaryMatrix.from_digits(random_digits(9, 200), 0.5)
    y_NO = kernels.packed_linear(x_ND, matrix)
    assert y_NO[[2, 4]].isnan().all()
    assert torch.equal(y_NO[[0, 1, 3, 5]], kernels.packed_linear(x_ND[[0, 1, 3, 5]], matrix))


def test_no_tokens_give_no_results():
    matrix = TernaryMatrix.from_digits(random_digits(9, 200), 0.5)
    assert kernels.packed_linear(torch.zeros(2, 0, 200), matrix).shape == (2, 0, 9)
    stack = TernaryMatrix.from_digits(random_digits(3, 9, 200), torch.ones(3))
    none = torch.zeros(0, dtype=torch.long)
    assert kernels.packed_experts(torch.zeros(2, 200), stack, none, none).shape == (0, 9)
    assert torch.equal(kernels.packed_experts(torch.ones(2, 200), stack, none, none, torch.zeros(0)),
                       torch.zeros(2, 9))
    assert kernels.rows_linear(torch.zeros(0, 8), torch.ones(5, 8)).shape == (0, 5)


def test_strided_and_half_precision_tokens():
    matrix, x_ND = TernaryMatrix.from_digits(random_digits(9, 40), 0.5), tokens(6, 80)
    assert torch.equal(kernels.packed_linear(x_ND[:, ::2], matrix),
                       kernels.packed_linear(x_ND[:, ::2].contiguous(), matrix))
    half = kernels.packed_linear(x_ND[:, :40].bfloat16(), matrix)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, kernels.packed_linear(x_ND[:, :40].bfloat16().float(), matrix).bfloat16())


def test_tokens_of_another_size_are_refused():
    matrix = TernaryMatrix.from_digits(random_digits(9, 40), 0.5)
    with pytest.raises(ValueError, match="41 features for a matrix of 40"):
        kernels.packed_linear(tokens(1, 41), matrix)


@pytest.mark.parametrize("out, columns", SHAPES)
def test_the_twin_has_the_same_bits(out, columns):
    matrix, x_ND = TernaryMatrix.from_digits(random_digits(out, columns), 0.3), tokens(6, columns)
    bias_O = tokens(out, seed=5)
    assert torch.equal(kernels.packed_linear(x_ND, matrix, bias_O),
                       plain.linear(x_ND, matrix.planes, matrix.scale_E, out, bias_O))


# ---- experts ----


@pytest.fixture(params=[(40, 70), (300, 1100)], ids=["small", "threads"])
def stack(request):
    """(matrix, digits) of six experts; the larger ones wake the threads."""
    digits_EOD = random_digits(6, *request.param)
    return TernaryMatrix.from_digits(digits_EOD, torch.rand(6, 1, 1) + 0.5), digits_EOD


def pairs(count, tokens_count, seed=4):
    """Some experts chosen often, expert 5 never."""
    generator = torch.Generator().manual_seed(seed)
    expert_S = (torch.rand(count, generator=generator).square() * 5).long()
    return torch.randint(0, tokens_count, (count,), generator=generator), expert_S


@pytest.mark.parametrize("count", [1, 2, 8, 75])
def test_each_pair_is_its_token_by_its_expert(stack, count, two_threads):
    matrix, digits_EOD = stack
    x_ND = tokens(9, matrix.in_features)
    row_S, expert_S = pairs(count, 9)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y_SO = kernels.packed_experts(x_ND, matrix, row_S, expert_S)
        for s in range(count):
            n, e = int(row_S[s]), int(expert_S[s])
            assert torch.equal(y_SO[s], truth(x_ND[n : n + 1], digits_EOD[e], float(matrix.scale_E[e]))[0])


def test_sorted_or_not_is_the_same(stack):
    matrix, _ = stack
    x_ND = tokens(9, matrix.in_features)
    row_S, expert_S = pairs(40, 9)
    order = expert_S.argsort(stable=True)
    assert torch.equal(kernels.packed_experts(x_ND, matrix, row_S, expert_S)[order],
                       kernels.packed_experts(x_ND, matrix, row_S[order], expert_S[order]))
    assert torch.equal(kernels.packed_experts(x_ND[row_S], matrix, None, expert_S),
                       kernels.packed_experts(x_ND, matrix, row_S, expert_S))


def test_weighted_sums_in_the_order_of_pairs(stack, two_threads):
    matrix, _ = stack
    x_ND, weight_S = tokens(9, matrix.in_features), tokens(75, seed=6)
    row_S, expert_S = pairs(75, 9)
    y_SO = kernels.packed_experts(x_ND, matrix, row_S, expert_S)
    expected_NO, start_NO = tokens(9, matrix.out_features, seed=7), tokens(9, matrix.out_features, seed=7)
    for s in range(75):
        expected_NO[row_S[s]] += weight_S[s] * y_SO[s]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = start_NO.clone()
        assert kernels.packed_experts(x_ND, matrix, row_S, expert_S, weight_S, out) is out
        assert torch.equal(out, expected_NO)
    fresh = kernels.packed_experts(x_ND, matrix, row_S, expert_S, weight_S)
    torch.testing.assert_close(fresh, expected_NO - start_NO, rtol=1e-5, atol=1e-4)


def test_sums_may_go_to_other_rows(stack):
    """A down projection: the rows are pairs already, the sums are tokens."""
    matrix, _ = stack
    x_SD, weight_S = tokens(8, matrix.in_features), tokens(8, seed=6)
    _, expert_S = pairs(8, 8)
    into_S = torch.tensor([0, 0, 2, 1, 0, 2, 2, 1])
    found = kernels.packed_experts(x_SD, matrix, None, expert_S, weight_S, torch.zeros(3, matrix.out_features), into_S)
    y_SO = kernels.packed_experts(x_SD, matrix, None, expert_S)
    expected = torch.zeros(3, matrix.out_features)
    for s in range(8):
        expected[into_S[s]] += weight_S[s] * y_SO[s]
    assert torch.equal(found, expected)


def test_the_twin_of_experts_has_the_same_bits(stack):
    matrix, _ = stack
    x_ND, weight_S = tokens(9, matrix.in_features), tokens(40, seed=6)
    row_S, expert_S = pairs(40, 9)
    compiled = kernels.packed_experts(x_ND, matrix, row_S, expert_S, weight_S)
    matrix._library = None
    assert torch.equal(kernels.packed_experts(x_ND, matrix, row_S, expert_S, weight_S), compiled)


@pytest.mark.parametrize("row, expert, into", [(9, 0, 0), (-1, 0, 0), (0, 6, 0), (0, -1, 0), (0, 0, 4)])
def test_pairs_that_do_not_exist_are_refused(row, expert, into):
    matrix = TernaryMatrix.from_digits(random_digits(6, 8, 16), torch.ones(6))
    with pytest.raises(IndexError, match="9 tokens, 6 experts"):
        kernels.packed_experts(tokens(9, 16), matrix, torch.tensor([row]), torch.tensor([expert]),
                                torch.ones(1), torch.zeros(4, 8), torch.tensor([into]))


# ---- the matrix itself ----


def test_a_matrix_is_copied_and_pickled():
    matrix, x_ND = TernaryMatrix.from_digits(random_digits(3, 9, 40), torch.rand(3)), tokens(3, 40)
    args = (torch.arange(3), torch.arange(3))
    expected = kernels.packed_experts(x_ND, matrix, *args)
    for twin in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix)), matrix.to("cpu")):
        assert (twin.experts, twin.out_features, twin.in_features) == (3, 9, 40)
        assert torch.equal(kernels.packed_experts(x_ND, twin, *args), expected)
    assert matrix.nbytes == 3 * 3 * 1 * 128 + 3 * 4 and matrix.padded == 128


# ---- a table of rows ----


@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 15), (130, 77), (2000, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_of_a_table(rows, columns, dtype, two_threads):
    table_VD = (tokens(rows, columns) * 30).to(dtype)
    scale_V, x_ND = torch.rand(rows) + 0.1, tokens(11, columns, seed=8)
    expected = (x_ND.double() @ table_VD.double().T * scale_V.double())
    one_by_one = torch.cat([kernels.rows_linear(x_ND[i : i + 1], table_VD, scale_V) for i in range(11)])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = kernels.rows_linear(x_ND, table_VD, scale_V)
        assert torch.equal(found, one_by_one)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(plain.rows_linear(x_ND, table_VD, scale_V).double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(kernels.rows_linear(x_ND.view(1, 11, columns), table_VD) * scale_V, one_by_one[None])
