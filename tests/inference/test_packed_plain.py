"""A model of plain linears that are kept in int8 or bf16: exported so, or packed when a run is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import call
from tests.inference.conftest import run_of
from tryplicity.components import Linear
from tryplicity.errors import Refused
from tryplicity.inference.engine import Engine, Request
from tryplicity.inference.exported import export
from tryplicity.inference.packed import load_model
from tryplicity.inference.sampler import Sampling
from tryplicity.spec import load_spec

SMALL = Path(__file__).parents[1] / "small.yaml"


@pytest.fixture(scope="module")
def trained(registry, prepared, tmp_path_factory):
    """(run, model) of tests/small.yaml with plain linears."""
    spec = load_spec(str(SMALL), registry, ["linear=linear"])
    return run_of(spec, tmp_path_factory.mktemp("runs") / "plain", prepared.tokenizer_path)


@pytest.fixture
def ids():
    return torch.randint(6, 300, (2, 70), generator=torch.Generator().manual_seed(1))


def rounded(weight, form):
    if form == "bf16":
        return weight.bfloat16().float()
    step = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / step).round() * step


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_the_logits_of_the_weights_rounded_by_hand(trained, registry, ids, tmp_path, form):
    run, _ = trained
    model = load_model(run.folder, registry)[0]
    for module in model.modules():
        if isinstance(module, Linear) or module is model.embedding:
            module.weight.copy_(rounded(module.weight, form))
    wanted = model(ids)
    export(run.folder, registry, tmp_path / "m.safetensors", form, linear=form)
    packed, _, _, info = load_model(tmp_path / "m.safetensors", registry)
    at_once, _, _, told = load_model(run.folder, registry, weights=form)
    assert info.format == told.format == f"{form}, tables in {form}" and info.packed_bytes == told.packed_bytes
    assert all(module.weight is None for module in packed.modules() if isinstance(module, Linear))
    assert (packed(ids) - wanted).norm() / wanted.norm() < 1e-2  # the file has other matrices in bf16
    assert (at_once(ids) - wanted).norm() / wanted.norm() < 1e-5


def test_bytes_of_the_file_by_hand(trained, registry, tmp_path):
    run, model = trained
    sizes = export(run.folder, registry, tmp_path / "m.safetensors", "int8", linear="int8")
    stored = load_file(tmp_path / "m.safetensors")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)
               and not name.startswith("heads.")}
    assert sizes.packed_weights >= sum(module.weight.numel() for module in linears.values())
    for name, module in linears.items():
        rows, scale = stored[f"{name}.weight_rows"], stored[f"{name}.weight_scale"]
        assert rows.dtype == torch.int8 and rows.shape == module.weight.shape and f"{name}.weight" not in stored
        torch.testing.assert_close(rows * scale[..., None], rounded(module.weight.detach(), "int8"))
    assert sizes.packed_as == "int8" and sizes.path.stat().st_size == sizes.file_bytes


@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_the_engine_writes_the_same_in_any_company(trained, registry, form, plain):
    run, _ = trained
    engine = Engine.load(run.folder, registry, weights=form)
    try:
        assert engine.card.exact, engine.card.inexact
        for length in (3, 30):
            request = Request(tuple(range(10, 10 + length)), Sampling(temperature=0), 12, end_tokens=frozenset())
            answer = [token.id for piece in engine.generate(request) for token in piece.tokens]
            assert answer == list(plain(engine.model, request))
    finally:
        engine.close()


def test_commands(trained, tmp_path, capfd):
    run, _ = trained
    out = tmp_path / "m.safetensors"
    code, said, _ = call(capfd, "export", str(run.folder), "--linear", "int8", "--rest", "int8", "--out", str(out),
                         "--json")
    assert code == 0 and json.loads(said)["format"] == "int8"
    texts = [call(capfd, "generate", str(what), "a list", "--max-tokens", "8", "--temperature", "0", *more)[1]
             for what, more in ((out, ()), (out, ("--weights", "int8")), (run.folder, ("--weights", "bf16")))]
    assert texts[0] == texts[1] and all(text.startswith("a list") for text in texts)
    code, _, told = call(capfd, "export", str(run.folder))
    assert code == 1 and "give --linear bf16 or int8" in told
    code, _, told = call(capfd, "export", str(run.folder), "--linear", "int3")
    assert code == 1 and "no linear of this spec packs as int3; they can as bf16 or int8" in told


def test_what_cannot_be_asked_so_is_said(registry, prepared, tmp_path):
    spec = load_spec(str(SMALL), registry, ["linear=bitlinear"])
    run, _ = run_of(spec, tmp_path / "ternary", prepared.tokenizer_path)
    with pytest.raises(Refused, match="no linear of this spec packs as int8; leave --linear out"):
        export(run.folder, registry, linear="int8")
