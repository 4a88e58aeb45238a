"""Trainings that begin from trained weights: what is taken, what is not, and that nothing else changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import call
from tests.ranks import together
from tests.training.conftest import SPEC
from tryplicity import UserError, World
from tryplicity.model import assemble
from tryplicity.spec import load_spec
from tryplicity.training import starting
from tryplicity.training.loop import Watcher
from tryplicity.training.metrics import read_lines

OTHER_MIXER = "blocks.memory.mixer={type: gqa, heads: 2, kv_heads: 1, head_dim: 16}"


@pytest.fixture
def before(go):
    """A run folder."""
    return go("before", steps=2)


def placed(registry, start, *settings, world=None, strategy="single"):
    """A model with what was taken, its weights as initialised, and the report."""
    spec, found = load_spec(str(SPEC), registry, settings), []
    for begin in (None, start):
        way = registry.part("parallelism", strategy).build()
        model = way.place(assemble(spec), world or World(), spec.training.seed)
        optimizer = torch.optim.AdamW(model.parameters())
        taken = begin and starting.take(begin, model, way, optimizer, world or World())
        found.append({name: tensor.clone() for name, tensor in way.weights(model).items()})
    return found[1], found[0], taken


def test_all_is_taken_by_the_same_spec(registry, before):
    weights, _, taken = placed(registry, starting.opened(before.folder))
    saved = load_file(before.weights)
    assert weights.keys() == saved.keys() == set(taken.taken) and not taken.initialised and not taken.unused
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())
    assert taken.parameters == sum(tensor.numel() for tensor in saved.values())


def test_another_layer_type_begins_as_it_is_initialised(registry, before):
    weights, fresh, taken = placed(registry, starting.opened(before.folder), OTHER_MIXER)
    saved = load_file(before.weights)
    assert taken.initialised and taken.unused
    for name, tensor in weights.items():
        assert torch.equal(tensor, saved[name] if name in taken.taken else fresh[name]), name
    assert all("mixer" in name for name in (*taken.initialised, *taken.unused))
    assert set(taken.taken) | set(taken.initialised) == weights.keys()
    said = taken.as_dict()
    assert sum(said["taken"].values()) == len(taken.taken) and all("*" in name for name in said["initialised"])
    assert len(taken.sentences()) == 3 and f"{len(taken.taken)} of {len(weights)} tensors" in taken.sentences()[0]


def on_two_ranks(world, folder):
    from pathlib import Path

    from tryplicity import load_plugins

    found = placed(load_plugins().registry, starting.opened(Path(folder)), world=world, strategy="fsdp")
    return found[0] if world.first_rank else None


def test_each_rank_takes_its_share(before):
    weights, _ = together(2, on_two_ranks, str(before.folder))
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(before.weights).items())


def test_the_command_tells_scores_and_goes_on_from_it(command, before, capfd, tmp_path):
    """The score before the first step is that of the run it begins from; a run that was cut short before its first
    checkpoint begins from there again."""
    scored = read_lines(before.metrics)[-1]["validation_bits_per_byte"]
    line = command("run", "--steps", "2", "--from", str(before.folder), "--set", "training.validation_rows=10000")[3:]
    code, out, err = call(capfd, *line)
    assert code == 0, err
    run = tmp_path / "run"
    first = read_lines(run / "metrics.jsonl")[0]
    assert first == {"step": 0, "tokens": 0, "validation_bits_per_byte": pytest.approx(scored, rel=1e-5)}
    assert "tensors taken" in out + err and f"before the first step: {scored:.3f}" in out + err
    kept = json.loads((run / "from.json").read_text())
    assert kept["from"] == str(before.folder) and kept["initialised"] == kept["unused"] == kept["converted"] == {}
    last = read_lines(run / "metrics.jsonl")[-1]
    name = "validation_bits_per_byte"
    assert (last[f"{name}_before"], last[f"{name}_after"]) == (first[name], last[name]) and last[name] < first[name]
    assert f"{first[name]:.3f} before the first step, {last[name]:.3f} after the last one" in out + err
    assert (run / "tokenizer.json").read_text() == before.tokenizer.read_text()
    weights = load_file(run / "model.safetensors")

    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    again = [*line[:line.index("--from")], *line[line.index("--from") + 2:], "--resume"]
    assert call(capfd, *again)[0] == 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(run / "model.safetensors").items())
    last = [*again[:again.index("--steps")], "--steps", "3", *again[again.index("--steps") + 2:]]
    shutil.rmtree(before.folder)  # a checkpoint is gone on from without it
    assert call(capfd, *last)[0] == 0
    assert [one["step"] for one in read_lines(run / "metrics.jsonl") if "loss" in one] == [1, 2, 3]


@pytest.mark.parametrize(("options", "words"), [
    (["--set", "vocab_size=290"], "has 300 tokens"),
    (["--tokenizer", "tokenizer.json"], "the tokenizer is that of the weights")])
def test_what_cannot_be_begun_from_is_one_line(command, before, capfd, tmp_path, options, words):
    (tmp_path / "tokenizer.json").write_text(before.tokenizer.read_text())
    options = [str(tmp_path / option) if option == "tokenizer.json" else option for option in options]
    code, _, err = call(capfd, *command("run", "--steps", "2", "--from", str(before.folder), *options)[3:])
    assert code == 2 and words in err and "Traceback" not in err, err


def test_weights_of_something_else_are_refused(registry, before, tmp_path):
    save_file({f"model.{name}": tensor for name, tensor in load_file(before.weights).items()},
              tmp_path / "other.safetensors")
    shutil.copy(before.tokenizer, tmp_path)
    with pytest.raises(UserError, match="none of its tensors has the name and the shape"):
        placed(registry, starting.opened(tmp_path / "other.safetensors"))


def test_places_that_are_none(before, tmp_path):
    newest = next(before.checkpoints.iterdir())
    assert starting.opened(newest).weights.names == starting.opened(before.folder).weights.names
    assert starting.opened(before.weights).tokenizer == before.tokenizer
    (tmp_path / "alone.safetensors").write_bytes(before.weights.read_bytes())
    (newest / "progress.json").write_text("{}")
    for place, words in ((tmp_path / "nowhere", "not a run folder"), (tmp_path, "not a run folder"),
                         (tmp_path / "alone.safetensors", "tokenizer.json: weights are of use with"),
                         (newest, "the checkpoint is damaged")):
        with pytest.raises(UserError, match=words):
            starting.opened(place)


def test_the_weights_begun_from_are_not_held_while_it_trains(go):
    first = go("first", steps=1)
    start = starting.opened(first.folder)
    mapped = []

    class Look(Watcher):
        def step(self, *arguments):
            mapped.append(str(first.weights) in Path("/proc/self/maps").read_text())

    assert str(first.weights) in Path("/proc/self/maps").read_text()
    go("second", steps=1, start=start, watcher=Look())
    assert mapped == [False] and start.weights.names
