"""Attention under a mask, all queries at once and block by block: against softmax written out, and in its memory."""

from itertools import pairwise

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, runs_everywhere, site

from tryplicity_plugins.layers import masked_attention as module
from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.masked_attention import PLAIN, Scores, masked_attention

T = 21
DOCS = {"none": None, "runs": torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [3] * 1 + [4] * 19 + [9] * 1]),
        "coming back": torch.tensor([[0] * 8 + [1] * 5 + [0] * 8, [1, 2] * 10 + [3]])}
WAYS = {"dense": {"DENSE": 10**9}, "blocks": {"DENSE": 0, "BLOCK": 6, "LONGEST": 6},
        "blocks of one": {"DENSE": 0, "BLOCK": 1, "LONGEST": 1}}


def chosen(monkeypatch, way):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(module, name, value)


OPTIONS = {"window": {"window": 5}, "the one before": {"window": 2}, "scale": {"scores": Scores(0.3)},
           "soft cap": {"scores": Scores(None, 0.8)}, "all": {"window": 7, "scores": Scores(0.7, 1.2)}}


def written_out(q, k, v, docs, window=T, scores=PLAIN):
    """Softmax over what each query may see, head by head."""
    batch, heads, new, size = q.shape
    seen, group = k.shape[2] - new, heads // k.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for t in range(new):
                at = seen + t
                near = range(max(0, at - window + 1), at + 1)
                allowed = [s for s in near if docs is None or docs[b, s] == docs[b, at]]
                score = k[b, h // group, allowed] @ q[b, h, t] * (scores.scale or size**-0.5)
                score = score if scores.softcap is None else (score / scores.softcap).tanh() * scores.softcap
                rows.append(score.softmax(0) @ v[b, h // group, allowed])
    return torch.stack(rows).view(batch, heads, new, -1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("seen", [0, 4])
@pytest.mark.parametrize("docs", DOCS)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients(way, docs, seen, dtype, tolerance, monkeypatch):
    assert_written_out(way, docs, seen, dtype, tolerance, monkeypatch)


@pytest.mark.parametrize("docs", ["none", "runs"])
@pytest.mark.parametrize("way", ["dense", "blocks"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, way, docs, monkeypatch):
    for seen in (0, 4):
        assert_written_out(way, docs, seen, torch.float64, 1e-12, monkeypatch, **options)


def assert_written_out(way, docs, seen, dtype, tolerance, monkeypatch, **options):
    chosen(monkeypatch, way)
    torch.manual_seed(0)
    new = T - seen
    q, k, v = (torch.randn(2, time, heads, 6, dtype=dtype).transpose(1, 2).requires_grad_()
               for time, heads in ((new, 4), (T, 2), (T, 2)))
    expected = written_out(q, k, v, DOCS[docs], **options)
    actual = masked_attention(q, k, v, DOCS[docs], **options).contiguous()
    assert_same([actual], [expected], tolerance)
    assert_same(gradients(actual, [q, k, v]), gradients(expected, [q, k, v]), tolerance)


def test_what_is_left_out_of_a_block_would_have_changed_nothing(monkeypatch):
    """Keys before a block's first document are not read at all: not even NaN in them is noticed."""
    chosen(monkeypatch, "blocks")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 6) for heads in (4, 2, 2))
    docs = torch.arange(T).div(7, rounding_mode="floor").expand(2, -1)
    expected = masked_attention(q, k, v, docs)
    k[:, :, :7], v[:, :, :7] = torch.nan, torch.nan
    # from the block on that begins after the first document
    assert torch.equal(masked_attention(q, k, v, docs)[:, :, 12:], expected[:, :, 12:])


def test_what_is_behind_a_window_is_not_even_read(monkeypatch):
    chosen(monkeypatch, "blocks")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 6) for heads in (4, 2, 2))
    expected = masked_attention(q, k, v, None, 5)
    k[:, :, :7], v[:, :, :7] = torch.nan, torch.nan
    assert torch.equal(masked_attention(q, k, v, None, 5)[:, :, 12:], expected[:, :, 12:])


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"window": 5}, {"softcap": 0.8}])
def test_blocks_run_everywhere(options, monkeypatch):
    chosen(monkeypatch, "blocks")
    config = GroupedQueryAttention.Config(heads=4, kv_heads=2, head_dim=8, **options)
    runs_everywhere(lambda: GroupedQueryAttention(config, site(hidden=32)), lambda m, x, docs: m(x, doc_ids=docs),
                    torch.randn(2, T, 32), DOCS["runs"])


