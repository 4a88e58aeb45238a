"""Random models of published architectures: imported, they give transformers' logits and texts; exported, its files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.exchange.models import ONLINE, configs, save
from tryplicity import load_plugins
from tryplicity.exchange.exporting import export_transformers
from tryplicity.exchange.importing import import_model
from tryplicity.inference.engine import Engine
from tryplicity.inference.sampler import Sampling

REGISTRY = load_plugins().registry
PROMPT = [259, *range(40, 80, 3), 258, 7, 256, 300]


@pytest.fixture(scope="module", params=list(configs()))
def both(request, tmp_path_factory):
    """(transformers' model, the folder it was saved in, the run it was imported into)"""
    folder = tmp_path_factory.mktemp(request.param)
    online = ONLINE if request.param.endswith("ternary") else None
    theirs = save(configs()[request.param], folder / "there", quantization=online)
    import_model(folder / "there", folder / "run", REGISTRY)
    return theirs, folder / "there", folder / "run"


def test_logits_and_greedy_text_are_transformers_own(both):
    theirs, _, run = both
    engine = Engine.load(run, REGISTRY)
    ids_BT = torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.no_grad():
        ours_BTV, theirs_BTV = engine.model(ids_BT), theirs(ids_BT).logits
    assert theirs_BTV.std() > 0.1  # else anything would be near
    torch.testing.assert_close(ours_BTV, theirs_BTV, rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        due = theirs.generate(ids_BT[:1], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = list(engine.tokens(PROMPT, Sampling(temperature=0, repetition_penalty=1.0), 64))
    due = due[0, len(PROMPT):].tolist()
    assert written == due[:due.index(260)] if 260 in due else written == due
    engine.close()


def test_exported_it_is_the_same_file_and_loads_there(both, tmp_path):
    theirs, there, run = both
    export_transformers(run, tmp_path / "back", REGISTRY)
    with safe_open(there / "model.safetensors", "pt") as due, safe_open(tmp_path / "back" / "model.safetensors",
                                                                        "pt") as found:
        assert sorted(found.keys()) == sorted(due.keys())
        for name in due.keys():  # noqa: SIM118 (no mapping)
            assert found.get_tensor(name).dtype == due.get_tensor(name).dtype
            assert torch.equal(found.get_tensor(name), due.get_tensor(name)), name
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((there / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([PROMPT])).logits, theirs(torch.tensor([PROMPT])).logits)
