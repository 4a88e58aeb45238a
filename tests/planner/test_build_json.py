"""What `tryplicity build --json` prints of the parts that no other figure would give away, computed by hand."""

import json

import pytest
from planning_tools import DENSE, HYBRID

from tryplicity.cli import main

PLUGIN = '''
import torch
from torch import nn
from tryplicity import Mixer, hookimpl


class Doubled(Mixer):
    """A product, and twice a kernel that torch's counter cannot see."""

    name = "doubled"

    def __init__(self, config, site):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(site.hidden_size, site.hidden_size))

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def extra_flops(self, tokens):
        return 1000 * tokens

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        return x_BTD @ self.weight


@hookimpl
def tryplicity_layers():
    return [Doubled]
'''


@pytest.fixture
def built(tmp_path, capfd):
    plugin = tmp_path / "doubled.py"
    plugin.write_text(PLUGIN)

    def build(text, *settings):
        (tmp_path / "spec.yaml").write_text(text)
        options = [part for setting in ("hardware.batch=4", *settings) for part in ("--set", setting)]
        with pytest.raises(SystemExit) as end:
            main(["build", str(tmp_path / "spec.yaml"), "--hw", "cpu", "--json", "--plugin", str(plugin), *options],
                 prog_name="tryplicity")
        assert not end.value.code
        return json.loads(capfd.readouterr().out)

    return build


#: a mixer without buffers of its own
BARE = ("blocks={b: {mixer: doubled}}", "layers=[b, b]")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("further", [0, 1, 2])
def test_the_batch_is_held_whole(built, further, accumulation):
    """A step holds three whole numbers of 8 bytes for each token of all its micro-batches (itself, its document, the
    next), one for each further token that a head predicts, and its loss in fp32."""
    B, T = 4, 128
    head = f"heads=[{{type: multi_token_prediction, tokens: {further + 1}, inner_size: 64}}]" if further else "heads=[]"
    parts = built(DENSE, f"hardware.accumulation={accumulation}", head, *BARE)["memory"]["parts"]
    assert parts["buffers"] * 1e9 == pytest.approx(B * accumulation * T * (8 * (3 + further) + 4), abs=0.5)


def test_a_model_s_own_buffers_are_held_beside_it(built):
    """Two mixtures of 8 experts, each with a bias and a use in fp32 for each expert."""
    parts = built(HYBRID, "heads=[]", "layers=[memory, memory]")["memory"]["parts"]
    assert parts["buffers"] * 1e9 == pytest.approx(4 * 256 * 28 + 2 * 2 * 8 * 4, abs=0.5)


@pytest.mark.parametrize(("checkpointing", "passes"), [("false", 3), ("true", 4)])
def test_the_flops_of_a_kernel_that_nobody_sees(built, checkpointing, passes):
    """Forward once, backward twice, and forward again where activations are computed anew."""
    said = built(DENSE, *BARE, f"hardware.activation_checkpointing={checkpointing}")["throughput"]
    D, V, layers = 64, 512, 2
    norms = (layers + 1) * 2 * D  # the gradients of their weights are products too
    assert said["flops_per_token"] == layers * passes * (2 * D * D + 1000) + norms + 3 * 2 * D * V
