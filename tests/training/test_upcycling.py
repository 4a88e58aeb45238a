"""Experts made of a dense feed-forward: the first forward pass of the mixture is that of the dense model."""

import pytest
import torch

from tests.training.conftest import SPEC
from tryplicity import UserError, World
from tryplicity.model import assemble, initialise
from tryplicity.spec import load_spec
from tryplicity.training import starting
from tryplicity.training.checkpoint import save_weights

DENSE = "{type: gated_mlp, inner_size: 24}"
UNGATED = "{type: mlp, inner_size: 24, activation: silu}"
SPIKING = "{type: gated_mlp, inner_size: 24, activation: spike}"
GROUPED = "{type: moe, experts: 8, top_k: 4, inner_size: 12, shared_experts: 0}"


def settings(feed_forward):
    return ["layers=[memory, attention]", "heads=[]", *(f"blocks.{name}.feed_forward={feed_forward}"
                                                        for name in ("memory", "attention"))]


@pytest.fixture
def begin(registry, prepared, tmp_path):
    """`begin(dense, moe)`: the dense model, with weights away from their initial ones, the mixture that began from
    it, and the report."""

    def make(dense, moe, *more, world=None, strategy="single"):
        spec = load_spec(str(SPEC), registry, [*settings(dense), *more])
        model = initialise(assemble(spec), "cpu", 0).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) if "feed_forward" in name else 0)
        save_weights(model, tmp_path / "model.safetensors")
        (tmp_path / "tokenizer.json").write_text(prepared.tokenizer_path.read_text())
        way = registry.part("parallelism", strategy).build()
        mixture = way.place(assemble(load_spec(str(SPEC), registry, [*settings(moe), *more])), world or World(), 0)
        taken = starting.take(starting.opened(tmp_path / "model.safetensors"), mixture, way,
                              torch.optim.AdamW(mixture.parameters()), world or World())
        return model, mixture.eval(), taken

    return make


def logits(model, seed=0):
    ids = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(seed))
    return model(ids)


SHARED = "{type: moe, experts: 4, top_k: 2, inner_size: 24, shared_experts: 2, shared_inner_size: 24}"


@pytest.mark.parametrize(("dense", "moe"), [
    (DENSE, "{type: moe, experts: 4, top_k: 2, inner_size: 24, shared_experts: 0}"),
    (DENSE, SHARED),
    (DENSE, "{type: moe, experts: 4, top_k: 3, inner_size: 24, shared_experts: 2, shared_inner_size: 12}"),
    (DENSE, SHARED.replace("}", ", shared_gate: true}")),
    (DENSE, "{type: moe, experts: 4, inner_size: 24, shared_experts: 0, router: {type: dynamic_sparsity, "
            "min_experts: 1, max_experts: 3, mean_experts: 2}}"),
    (DENSE, "{type: moe, experts: 4, inner_size: 24, shared_experts: 0, router: {type: top_k, scale: 2.5}}"),
    (UNGATED, "{type: moe, experts: 4, top_k: 2, inner_size: 24, gated: false, shared_inner_size: 24}"),
    (SPIKING, SHARED.replace("}", ", activation: spike}")),
    (DENSE, GROUPED),
    (UNGATED, GROUPED.replace("}", ", gated: false}")),
    (SPIKING, GROUPED.replace("}", ", activation: spike}"))])
def test_the_first_logits_are_those_of_the_dense_model(begin, dense, moe):
    model, mixture, taken = begin(dense, moe)
    for seed in range(3):
        torch.testing.assert_close(logits(mixture, seed), logits(model, seed), rtol=0, atol=1e-5)
    said = taken.as_dict()
    assert said["converted"]["layers.*.feed_forward.layer.down.weight"] == 2 and not taken.unused
    assert all("router" in name or "shared_gate" in name or "use_E" in name for name in taken.initialised)
    assert any(line.startswith("made from the layers that stood there: ") for line in taken.sentences())


@pytest.mark.parametrize("moe", [SHARED, GROUPED])
def test_the_experts_part_when_they_learn(begin, moe):
    """No two of them stay alike, though nothing random was added."""
    _, mixture, _ = begin(DENSE, moe)
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=1e-3)
    for seed in range(3):
        logits(mixture.train(), seed).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for block in mixture.layers:
        down_EN = block.feed_forward.layer.down.weight.flatten(1)
        assert torch.pdist(down_EN).min() > 0


def test_with_weights_that_do_not_sum_to_one_it_is_near(begin):
    """Scores of a fresh router are nearly alike, and their sum is known."""
    for score in ("softmax", "sigmoid"):
        moe = GROUPED.replace("}", f", router: {{type: top_k, normalize: false, score: {score}}}}}")
        model, mixture, _ = begin(DENSE, moe.replace("12", "24").replace("experts: 8", "experts: 6"))
        far = (logits(mixture) - logits(model)).norm() / logits(model).norm()
        assert far < 0.05, (score, far)


@pytest.mark.parametrize(("dense", "moe", "words"), [
    (DENSE, SHARED.replace("24", "10"), "experts of 10 neurons cannot be made of a feed-forward of 24; give the moe "
                                        "inner_size: 24, or a divisor"),
    (DENSE, GROUPED.replace("top_k: 4", "top_k: 3"), "a token must get all 2 parts at once"),
    (DENSE, GROUPED.replace("}", ", router: lateral_inhibition}"), "which takes a plain top_k router"),
    (DENSE, SHARED.replace("shared_inner_size: 24", "shared_inner_size: 20"), "shared experts of 40 neurons together"),
    (DENSE, SHARED.replace("}", ", gated: false}"), "experts without a gate cannot be copies .* gated: true"),
    (UNGATED, SHARED, "experts with a gate cannot be copies .* gated: false"),
    (DENSE.replace("}", ", bias: true}"), SHARED, "no place for the down.bias")])
def test_what_cannot_become_experts_is_one_line(begin, dense, moe, words):
    with pytest.raises(UserError, match=f"^--from .*layers.0.feed_forward: .*{words}") as error:
        begin(dense, moe)
    assert "\n" not in str(error.value)


def test_other_sizes_begin_as_they_are_initialised(begin):
    """A mixture of another number of experts is no dense feed-forward."""
    _, _, taken = begin(SHARED, SHARED.replace("experts: 4", "experts: 3", 1))
    assert not taken.converted and taken.initialised and taken.unused


def on_two_ranks(world, folder, moe):
    from pathlib import Path

    from tests.training.test_starting import placed
    from tryplicity import load_plugins

    found = placed(load_plugins().registry, starting.opened(Path(folder) / "model.safetensors"), *settings(moe),
                   world=world, strategy="fsdp")
    return found[0] if world.first_rank else None


def test_each_rank_makes_the_same_and_keeps_its_share(begin, tmp_path):
    from tests.ranks import together

    _, mixture, _ = begin(DENSE, GROUPED)
    weights, _ = together(2, on_two_ranks, str(tmp_path), GROUPED)
    for name, tensor in mixture.state_dict().items():
        assert torch.equal(weights[name], tensor), name
