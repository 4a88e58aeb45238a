"""Several ranks train as one process does with the same rows: losses, gradients, choices of brain modules, weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import together

SMALL, TINY = "tests/small.yaml", "specs/tiny.yaml"
BRAIN = ("brain=[{{type: hebbian_loss}}, {{type: predictive_coding}}, {{type: neuro_curriculum}}, "
         "{{type: sleep_consolidation, every: {every}, replay_steps: 2, average: 2, min_use: 0.998}}]")
#: a plain AdamW, for its vectors' last elements round unlike the others in the fused one
COMMON = ["vocab_size=300", "context_length=48", "phases=[]", "hardware.batch=1", "hardware.link_bandwidth_gbs=1",
          "training.optimizer.fused=false", "training.validation_rows=5"]
CLOCKS = {"seconds", "tokens_per_second"}


def training(world, corpus, cache, folder, spec, settings, steps, plugins=(), start=None):
    """A whole training; rank 0 gives what it wrote down, by step, and its weights."""
    from tryplicity import load_plugins
    from tryplicity.builder import build
    from tryplicity.data import parse_source, prepare
    from tryplicity.run import Run
    from tryplicity.training.loop import Budget, train
    from tryplicity.training.metrics import read_lines

    plugins = load_plugins(plugins)
    prepared = prepare(parse_source(plugins.registry, corpus), 300, Path(cache))
    built, run = build(spec, "cpu", plugins.registry, [*COMMON, *settings]), Run(Path(folder))
    world.decided(lambda: run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={},
                                     tokenizer=prepared.tokenizer_path.read_text()))
    outcome = train(built, prepared, run, Budget(steps=steps), plugins, world=world, start=start)
    assert outcome.progress.step == steps
    if world.first_rank:
        return read_lines(run.metrics), load_file(run.weights)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A folder of texts, some of one sentence and some of many."""
    import random

    from tests.conftest import WORDS

    folder, rng = tmp_path_factory.mktemp("uneven"), random.Random(1)
    for i in range(40):
        sentences = (" ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 14))) + "." for _ in range(1 + i % 24))
        (folder / f"{i:02}.txt").write_text("\n".join(sentences) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(uneven, tmp_path_factory):
    """`trained(2, "ddp", ...)`: what a training of so many ranks wrote down, and its weights."""
    cache, done = tmp_path_factory.mktemp("cache"), {}

    def go(size, strategy, spec, settings, steps, **limit):
        key = json.dumps([size, strategy, spec, settings, steps])
        if key not in done:
            folder = tmp_path_factory.mktemp("runs") / "run"
            done[key] = together(size, training, str(uneven), str(cache), str(folder), spec,
                                 [*settings, f"hardware.strategy={strategy}"], steps, **limit)[0]
        return done[key]

    return go


def compare(ours, theirs, bound=1e-5):
    """Every number that is written down, and every weight."""
    (lines, weights), (lines_there, weights_there) = ours, theirs
    assert len(lines) == len(lines_there)
    for here, there in zip(lines, lines_there, strict=True):
        assert here.keys() == there.keys()
        flat, flat_there = (line | line.get("sleep", {}) for line in (here, there))
        for name, value in flat.items():
            if name in CLOCKS or name == "sleep":
                continue
            if isinstance(value, str):
                assert value == flat_there[name]
                continue
            assert value == pytest.approx(flat_there[name], rel=bound, abs=bound), (here["step"], name)
    assert weights.keys() == weights_there.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, weights_there[name], rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


FEW = [BRAIN.format(every=3).replace("{{", "{").replace("}}", "}"), "layers=[memory, attention]", "linear=bitlinear",
       "training.validate_every=2", "training.checkpoint_every=2"]


@pytest.mark.parametrize(("size", "strategy"), [
    (2, "{type: ddp, exact: true}"), (2, "{type: fsdp, exact: true}")])
def test_two_ranks_train_as_one_does(trained, size, strategy):
    """Five rows a step, so that one rank has two and the other three; every brain module, a sleep, stages."""
    one = trained(1, "{type: single, exact: true}", SMALL, [*FEW, "hardware.accumulation=5"], 5)
    several = trained(size, strategy, SMALL, [*FEW, "hardware.count=5"], 5)
    compare(several, one)
    slept = [line["sleep"] for line in one[0] if "sleep" in line]
    assert slept and slept[0]["replayed_documents"] > 1 and slept[0]["averaged_checkpoints"] == 1
    assert any(value > 0 for name, value in slept[0].items() if name.endswith("revived_experts"))
    assert len({line["stage"] for line in one[0] if "stage" in line}) == 4


MANY = [BRAIN.format(every=20).replace("{{", "{").replace("}}", "}"), "training.validate_every=10",
        "training.checkpoint_every=10"]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "strategy"), [
    (2, "{type: ddp, exact: true}"), (4, "{type: ddp, exact: true}"), (2, "{type: fsdp, exact: true}"),
    (4, "{type: fsdp, exact: true}"), (4, "{type: fsdp, exact: true, shards: 2}")])
