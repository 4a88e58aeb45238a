"""From the YAML and the profile through the session to the step: what a user writes is what is done. The truth is a
training written out in `plain`, a formula, or what a layer of the user's own sees."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.plain import plain_step, rate, steps_of
from tryplicity import load_plugins
from tryplicity.model import assemble, initialise

STEPS, PEAK, WARMUP, DECAY, FLOOR = 6, 2e-3, 2, 0.5, 0.1
BETAS = {"beta1": 0.6, "beta2": 0.97, "eps": 1e-6}
SETTINGS = [f"training.optimizer={{type: adamw, learning_rate: {PEAK}, beta1: 0.6, beta2: 0.97, epsilon: 1.0e-6, "
            "weight_decay: 2.0}",
            f"training.schedule={{type: wsd, warmup_steps: {WARMUP}, decay: {DECAY}, floor: {FLOOR}}}",
            "training.gradient_clip=0.7", "heads=[{type: multi_token_prediction, tokens: 2, weight: 0.3}]",
            "layers=[memory, attention]", "hardware.accumulation=2"]


def test_a_training_is_the_one_its_spec_describes(go, make_spec, prepared):
    """Weights, buffers, losses, learning rates: all as a plain loop has them. What that catches: statistics that no
    module hears of, heads weighted otherwise, betas exchanged, decay of nothing or of everything, another schedule,
    clipping, rows seen twice or never."""
    run = go("run", SETTINGS, steps=STEPS)
    spec = make_spec(*SETTINGS[:-1])
    model, states, stream = initialise(assemble(spec), "cpu", 0), {}, prepared.stream(seed=0)
    begun = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    for step, line in enumerate(steps_of(run)):
        lr = rate(step, STEPS, peak=PEAK, warmup=WARMUP, decay=DECAY, floor=FLOOR)
        said = plain_step(model, stream.batch(step * 4 * 48, 4, 48), states, step=step, parts=2, clip=0.7,
                          head_weight=0.3, lr=lr, decay=2.0, **BETAS)
        assert line["learning_rate"] == pytest.approx(lr, rel=1e-6), step
        assert line["loss"] == pytest.approx(said["next_token"], rel=1e-4), step
        for name in ("multi_token_prediction", "balance_loss", "gradient_norm"):
            assert line[name] == pytest.approx(said[name], rel=2e-3), (step, name)
        assert line["total_loss"] == pytest.approx(
            line["loss"] + 0.3 * line["multi_token_prediction"] +
            sum(value for name, value in line.items() if name.endswith("_loss") and name != "total_loss"), rel=1e-5)
    trained = load_file(run.weights)
    assert trained.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        moved = (tensor.double() - begun[name].double()).norm()
        astray = (trained[name].double() - tensor.double()).norm()
        assert astray <= 0.01 * moved + 1e-7, (name, float(astray), float(moved))
    adapted = [name for name in begun if not torch.equal(begun[name], trained[name])]
    # the first statistics reach them, not the optimizer
    for kind in ("router.bias", "router.use_E", "similarity_EE", "activation.offset"):
        assert any(name.endswith(kind) for name in adapted), kind


PROBE = """
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tryplicity import FeedForward, hookimpl

class Probe(FeedForward):
    '''A linear layer that writes down what it sees.'''
    name = "probe"

    @dataclass(frozen=True)
    class Config:
        file: str = ""
        '''where to'''

    def __init__(self, config, site):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(site.hidden_size, site.hidden_size)

    def reset_parameters(self):
        self.linear.reset_parameters()

    def forward(self, x, *, state=None, doc_ids=None):
        y = self.linear(x)
        if not x.is_meta and type(x) is torch.Tensor:
            with open(self.config.file, "a") as file:
                file.write(json.dumps({{"rows": len(x), "length": x.shape[1], "dtype": str(y.dtype),
                                       "training": self.training}}) + "\\n")
        return y

@hookimpl
def tryplicity_layers():
    return [Probe]
"""


@pytest.fixture
def probe(tmp_path):
    """Plugins with the layer, the setting that puts it in, and a function that gives what it saw."""
    (tmp_path / "probe.py").write_text(PROBE.format())
    log = tmp_path / "seen"

    def seen(training=True):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        return [line for line in lines if line["training"] == training]

    setting = f"blocks.attention.feed_forward={{type: probe, file: '{log}'}}"
    return load_plugins((str(tmp_path / "probe.py"),)), setting, seen


def test_a_layer_sees_as_many_rows_as_the_profile_says_whatever_their_length(go, probe):
    plugins, setting, seen = probe
    short = "brain=[{type: neuro_curriculum, stages: [{name: a, share: 0.5, context: 0.5}, {name: b, share: 0.5}]}]"
    go("run", [setting, "hardware.accumulation=3", short], steps=2, plugins=plugins)
    assert [(one["rows"], one["length"]) for one in seen()] == [(4, 24)] * 3 + [(2, 48)] * 3
    go("one", [setting, "hardware.batch=5"], steps=1, plugins=plugins)
    assert [(one["rows"], one["length"]) for one in seen()] == [(5, 48)]


def test_the_profiles_precision_is_that_of_the_products(go, probe):
    plugins, setting, seen = probe
    runs = {}
    for precision, dtype in (("bf16", "torch.bfloat16"), ("fp32", "torch.float32")):
        runs[precision] = go(precision, [setting], steps=2, plugins=plugins, hardware={"precision": precision})
        seen_there = [json.loads(line) for line in (runs[precision].folder.parent / "seen").read_text().splitlines()]
        assert {one["dtype"] for one in seen_there if one["training"]} == {dtype}, precision
        assert {one["dtype"] for one in seen(training=False)} == {dtype}, f"scoring in {precision}"
        weights = load_file(runs[precision].weights)
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    bf16, fp32 = (steps_of(runs[precision])[0]["loss"] for precision in ("bf16", "fp32"))
    assert 0 < abs(bf16 - fp32) < 0.03  # eight bits of mantissa, on a loss of about 5.7


def test_activation_checkpointing_is_as_the_profile_says(go):
    """The bytes that the forward pass keeps for the backward pass, by torch's own hook."""
    kept = {}
    for on in (True, False):
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run = go(f"run-{on}", ["heads=[]"], steps=1, hardware={"activation_checkpointing": on})
        kept[on] = sum(sizes)
        kept[on, "loss"] = steps_of(run)[0]["loss"]
    assert kept[True] < 0.7 * kept[False] and kept[True, "loss"] == kept[False, "loss"]
