"""Sizes, dtypes and strides without data are torch's own, for inputs of any sizes, order of dimensions and dtype; and
what oneDNN's recurrence and the grouped product take and give, against the real ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from tests.planner.test_shapes import without_data
from tryplicity.planner.shapes import ShapeMode

SIZES = st.lists(st.sampled_from([1, 2, 3, 5]), min_size=0, max_size=4)
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool]


def told(value):
    """Sizes, dtypes, and the strides of dimensions that can be walked along."""
    return [(tuple(t.shape), t.dtype, [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1 and t.numel()])
            if isinstance(t, torch.Tensor) else t for t in tree_leaves(value)]


def alike(run, *tensors):
    """Runs with data and without; the results must be told alike."""
    shapes = tree_map(without_data, tensors)
    real = told(run(*tensors))
    with ShapeMode():
        found = told(run(*shapes))
    assert found == real


@st.composite
def layouts(draw, sizes, dtype=None, expanded=True):
    """A tensor of these sizes whose dimensions lie in memory in some order, or overlap where it was expanded."""
    order = draw(st.permutations(range(len(sizes))))
    wide = [expanded and draw(st.booleans()) and draw(st.booleans()) for _ in sizes]
    base = torch.ones([1 if wide[d] else sizes[d] for d in order], dtype=dtype or draw(st.sampled_from(DTYPES)))
    back = [order.index(d) for d in range(len(sizes))]
    return base.permute(back).expand(sizes) if sizes else base


@st.composite
def together(draw):
    """Two tensors that broadcast: the second of fewer dimensions, or of size 1 in some. Of one dtype, or none of them
    expanded: what is expanded and must be cast torch copies first, which is not told here."""
    sizes, dtype = draw(SIZES), draw(st.sampled_from([None, *DTYPES]))
    fewer = sizes[draw(st.integers(0, len(sizes))):]
    fewer = [1 if draw(st.booleans()) else n for n in fewer]
    pair = [draw(layouts(own, dtype, expanded=dtype is not None)) for own in (sizes, fewer)]
    return pair[::-1] if draw(st.booleans()) else pair


@given(pair=together())
@settings(max_examples=150, deadline=None)
def test_what_two_tensors_give_lies_in_memory_as_torch_lays_it(pair):
    alike(lambda a, b: (a + b, torch.where(a > b, a, b), a * 2, a == b), *pair)


@given(data=st.data(), sizes=SIZES)
@settings(max_examples=80, deadline=None)
def test_copies_of_one_tensor_lie_as_torch_lays_them(data, sizes):
    alike(lambda x: (x.clone(), torch.empty_like(x), x.to(torch.float16), x.contiguous(), torch.zeros_like(x),
                     x.clone(memory_format=torch.contiguous_format), torch.full_like(x, 1), x.abs() if
                     x.dtype != torch.bool else ~x, x.sort(-1) if x.dim() else x), data.draw(layouts(sizes)))


@given(data=st.data(), sizes=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=3), keep=st.booleans())
@settings(max_examples=80, deadline=None)
def test_sums_and_searches_over_any_dimension(data, sizes, keep):
    dim = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    several = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True, max_size=3))
    k = data.draw(st.integers(1, sizes[dim]))

    def run(x):
        floats = x if x.is_floating_point() else x.float()
        return (x.sum(dim, keepdim=keep), x.sum(several, keepdim=keep), x.sum(), floats.mean(dim, keepdim=keep),
                floats.mean(several), x.sum(dim, dtype=torch.float64), x.argmax(dim, keepdim=keep) if
                x.dtype != torch.bool else x, floats.amax(dim, keepdim=keep), floats.logsumexp(dim, keepdim=keep),
                floats.topk(k, dim), torch.linalg.vector_norm(floats, dim=dim, keepdim=keep),
                torch.linalg.vector_norm(floats.float(), dtype=torch.float64), x.cumsum(dim),
                x.cumsum(dim, dtype=torch.float32), floats.softmax(dim), floats.log_softmax(dim),
                torch.cat([x, x, x], dim), torch.stack([x, x], dim), x.repeat(2, *[3] * len(sizes)))

    alike(run, data.draw(layouts(sizes)).contiguous())


@pytest.mark.parametrize("bounds", [(0,), (5,), (7.0,), (3, 8), (2, 9, 3), (9, 2, -2), (0, 1, 0.25), (1.5, 4),
                                    (-3, 3), (1, 1)])
def test_arange(bounds):
    alike(lambda: (torch.arange(*bounds), torch.arange(*bounds, dtype=torch.float32)))


def test_a_softmax_and_a_search_in_another_dtype():
    x, row = torch.randn(3, 4).bfloat16(), torch.arange(5.0)
    alike(lambda x: (x.softmax(-1, dtype=torch.float32), x.log_softmax(0, dtype=torch.float32), x.softmax(-1)), x)
    alike(lambda row, x: (torch.searchsorted(row, x), torch.searchsorted(row, x, out_int32=True),
                          torch.searchsorted(row, x, right=True)), row, torch.rand(2, 3))


@pytest.mark.parametrize("pad", [(1, 0), (-1, 0), (0, 0), (0, -2, 3, 0), (0, 0, -1, 0), (-1, -1, 0, -1)])
def test_padding_and_cutting(pad):
    x = torch.randn(2, 3, 4, 5)
    alike(lambda x: (F.pad(x, pad), F.pad(x.transpose(1, 3), pad), F.pad(x[:, 1:, ::2], pad)), x)


def test_which_bucket_and_the_other_way_round():
    row, x = torch.arange(5.0), torch.rand(2, 3)
    alike(lambda row, x: (torch.bucketize(x, row), torch.bucketize(x, row, out_int32=True, right=True),
                          x.flip(0), x.T.flip(0, 1), x[:, ::2].flip(1)), row, x)


def test_attention_of_four_different_sizes():
    B, T, H, K = 2, 5, 3, 8

    def run(*qkv):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv), is_causal=True)
        return out, torch.autograd.grad(out, qkv, torch.ones_like(out))

    real = [torch.randn(B, T, H, K) for _ in range(3)]
    shapes = [without_data(t).requires_grad_() for t in real]
    found = told(run(*(t.requires_grad_() for t in real)))
    with ShapeMode():
        assert told(run(*shapes)) == found


GROUPS = [((6, 16), (3, 16, 8)), ((16, 24), (24, 8)), ((3, 4, 16), (3, 16, 8))]


@pytest.mark.parametrize("a, b", GROUPS)
def test_a_grouped_product(a, b):
    """Rows by matrices, the gradient of those matrices, and stacks."""
    pair = [torch.ones(size, dtype=torch.bfloat16) for size in (a, b)]
    offsets = torch.tensor([8, 16, 24] if len(b) == 2 else [2, 4, 6], dtype=torch.int32)
    if len(a) == 3:
        alike(torch._grouped_mm, *pair)
    else:
        alike(lambda a, b, offs: torch._grouped_mm(a, b, offs=offs), *pair, offsets)


def test_rows_chosen_by_numbers():
    x, i = torch.randn(4, 5, 6), torch.tensor([[0, 2, 1]])
    alike(lambda x, i: (x[i], x[:, i], x[..., i], x[i, i], x[:, i, i], x.index_select(1, i[0]), x.index_select(2, i[0]),
                        x.gather(1, i[..., None].expand(4, 3, 6).contiguous()), x[i, :, i]), x, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, B, I, H", [(16, 4, 24, 32), (33, 2, 64, 64), (8, 8, 200, 128), (64, 1, 512, 256),
                                        (20, 3, 100, 60), (5, 16, 32, 512)])
def test_the_workspace_of_a_recurrence_is_what_the_real_one_takes(T, B, I, H, dtype):
    """Gates, states and gradients of every step, which torch keeps for the backward pass and tells nobody."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype = torch.float32
    weights = [torch.randn(4 * H, n, dtype=dtype) for n in (I, H)] + [torch.zeros(4 * H, dtype=dtype)] * 2
    x, state = torch.randn(T, B, I, dtype=dtype), [torch.zeros(B, H, dtype=dtype)] * 2

    def run(x, h, c, *weights):
        return torch.ops.aten.mkldnn_rnn_layer(x, *weights, h, c, False, [], 2, H, 1, True, False, False, True)

    *real, workspace = run(x, *state, *weights)
    shapes = tree_map(without_data, (x, *state, *weights))
    with ShapeMode():
        *found, ours = run(*shapes)
    assert told(found) == told(real)
    assert ours.numel() * ours.element_size() == pytest.approx(workspace.numel() * workspace.element_size(), rel=0.03)


def test_no_memory_for_nothing():
    assert math.prod(torch.Size([])) == 1
    alike(lambda x: (x + 1, x.sum(0), x.clone(), torch.cat([x, x]), torch.arange(0)), torch.ones(0, 3))