def test_fifty_steps_of_tiny_are_the_same_on_any_ranks(trained, size, strategy):
    """Six rows a step, which four ranks divide as 1, 2, 1, 2."""
    one = trained(1, "{type: single, exact: true}", TINY, [*MANY, "hardware.accumulation=6"], 50, limit=3600)
    several = trained(size, strategy, TINY, [*MANY, "hardware.count=2", "hardware.accumulation=3"], 50, limit=3600)
    compare(several, one)
    assert all(math.isfinite(line["loss"]) for line in several[0] if "loss" in line)


SICK = """
import os
from tryplicity import FeedForward, hookimpl

class Sick(FeedForward):
    '''Not a number on rank 1.'''
    name = "sick"

    def __init__(self, config, site):
        super().__init__()

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        return x_BTD * float("nan") if os.environ["RANK"] == "1" and self.training else x_BTD

@hookimpl
def tryplicity_layers():
    return [Sick]
"""


def refused(world, plugin, *arguments):
    from tryplicity.errors import Refused

    try:
        training(world, *arguments, plugins=(plugin,))
    except Refused as error:
        return str(error)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_no_number_on_one_rank_ends_all_and_says_where(uneven, tmp_path, strategy):
    plugin = tmp_path / "sick.py"
    plugin.write_text(SICK)
    said, same = together(2, refused, str(plugin), str(uneven), str(tmp_path / "cache"), str(tmp_path / "run"), SMALL,
                          ["layers=[attention]", "blocks.attention.feed_forward=sick", "hardware.count=2",
                           "training.bad_steps=2", f"hardware.strategy={strategy}"], 5)
    assert said == same and "not a number 2 steps in a row" in said and "(rank 1: the document" in said
    assert "rank 0" not in said
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def begun(world, start, *arguments):
    from tryplicity.training import starting

    return training(world, *arguments, start=starting.opened(Path(start)))


def test_two_ranks_that_begin_from_trained_weights_train_as_one_does(uneven, tmp_path):
    """The dense feed-forwards become experts, and the linears ternary, on every rank alike; the scores before the
    first step and after the last one are in the lines that are compared."""
    dense = ["layers=[attention, attention]", "heads=[]", "blocks.attention.feed_forward={type: gated_mlp, "
             "inner_size: 16}", "hardware.strategy=single"]
    moe = ["layers=[attention, attention]", "heads=[]", "hardware.accumulation=2", "training.checkpoint_every=2",
           "linear={type: bitlinear, fade_steps: 3}"]
    together(1, training, str(uneven), str(tmp_path / "cache"), str(tmp_path / "dense"), SMALL, dense, 2,
             limit=600)
    found = []
    for size, strategy, more in ((1, "{type: single, exact: true}", []),
                                 (2, "{type: ddp, exact: true}", ["hardware.count=2", "hardware.accumulation=1"])):
        found.append(together(size, begun, str(tmp_path / "dense"), str(uneven), str(tmp_path / "cache"),
                              str(tmp_path / f"of{size}"), SMALL, [*moe, *more, f"hardware.strategy={strategy}"], 4,
                              limit=600)[0])
    compare(found[1], found[0])
    lines, weights = found[0]
    assert "validation_bits_per_byte_after" in lines[-1] and lines[0]["step"] == 0
    assert all(tensor == 1 for name, tensor in weights.items() if name.endswith(".fade"))
    assert '"converted": {"layers.*' in (tmp_path / "of2" / "from.json").read_text().replace("\n", "").replace("  ", "")
