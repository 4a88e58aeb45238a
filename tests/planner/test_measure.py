"""What a stage costs: FLOPs by hand, memory against torch's own tensors without data."""

import copy
import weakref
from dataclasses import astuple

import pytest
import torch
from planning_tools import CPU, DENSE, EVERYTHING, GPUS, HYBRID, like, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tryplicity import UserError
from tryplicity.functional import grouped_product_works
from tryplicity.planner import measure as m
from tryplicity.planner import stages
from tryplicity.planner.shapes import Shape, ShapeMode, shape_like


def stage_costs(registry, text, hardware, *settings, weights="fp32", gradients_exist=True):
    return stages.measure_stages(make_model(registry, text, *settings), hardware, weights, gradients_exist)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_a_dense_model_by_hand(registry, checkpointing):
    B, T, D, V, F, H, G, K = 4, 128, 64, 512, 160, 4, 2, 16
    linears = 2 * B * T * (D * (H + 2 * G) * K + H * K * D + 3 * D * F)
    attention = 2 * 2 * B * H * T * T * K  # scores and values; no half is left out under a mask of documents
    start, *blocks, end = stage_costs(registry, DENSE, like(CPU, activation_checkpointing=checkpointing))
    assert (start.flops_forward, start.flops_backward) == (0, 0)
    forward = linears + attention
    norms = 2 * 2 * B * T * D  # the gradients of two norms' weights are products too
    backward = 2 * linears + norms + attention * 5 // 2  # the attention kernel computes the scores again
    for block in blocks:
        assert (block.flops_forward, block.flops_backward) == (forward, backward + checkpointing * forward)
    # chunked cross-entropy makes logits and both gradients in its forward pass; one norm is left for the backward
    assert (end.flops_forward, end.flops_backward) == (3 * 2 * B * T * D * V, norms // 2)


def test_flops_of_experts_are_those_of_the_mean_choice_not_of_the_padding(registry):
    def experts(*router):
        block = "blocks.memory.feed_forward.router="
        costs = stage_costs(registry, HYBRID, CPU, *([block + router[0]] if router else []), "layers=[memory]")
        return costs[1].flops_forward

    top_2 = experts()
    routed = 2 * 4 * 256 * 2 * 3 * 128 * 128  # rows of two chosen experts, three matrices
    variable = experts("{type: dynamic_sparsity, min_experts: 1, max_experts: 4, mean_experts: 2}")
    assert routed < top_2
    assert variable == pytest.approx(top_2, rel=0.02)


def test_a_depthwise_convolution_is_counted_by_its_groups():
    x = torch.empty(2, 8, 32, device="meta", requires_grad=True)
    w = torch.empty(8, 1, 4, device="meta", requires_grad=True)
    leaves = [shape_like(x).requires_grad_(), shape_like(w).requires_grad_()]
    cost, _ = m.measure(lambda x, w: [torch.nn.functional.conv1d(x, w, groups=8)], leaves, [])
    assert cost.flops_forward == 2 * (2 * 8 * 29) * 4
    assert cost.flops_backward == 2 * cost.flops_forward


def test_bytes_of_a_product_by_hand():
    N, I, O = 128, 256, 64
    x = Shape(torch.empty(N, I, device="meta")).requires_grad_()
    w = Shape(torch.empty(O, I, device="meta")).requires_grad_()
    cost, (y,) = m.measure(lambda x: [torch.nn.functional.linear(x, w).relu()], [x], [w], gradients_exist=False)
    assert y.shape == (N, O)
    out = 4 * N * O
    assert cost.kept == out, "relu keeps its output; the product's output is freed"
    assert cost.forward == 2 * out
    assert cost.made == 4 * O * I
    # the gradients of the product's output, of weight and input, and two scalars of 512 bytes
    assert cost.backward + cost.made_at_peak == out + 4 * O * I + 4 * N * I + 2 * 512
    again, _ = m.measure(lambda x: [torch.nn.functional.linear(x, w).relu()], [x], [w], gradients_exist=True)
    assert (again.made, again.made_at_peak) == (0, 0)


class PlainTracker(TorchDispatchMode):
    """Live bytes of storages made under torch's FakeTensorMode."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata: 0 for t in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known[storage._cdata] = size = -(-storage.nbytes() // 512) * 512
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.live -= self.known.pop(key)


@pytest.mark.parametrize("settings", [(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("kind", ["memory", "attention"])
def test_memory_of_a_block_equals_that_under_torch_s_own_fake_tensors(registry, kind, settings):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = make_model(registry, HYBRID, f"layers=[{kind}]", *settings)
    cost = stages.measure_stages(model, like(GPUS, activation_checkpointing=False, batch=4), "bf16", False)[1]

    assert grouped_product_works("cpu", torch.bfloat16)
    real = make_model(registry, HYBRID, f"layers=[{kind}]", *settings).layers[0]
    streams = (4, 256, 2, 128) if settings else (4, 256, 128)
    with FakeTensorMode():
        fake = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in real.buffers()}
        fake |= {id(p): torch.nn.Parameter(torch.empty(p.shape, dtype=torch.bfloat16)) for p in real.parameters()}
        block = copy.deepcopy(real, fake)
        x = torch.empty(streams, dtype=torch.bfloat16, requires_grad=True)
        doc_ids = torch.zeros(4, 256, dtype=torch.int64)
        with PlainTracker([x, doc_ids, *block.parameters(), *block.buffers()]) as tracker:
            out, report = block(x, None, doc_ids)
            losses = list(report.losses.values())
            del report
            kept, forward = tracker.live, tracker.peak
            tracker.peak = tracker.live
            arriving = [torch.empty_like(t) for t in (out, *losses)]
            end = m._GradientsArrive.apply(arriving, out, *losses)
            del out, losses, arriving
            end.backward()
    assert cost.kept == pytest.approx(kept, rel=0.01)
    assert cost.forward == pytest.approx(forward, rel=0.01)
    assert cost.backward + cost.made_at_peak == pytest.approx(tracker.peak, rel=0.02)


def test_a_large_batch_is_extrapolated_to_what_it_measures(registry, monkeypatch):
    hardware = like(GPUS, batch=32)
    direct = stage_costs(registry, HYBRID, hardware)
    monkeypatch.setattr(stages, "DIRECT", 4096)  # 32 rows of 256 are then extrapolated from 8 and 16
    extrapolated = stage_costs(registry, HYBRID, hardware)
    for a, b in zip(direct, extrapolated, strict=True):  # what it is wrong by is to the safe side
        assert all(0.97 * exact <= found <= 1.06 * exact for exact, found in zip(astuple(a), astuple(b), strict=True))


def test_autocast_keeps_in_fp32_what_a_gpu_would():
    x = Shape(torch.empty(4, 8, dtype=torch.bfloat16, device="meta"))
    seen = {}

    def stage(x):
        seen["softmax"], seen["exp"], seen["mm"] = x.softmax(-1), torch.exp(x), x @ x.T
        return [seen["exp"]]

    m.measure(stage, [x.requires_grad_()], [], autocast=torch.bfloat16)
    assert [seen[k].dtype for k in ("softmax", "exp", "mm")] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero()])
def test_a_forward_that_reads_data_is_named(read):
    with ShapeMode(), pytest.raises(UserError, match="needs the data of a tensor"):
        read(torch.ones(3))


def test_an_operation_that_names_no_shapes_is_named():
    def strange(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with torch.library._scoped_library("planning_test", "FRAGMENT") as library:
        library.define("opaque(Tensor x) -> Tensor")
        library.impl("opaque", strange, "CPU")
        with ShapeMode(), pytest.raises(UserError, match=r"planning_test.opaque.default has no rule .*register_fake"):
            torch.ops.planning_test.opaque(torch.ones(3))


def test_flops_of_a_recurrence_by_hand():
    B, T, I, H = 4, 16, 24, 32
    layer, x = torch.nn.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    cost, _ = m.measure(lambda x: [m.without_data(layer)(x)[0]], [shape_like(x).requires_grad_()], [])
    assert cost.flops_forward == 2 * T * B * 4 * H * (I + H)
    assert cost.flops_backward == 2 * cost.flops_forward


def test_grouped_query_attention_by_hand(registry):
    """Every query head multiplies, however few heads keys and values have; two products forward, five backward."""
    B, T, H, K = 2, 16, 4, 8
    leaves = [Shape(torch.empty(B, heads, T, K, device="meta")).requires_grad_() for heads in (H, 2, 2)]
    for causal in (False, True):
        cost, _ = m.measure(lambda *qkv, causal=causal: [torch.nn.functional.scaled_dot_product_attention(
            *qkv, is_causal=causal, enable_gqa=True)], leaves, [])
        product = 2 * B * H * T * T * K // (2 if causal else 1)
        assert (cost.flops_forward, cost.flops_backward) == (2 * product, 5 * product)


def test_which_gradients_were_there_at_the_peak_by_hand():
    """Of two products the second's weight gradient is made first and is there at the peak; the first's comes after it,
    where malloc has had something else before."""
    def stage(x):
        h = torch.nn.functional.linear(x, first)
        return [torch.nn.functional.linear(torch.cat([h, h, h, h], -1), second)]

    N, D = 64, 32
    x = Shape(torch.empty(N, D, device="meta")).requires_grad_()
    first, second = (Shape(torch.empty(o, i, device="meta")).requires_grad_() for o, i in ((D, D), (D, 4 * D)))
    costs = {m.measure(stage, [x], [first, second], gradients_exist=False)[0] for _ in range(5)}
    cost, = costs
    wide, second_made = 4 * N * 4 * D, 4 * 4 * D * D
    assert (cost.made, cost.made_at_peak) == (4 * D * D + second_made, second_made)
    # the wide input of the second product and its gradient, the gradient that arrived, and two scalars of 512 bytes
    assert cost.backward == 2 * wide + 4 * N * D + 2 * 512