@torch.no_grad()
@pytest.mark.parametrize("docs", ["none", "runs"])
def test_a_long_prompt_in_pieces_is_the_whole(docs, monkeypatch):
    """Long chunks that go on from a state, by either way."""
    config = GroupedQueryAttention.Config(heads=4, kv_heads=2, head_dim=8)
    layer = assemble(lambda: GroupedQueryAttention(config, site(hidden=32)), spread=0.3, dtype=torch.float64)
    x = torch.randn(2, T, 32, dtype=torch.float64)
    whole = {}
    for way in WAYS:
        chosen(monkeypatch, way)
        state, parts = layer.new_state(2), []
        for start, end in pairwise([0, 9, 18, T]):
            ids = None if DOCS[docs] is None else DOCS[docs][:, start:end]
            parts.append(layer(x[:, start:end], state=state, doc_ids=ids))
        whole[way] = torch.cat(parts, 1)
        assert_same([whole[way]], [layer(x, doc_ids=DOCS[docs])], 1e-12)
    assert_same([whole["blocks"]], [whole["dense"]], 1e-12)


def planned(registry, context):
    """Bytes that each stage of a model keeps, and its peaks, for one row of so many tokens."""
    from pathlib import Path

    from tryplicity.hardware import load_hardware
    from tryplicity.model import assemble as assemble_model
    from tryplicity.planner.stages import measure_stages
    from tryplicity.spec import load_spec

    spec = load_spec(str(Path(__file__).parents[2] / "small.yaml"), registry,
                     [f"context_length={context}", "brain=[hebbian_loss, predictive_coding]"])
    hardware = load_hardware("cpu", registry, ["batch=1"])
    return [(cost.kept, cost.forward, cost.backward)
            for cost in measure_stages(assemble_model(spec), hardware, "fp32", True)]


def test_the_memory_of_every_layer_and_objective_grows_with_the_length_alone(registry):
    for stage, more in zip(planned(registry, 2048), planned(registry, 8192), strict=True):
        for before, after in zip(stage, more, strict=True):
            assert after < 4.3 * before


def test_the_plan_of_a_window_grows_with_the_length_alone(registry):
    """Work as well as memory: twice the text, twice the products of a layer with a window."""
    from tryplicity.hardware import load_hardware
    from tryplicity.model import assemble as assemble_model
    from tryplicity.planner.stages import measure_stages
    from tryplicity.spec import load_spec, parse_yaml

    def planned(context, options):
        text = (f"name: s\nvocab_size: 300\nhidden_size: 32\ncontext_length: {context}\n"
                f"layers: [{{mixer: {{type: gqa, heads: 4, {options}}}}}]")
        model = assemble_model(load_spec(parse_yaml(text, "s.yaml"), registry))
        return measure_stages(model, load_hardware("cpu", registry, ["batch=1"]), "fp32", True)[1]

    for options in ("window: 256", "window: 256, softcap: 5.0"):
        short, long = planned(2**14, options), planned(2**15, options)  # in blocks of one size
        for figure in ("kept", "backward", "flops_forward", "flops_backward"):
            assert getattr(long, figure) < 2.05 * getattr(short, figure), figure
        assert short.flops_forward < 0.15 * planned(2**14, "softcap: 5.0").flops_forward


@pytest.mark.parametrize("lay", [torch.clone, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)])
def test_operators_keep_torchs_rules(monkeypatch, lay):
    """As they lie in memory too, however queries and keys do: what a compiler believes of results it does not see."""
    chosen(monkeypatch, "blocks")
    q, k, v = (lay(torch.randn(2, heads, T, 8)).requires_grad_() for heads in (4, 2, 2))
    torch.library.opcheck(module._blockwise, (q, k, v, DOCS["runs"], 5, None, 0.8))
    y = module._blockwise(q, k, v, None, None, None, None)
    given = [t.detach() for t in (lay(torch.randn_like(y)), y, q, k, v)]
    torch.library.opcheck(module._blockwise_backward, (*given, None, None, None, None))
