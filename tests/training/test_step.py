"""One optimizer step: cut into parts, checkpointed, skipped when it is not finite."""

import pytest
import torch

from tryplicity.components import Mean
from tryplicity.training.step import ONE, decay_groups, forward_backward, training_step


def run(model, batch, micro_batch, checkpointing=False):
    model.activation_checkpointing = checkpointing
    model.zero_grad()
    result = forward_backward(model, batch, micro_batch, "fp32")
    return result, {name: p.grad.clone() for name, p in model.named_parameters()}


def losses(result):
    return {name: mean.value for name, mean in result.objectives.items()} | result.auxiliary


@pytest.fixture
def batch(prepared):
    return prepared.stream(seed=0).batch(0, 8, 48)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_a_batch_cut_into_parts_gives_the_same_losses_statistics_and_gradients(make_model, batch, micro_batch):
    model = make_model(dtype=torch.float64)
    whole, gradients = run(model, batch, 8)
    parts, cut = run(model, batch, micro_batch)
    assert losses(whole).keys() == losses(parts).keys() and len(losses(whole)) >= 3
    for name, value in losses(whole).items():
        torch.testing.assert_close(losses(parts)[name], value, rtol=1e-6, atol=1e-8)
    for name, stat in whole.stats.items():
        torch.testing.assert_close(Mean(*parts.stats[name]).value.double(), stat.value.double(), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("linear", ["linear", "bitlinear"])
def test_activation_checkpointing_changes_no_bit(make_model, batch, linear):
    model = make_model(f"linear={linear}")
    plain, gradients = run(model, batch, 4)
    again, recomputed = run(model, batch, 4, checkpointing=True)
    for name, value in losses(plain).items():
        assert torch.equal(losses(again)[name], value), name
    for name, stat in plain.stats.items():
        assert torch.equal(again.stats[name].total, stat.total), name
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def test_the_gradient_is_of_the_mean_over_all_valid_targets(make_model, batch):
    """Rows with very different numbers of targets: each target counts the same, wherever it stands."""
    targets = batch.targets_BT.clone()
    targets[0, :-2] = -100
    model, uneven = make_model("heads=[]", dtype=torch.float64), batch._replace(targets_BT=targets)
    _, gradients = run(model, uneven, 1)
    model.zero_grad()
    out = model(batch.ids_BT, targets={"next_token": targets}, doc_ids_BT=batch.doc_ids_BT)
    (out.objectives["next_token"].total / (targets != -100).sum() + sum(out.report.losses.values())).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-9)


def test_a_step_that_is_not_finite_changes_nothing(make_model, batch, registry):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    with torch.no_grad():
        model.norm.weight[3] = torch.inf
    for module in model.modules():
        if hasattr(module, "before_step"):
            module.before_step(0)  # what is measured of the weights before any step is no change by this one
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = training_step(model, optimizer, registry.part("parallelism", "single").build(), batch, step=0,
                           micro_batch=4, precision="fp32", max_norm=1.0, learning_rate_factor=1.0)
    assert not torch.isfinite(result.objectives["next_token"].total)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not optimizer.state


def test_vectors_and_what_modules_name_are_not_decayed(make_model):
    model = make_model()
    decayed, undecayed = decay_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(undecayed) == len(names)
    left = {names[id(p)] for p in undecayed}
    assert {"norm.weight", "layers.0.mixer.layer.A_log", "layers.0.mixer.layer.dt_bias"} <= left
    assert "layers.0.mixer.residual.static" in left and "embedding.weight" not in left


@pytest.fixture
def steps_of(registry, batch):
    """`steps_of(model, fused, batches)`: the results of steps with AdamW, and the optimizer."""

    def run(model, fused, batches):
        optimizer = registry.part("optimizer", {"type": "adamw", "fused": fused}).build().build(*decay_groups(model))
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        strategy = registry.part("parallelism", "single").build()
        return [training_step(model, optimizer, strategy, one, step=number, micro_batch=4, precision="fp32",
                              max_norm=1.0, learning_rate_factor=1.0)
                for number, one in enumerate(batches)], optimizer

    return run


def everything(model, optimizer):
    state = {(i, name): value.clone() for i, held in enumerate(optimizer.state.values())
             for name, value in held.items()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | state


@pytest.mark.parametrize("settings", [[], ["blocks.memory.feed_forward.activation=spike"]], ids=["plain", "spike"])
def test_an_optimizer_that_looks_for_itself_changes_nothing_after_a_bad_step(make_model, batch, steps_of, settings):
    """Weights, moments, counts of steps and what modules adapt: after a good step, a bad one and a good one they are
    as without the bad one."""
    bad = batch._replace(targets_BT=torch.full_like(batch.targets_BT, -100))
    models = [make_model(*settings) for _ in range(2)]
    (_, skipped, _), optimizer = steps_of(models[0], True, [batch, bad, batch])
    _, other = steps_of(models[1], True, [batch, batch])
    assert skipped.finite and not skipped.objectives["next_token"].count
    found, wanted = everything(models[0], optimizer), everything(models[1], other)
    assert found.keys() == wanted.keys() and any(name[1] == "step" for name in found if isinstance(name, tuple))
    for name, tensor in wanted.items():
        if "step" not in name:  # what modules remember of which step it was
            assert torch.equal(found[name], tensor), name
    assert all(float(held["step"]) == 2 for held in optimizer.state.values())


def test_a_gradient_that_is_not_finite_undoes_what_modules_adapt(make_model, batch, steps_of):
    model = make_model("blocks.memory.feed_forward.activation=spike")
    _, optimizer = steps_of(model, True, [batch])
    adapted = [name for name, _ in model.named_buffers() if name.endswith(("bias", "use_E", "offset", "zero_rate"))]
    assert len(adapted) >= 4
    before = everything(model, optimizer)
    model.layers[0].mixer.register_forward_hook(lambda module, given, out: (out[0] * torch.nan, out[1]))
    result = training_step(model, optimizer, ONE, batch, step=1, micro_batch=8, precision="fp32", max_norm=1.0,
                           learning_rate_factor=1.0)
    assert not result.finite
    for name, tensor in everything(model, optimizer).items():
        if "step" not in name:
            assert torch.equal(before[name], tensor), name


def test_the_two_ways_to_step_are_one(make_model, batch, steps_of):
    """An optimizer that is asked on the device, and one that the host asks: torch's fused and plain AdamW."""
    models = [make_model(dtype=torch.float64) for _ in range(2)]
    results = [steps_of(model, fused, [batch] * 3)[0] for model, fused in zip(models, (True, False), strict=True)]
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own.loss.value, plain.loss.value, rtol=1e-9, atol=0)
    for (name, own), plain in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_what_the_host_reads_is_what_the_device_has(make_model, batch, steps_of):
    (result,), _ = steps_of(make_model(), True, [batch])
    read = result.on_host()
    assert read.stats.keys() == result.stats.keys() and len(read.stats) > 5 and read.nll is result.nll
    for kind in ("objectives", "stats"):
        for name, mean in getattr(result, kind).items():
            for own, wanted in zip(getattr(read, kind)[name], mean, strict=True):
                assert type(own) is type(wanted) and (torch.equal(own, wanted) if torch.is_tensor(own)
                                                      else own == wanted), name
    assert all(torch.equal(read.auxiliary[name], value) for name, value in result.auxiliary.items())
    assert torch.equal(read.gradient_norm, result.gradient_norm) and read.finite.dtype == torch.bool and read.finite
    assert torch.equal(read.nats, result.nats)
