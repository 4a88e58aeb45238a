"""`tryplicity doctor`: what is here, which way the layers go, and that a way which is wrong does not pass."""

import json
from pathlib import Path

import pytest
import torch

from tests.command_line import call

SMALL = str(Path(__file__).parent / "small.yaml")
FORGETFUL = '''
from dataclasses import dataclass

import torch

from tryplicity import Mixer, State, hookimpl


class Forgetful(Mixer):
    """The mean of all tokens so far: of other documents too, and token by token of the last one alone."""

    name = "forgetful"

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config, site):
        super().__init__()
        self.out = site.linear(site.hidden_size, site.hidden_size)

    def new_state(self, batch, *, device=None, dtype=None):
        return State(none=torch.zeros(batch))

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        number_T1 = torch.arange(1, x_BTD.shape[1] + 1, device=x_BTD.device)[:, None]
        return self.out(x_BTD.cumsum(1) / number_T1)


@hookimpl
def tryplicity_layers():
    return [Forgetful]
'''


def test_a_machine_on_which_all_is_well(capfd):
    code, out, err = call(capfd, "doctor", SMALL, "--set", "linear=bitlinear", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["healthy"] is True
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["own_c"]
    told = {(path["part"], tuple(path["layers"])): path["path"] for path in found["paths"]}
    assert "chunks of 16" in told["mixer mamba2", (0, 2)] and ("mixer gqa", (1,)) in told
    tried = {(trial["what"], tuple(trial["layers"])) for trial in found["trials"]}
    whats = ("training, packed documents", "decoding with its state", "decoding, packed weights", "grouped products")
    assert tried == {(what, layers) for what in whats for layers in ((0, 2), (1,))}
    assert all(trial["ok"] and trial["seconds"] >= 0 and trial["said"] for trial in found["trials"])


def test_options_of_published_models_are_well(capfd):
    mixer = ("{type: gqa, heads: 4, head_dim: 8, window: 16, softcap: 5.0, bias: true, out_bias: true, out_norm: true, "
             "qk_norm: true, qk_norm_over: width, rotary_fraction: 0.5}")
    code, out, _ = call(capfd, "doctor", SMALL, "--json", "--set", "linear=bitlinear", "--set", "norms=around",
                        "--set", f"layers=[{{mixer: {mixer}}}, {{feed_forward: {{type: mlp, bias: true}}}}]")
    trials = json.loads(out)["trials"]
    assert code == 0 and len(trials) == 6 and all(trial["ok"] for trial in trials)


def test_what_is_wrong_is_found_and_is_the_answer(capfd, tmp_path):
    plugin = tmp_path / "forgetful.py"
    plugin.write_text(FORGETFUL)
    settings = ["--set", "layers=[{mixer: forgetful}, memory]", "--plugin", str(plugin)]
    code, out, _ = call(capfd, "doctor", SMALL, "--json", *settings)
    wrong = {(trial["what"], tuple(trial["layers"])) for trial in json.loads(out)["trials"] if not trial["ok"]}
    assert code == 1 and wrong == {("training, packed documents", (0,)), ("decoding with its state", (0,))}
    code, out, _ = call(capfd, "doctor", SMALL, *settings)
    assert code == 1 and out.count("WRONG") == 2 and "mixer mamba2" in out


def test_a_layer_that_fails_when_tried_is_an_answer_too(capfd, tmp_path):
    plugin = tmp_path / "forgetful.py"
    plugin.write_text(FORGETFUL.replace("x_BTD.cumsum(1) / number_T1", "x_BTD @ x_BTD"))
    code, out, _ = call(capfd, "doctor", SMALL, "--json", "--plugin", str(plugin), "--set",
                        "layers=[{mixer: forgetful}]")
    trials = {trial["what"]: trial for trial in json.loads(out)["trials"]}
    assert code == 1 and not trials["training, packed documents"]["ok"]
    assert trials["training, packed documents"]["said"].startswith("RuntimeError: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no such device")
def test_a_profile_of_devices_that_are_not_here(capfd):
    code, out, err = call(capfd, "doctor", SMALL, "--hw", "h100")
    assert (code, out) == (2, "") and err.startswith("error: h100 is of cuda devices") and err.count("\n") == 1


def test_versions_that_are_known_to_be_wrong(monkeypatch):
    from tryplicity import doctor

    def known(torch_version, capability):
        monkeypatch.setattr(doctor, "_version", lambda package: {"torch": torch_version}.get(package, (3, 6)))
        monkeypatch.setattr(doctor, "_capability", lambda: capability)
        return [name for name, is_here, _ in doctor.KNOWN_WRONG if is_here()]

    assert known((2, 11, 0), (9, 0)) == ["torch before 2.12", "triton 3.4 to 3.7.0 on Hopper"]
    assert known((2, 13, 0), (8, 0)) == ["grouped products outside of sm_90 and sm_100"]
    assert known((2, 13, 0), (10, 3)) == ["grouped products on sm_103"]
    assert known((2, 13, 0), (10, 0)) == known((2, 13, 0), None) == []
