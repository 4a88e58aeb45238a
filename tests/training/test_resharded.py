"""A checkpoint of one world and strategy, read by another: the same numbers, each rank taking its share."""

import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import together
from tests.training.conftest import SPEC
from tryplicity.training import checkpoint, saving
from tryplicity.training.checkpoint import Options, TrainingProgress
from tryplicity.training.saved import indexed, saved_weights
from tryplicity.training.saving import Saver

SETTINGS = ["heads=[]", "brain=[]", "layers=[attention]", "hidden_size=32"]


def placed(world, strategy, seed):
    """A small model laid out by a strategy, and its optimizer after one step whose gradients are known."""
    from tryplicity import load_plugins
    from tryplicity.model import assemble
    from tryplicity.spec import load_spec
    from tryplicity.training.step import decay_groups

    registry = load_plugins().registry
    spec = load_spec(str(SPEC), registry, SETTINGS)
    kind = registry.get("parallelism", strategy)
    strategy = kind(kind.Config() if hasattr(kind, "Config") else None)
    model = strategy.place(assemble(spec), world, seed)
    optimizer = torch.optim.AdamW([{"params": part} for part in decay_groups(model) if part], lr=0.1, betas=(0.8, 0.9))
    return strategy, model, optimizer


def step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 2 + 1
    optimizer.step()


def whole(tree):
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
            for name, tensor in tree.items()}


def everything(strategy, model, optimizer):
    """All that a checkpoint holds, whole, on every rank."""
    state = strategy.state(model, optimizer)
    moments = {f"{parameter}.{name}": value for parameter, own in state["optimizer"]["state"].items()
               for name, value in own.items()}
    return {"model": whole(state["model"]), "optimizer": whole(moments)}, state["optimizer"]["groups"]


def write(world, strategy, folder):
    strategy, model, optimizer = placed(world, strategy, 0)
    step(model, optimizer)
    saver, changed, write_tensors = Saver(Path(folder), world, keep=2, every=1), threading.Event(), saving.write_tensors
    saving.write_tensors = lambda *given: changed.wait() and write_tensors(*given)
    torch.manual_seed(10 + world.rank)
    saver.begin(strategy, model, optimizer, Options.of("adamw", optimizer), TrainingProgress(step=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what training does before it is written is not in it
    changed.set()
    job = saver.finish()
    assert (job.state, job.error) in (("committed", ""), ("written", ""))


def read(world, strategy, folder):
    strategy, model, optimizer = placed(world, strategy, 1)
    path = checkpoint.newest(Path(folder), world)
    progress = checkpoint.load(path, strategy, model, optimizer, Options.of("adamw", optimizer), world)
    assert progress.step == 1
    found, groups = everything(strategy, model, optimizer)
    step(model, optimizer)  # what was put back can be gone on with
    return found, groups, torch.initial_seed() if world.rank >= 2 else torch.get_rng_state()


def starved(world, folder):
    """One rank's disk is full, and then it is not."""
    strategy, model, optimizer = placed(world, "ddp", 0)
    step(model, optimizer)
    saver, errors = Saver(Path(folder), world, keep=2, every=1), []
    for number, room in ((1, 1000), (2, resource.RLIM_INFINITY)):
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        saver.begin(strategy, model, optimizer, Options.of("adamw", optimizer), TrainingProgress(step=number))
        errors.append(saver.finish().error)
    return errors


def expected():
    from tryplicity.world import World

    strategy, model, optimizer = placed(World(), "single", 0)
    step(model, optimizer)
    return everything(strategy, model, optimizer)


@pytest.mark.parametrize(("before", "after"), [
    pytest.param((1, "single"), (2, "fsdp"), id="one to two shares"),
    pytest.param((2, "fsdp"), (1, "single"), id="two shares to one"),
    pytest.param((2, "ddp"), (4, "fsdp"), id="two copies to four shares"),
    pytest.param((3, "fsdp"), (2, "ddp"), id="three shares to two copies"),
])
def test_any_world_reads_what_another_wrote(tmp_path, before, after):
    together(*before[:1], write, before[1], str(tmp_path))
    (folder,) = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    size = before[0]
    parts = {"model", "optimizer"}
    files = {f"{part}.safetensors" if size == 1 else f"{part}-{rank:05}-of-{size:05}.safetensors"
             for part in parts for rank in range(1, size + 1)}
    assert names == files | {"index.json", "state.pt", "progress.json", "plugins.json", "complete.json"}
    wanted, groups = expected()
    for found, found_groups, _ in together(after[0], read, after[1], str(tmp_path)):
        for part in parts:
            assert found[part].keys() == wanted[part].keys()
            for name, tensor in wanted[part].items():
                assert torch.equal(found[part][name], tensor), (part, name)
        assert found_groups == groups
    # and without any ranks: by name, one at a time
    for part, tensors in (("model", saved_weights(folder)), ("optimizer", indexed(folder, "optimizer"))):
        assert tensors.names == wanted[part].keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted[part].items())


def test_a_world_of_one_leaves_weights_that_any_reader_of_safetensors_can_take(tmp_path):
    together(1, write, "single", str(tmp_path))
    found = load_file(tmp_path / "step-1" / "model.safetensors")
    wanted = expected()[0]["model"]
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_each_rank_gets_its_own_random_numbers_back_and_a_new_one_its_own(tmp_path):
    together(2, write, "ddp", str(tmp_path))
    states = [random for _, _, random in together(4, read, "ddp", str(tmp_path))]
    for rank in range(2):
        assert torch.equal(states[rank], torch.Generator().manual_seed(10 + rank).get_state())
    assert states[2] != states[3]


def test_a_disk_that_is_full_for_one_rank_costs_the_checkpoint_of_all(tmp_path):
    for first, second in together(2, starved, str(tmp_path)):
        assert first.startswith("rank 1: ") and "File too large" in first and second == ""
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert checkpoint.damage(tmp_path / "step-2") is None
