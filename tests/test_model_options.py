"""What a spec can say of its model as a whole: where norms stand, multipliers, soft caps, blocks of one part."""

import math

import pytest
import torch
from torch.nn import functional as F

from tryplicity import UserError
from tryplicity.components import IGNORE, Rows
from tryplicity.model import NEXT_TOKEN, assemble, initialise
from tryplicity.planner.count import count
from tryplicity.spec import load_spec, parse_yaml

SMALL = """\
name: small
vocab_size: 300
hidden_size: 32
context_length: 64
layers:
  - {{mixer: {{type: gqa, heads: 4{mixer}}}}}
  - {{feed_forward: {{type: gated_mlp, inner_size: 48}}}}
  - {{mixer: {{type: mamba2, state_size: 16, head_dim: 16}}, feed_forward: {{type: mlp, inner_size: 40}}, {block}}}
{more}
"""
DOCS = torch.tensor([[0] * 11 + [1] * 20 + [2] * 6, [0] * 3 + [1] * 1 + [2] * 33])
OPTIONS = {
    "plain": {},
    "norms after": {"more": "norms: after"},
    "norms around": {"more": "norms: around\ntied_embeddings: false"},
    "norms of one block": {"block": "norms: around"},
    "multipliers": {"more": "embedding_multiplier: 6.0\nlogits_multiplier: 0.25\n"
                            "residual: {type: add, multiplier: 0.25}"},
    "soft cap": {"more": "logits_softcap: 2.0\nlogits_multiplier: 3.0"},
}
every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def spec_of(registry, block="", more="", mixer="", settings=()):
    text = SMALL.format(block=block, more=more, mixer=mixer and f", {mixer}")
    return load_spec(parse_yaml(text, "s.yaml"), registry, settings)


def made(registry, options, dtype=torch.float64):
    model = initialise(assemble(spec_of(registry, **options)), "cpu", 0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def random_ids(seed=1):
    return torch.randint(0, 300, (2, 37), generator=torch.Generator().manual_seed(seed))


def by_formula(model, ids_BT, docs):
    """The model written out, layer after layer."""
    spec = model.spec
    x = model.embedding.weight[ids_BT] * spec.embedding_multiplier
    factor = getattr(spec.residual.config, "multiplier", 1.0)
    for block, given in zip(model.layers, spec.layers, strict=True):
        where = given.norms or spec.norms
        for part in (block.mixer, block.feed_forward):
            if part is None:
                continue
            y = part.norm(x) if where in ("before", "around") else x
            y = part.layer(y, doc_ids=docs)
            y = y[0] if isinstance(y, tuple) else y
            y = part.norm_after(y) if where in ("after", "around") else y
            x = x + factor * y
    table = model.embedding if model.unembedding is None else model.unembedding
    logits = spec.logits_multiplier * (model.norm(x) @ table.weight.T)
    return logits if spec.logits_softcap is None else spec.logits_softcap * torch.tanh(logits / spec.logits_softcap)


@every
def test_the_model_is_what_its_spec_says_values_and_gradients(registry, options):
    model, ids = made(registry, options), random_ids()
    next_BT = ids.roll(-1, 1).masked_fill(torch.arange(37) == 36, IGNORE)
    expected = by_formula(model, ids, DOCS)
    assert torch.allclose(model(ids, doc_ids_BT=DOCS), expected, rtol=1e-5, atol=1e-6)
    losses = model(ids, targets={NEXT_TOKEN: next_BT}, doc_ids_BT=DOCS)
    nll = F.cross_entropy(expected.flatten(0, 1), next_BT.flatten(), ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses.nll_BT.flatten(), nll.detach(), rtol=1e-5, atol=1e-6)
    wanted = list(model.parameters())
    found = torch.autograd.grad(losses.objectives[NEXT_TOKEN].total, wanted)
    for actual, plain in zip(found, torch.autograd.grad(nll.sum(), wanted), strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@every
@torch.no_grad()
def test_whole_is_chunks_is_token_by_token(registry, options):
    model, ids = made(registry, options).eval(), random_ids()
    for docs in (None, DOCS):
        whole = model(ids, doc_ids_BT=docs)
        for sizes in ([1] * 37, [5, 1, 16, 2, 13]):
            state, parts, start = model.new_state(2), [], 0
            for size in sizes:
                here = slice(start, start + size)
                parts.append(model(ids[:, here], state=state, doc_ids_BT=None if docs is None else docs[:, here]))
                start += size
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer", ["window: 5, softcap: 1.5, rotary_fraction: 0.5, out_norm: true",
                                   "rope_base: null, qk_norm: true, qk_norm_over: width, bias: true"])
def test_it_trains_compiled_as_it_does_eagerly(registry, mixer):
    from tryplicity.training.compiling import compiled, differs

    more = "norms: around\nresidual: {type: add, multiplier: 0.25}"
    model = made(registry, {"mixer": mixer, "more": more}, torch.float32)
    x_BTD = torch.randn(2, 16, 32)
    for block in model.layers[:2]:
        eager = type(block).forward
        assert differs(block, eager, compiled(eager, "aot_eager"), x_BTD, None, None) is None


def test_weighed_tokens_are_capped_too(registry):
    """Both losses of a model whose tokens an objective weighs: all of them first, then the kept ones."""
    more = "logits_softcap: 2.0\nbrain: [{type: predictive_coding, keep: 0.5}]"
    model, ids = made(registry, {"more": more}), random_ids()
    nll_BT = model.train()(ids, targets={NEXT_TOKEN: ids.roll(-1, 1)}).nll_BT
    capped = by_formula(model, ids, None)
    expected = F.cross_entropy(capped.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none")
    torch.testing.assert_close(nll_BT.flatten(), expected.detach(), rtol=1e-5, atol=1e-6)
    weights_BT = model.objectives["predictive_coding"].token_weights(nll_BT, torch.ones_like(ids, dtype=torch.bool))
    weights_BT = weights_BT[0] if isinstance(weights_BT, tuple) else weights_BT
    kept = weights_BT.topk(math.ceil(0.5 * 37), dim=1).indices
    wanted = (expected.view_as(ids).gather(1, kept) * weights_BT.gather(1, kept)).sum()
    total = model(ids, targets={NEXT_TOKEN: ids.roll(-1, 1)}).objectives[NEXT_TOKEN].total
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)


def test_a_block_of_one_part_is_counted_as_such(registry):
    counts = count(assemble(spec_of(registry)))
    assert [(layer.mixer, layer.feed_forward) for layer in counts.layers] == [
        ("gqa", None), (None, "gated_mlp"), ("mamba2", "mlp")]
    assert [layer.parameters for layer in counts.layers[:2]] == [4 * 32 * 32 + 32, 3 * 32 * 48 + 32]


def test_overrides_take_a_part_away(registry):
    spec = spec_of(registry, settings=["overrides={'2': {mixer: null}}"])
    assert spec.layers[2].mixer is None and spec.layers[2].feed_forward.name == "mlp"


@pytest.mark.parametrize("options, said", [
    ({"block": "norms: behind"}, "layers[2].norms: expected one of before, after, around"),
    ({"more": "norms: between"}, "norms: expected one of before, after, around"),
    ({"more": "logits_softcap: 0"}, "logits_softcap: expected a number from 1e-30"),
    ({"more": "residual: {type: add, multiplier: -1}"}, "residual.multiplier: expected a number from 1e-30"),
    ({"more": "embedding_multiplier: null"}, "embedding_multiplier: expected a number"),
])
def test_mistakes(registry, options, said):
    with pytest.raises(UserError) as caught:
        spec_of(registry, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize("name, identity", [
    ("tiny", "5094a6658244446f"), ("5090", "ef079ebb93f8a4c7"), ("full", "aeb55d8a2b8ea1f7")])
def test_checkpoints_from_before_these_options_still_belong_to_their_specs(registry, name, identity):
    """Who changes a shipped spec changes its figure here; an option that is left out must not."""
    assert load_spec(name, registry).identity() == identity


def test_an_option_that_is_said_is_part_of_the_identity(registry):
    identities = {spec_of(registry, **options).identity() for options in OPTIONS.values()}
    assert len(identities) == len(OPTIONS)
    said = "norms: before\nembedding_multiplier: 1.0\nresidual: {type: add, multiplier: 1.0}"
    assert spec_of(registry, more=said).identity() == spec_of(registry).identity()


@pytest.mark.parametrize("takes_rows", [True, False])
@torch.no_grad()
def test_rows_of_different_lengths_are_as_each_alone(registry, takes_rows):
    """Whether the layers take several states at once, or the model asks them row by row."""
    model, ids = made(registry, OPTIONS["norms around"]).eval(), random_ids()
    for block in model.layers:
        for part in block.sublayers.values():
            part.layer.takes_rows = takes_rows
    states = [model.new_state(1) for _ in range(2)]
    for row, (state, length) in enumerate(zip(states, (5, 20), strict=True)):
        model(ids[row:row + 1, :length], state=state)
    together = model(torch.stack([ids[0, 5:8], ids[1, 20:23]]), state=Rows(states))
    whole = model(ids)
    torch.testing.assert_close(together, torch.stack([whole[0, 5:8], whole[1, 20:23]]), rtol=1e-5, atol=1e-6)


def test_the_plan_has_what_a_soft_cap_holds(registry):
    """The capped logits beside the logits, while the losses are worked out."""
    from tryplicity.hardware import load_hardware
    from tryplicity.planner.stages import measure_stages

    hardware = load_hardware("cpu", registry, ["batch=2"])
    plain, capped = (measure_stages(assemble(spec_of(registry, more=more)), hardware, "fp32", True)[-1]
                     for more in ("", "logits_softcap: 2.0"))
    logits = 2 * 64 * 300 * 4  # bytes
    assert capped.forward - plain.forward >= logits
    assert capped.kept == plain.kept
