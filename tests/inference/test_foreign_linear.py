"""A packable linear of a stranger's: exported, loaded, decoded and counted, by what `Linear` asks of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.inference.conftest import run_of
from tryplicity import PluginFault, load_plugins
from tryplicity.errors import UserError
from tryplicity.inference.engine import Engine, Request
from tryplicity.inference.exported import export
from tryplicity.inference.packed import load_model
from tryplicity.inference.sampler import Sampling
from tryplicity.spec import load_spec

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def strangers():
    return load_plugins((str(HERE / "plugins" / "affine_plugin.py"),)).registry


@pytest.fixture(scope="module")
def trained(strangers, prepared, tmp_path_factory):
    """(run, model): a run folder with weights away from their initial values, and its model as training has it. An odd
    number of columns everywhere but in the experts."""
    settings = ["linear=affine4", "hidden_size=34", "blocks.attention.mixer.head_dim=6",
                "blocks.memory.mixer.head_dim=17"]
    spec = load_spec(str(HERE / "small.yaml"), strangers, settings)
    return run_of(spec, tmp_path_factory.mktemp("runs") / "affine", prepared.tokenizer_path)


def of_this_linear(model):
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "Affine4"}


@torch.no_grad()
def test_it_is_packed_loaded_and_decoded_as_it_was_trained(trained, strangers, tmp_path, plain):
    run, model = trained
    ids_BT = torch.randint(6, 300, (2, 30), generator=torch.Generator().manual_seed(1))
    wanted = model(ids_BT)
    sizes = export(run.folder, strangers, rest="fp32")
    assert sizes.path == run.folder / "model-affine4.safetensors" and sizes.packed_as == "affine4"
    for source in (run.folder, sizes.path):
        loaded, _, tokenizer, info = load_model(source, strangers)
        torch.testing.assert_close(loaded(ids_BT), wanted, rtol=1e-4, atol=1e-5)
        assert info.format == "affine4, tables in fp32"
        assert of_this_linear(loaded) and all(module.weight is None for module in of_this_linear(loaded).values())
        # by one token at a time, which reads single experts, as by all at once
        state = loaded.new_state(2)
        steps = [loaded(own, state=state) for own in ids_BT.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-3, atol=1e-4)
        engine = Engine(loaded, tokenizer, info)
        request = Request(tuple(ids_BT[0].tolist()), Sampling(temperature=0), 10, end_tokens=frozenset())
        answer = [token.id for piece in engine.generate(request) for token in piece.tokens]
        engine.close()
        assert answer == list(plain(loaded, request)) == list(plain(model, request))


def test_bytes_by_hand(trained, strangers, tmp_path):
    """Half a byte a weight, and six bytes a row."""
    run, model = trained
    sizes = export(run.folder, strangers, tmp_path / "m.safetensors")
    stored, expected, weights = load_file(tmp_path / "m.safetensors"), 0, 0
    for name, module in of_this_linear(model).items():
        rows = module.weight.shape[:-1].numel()
        expected += rows * (-(-module.in_features // 2) + 6)
        weights += module.weight.numel()
        assert f"{name}.weight" not in stored and f"{name}.gain" in stored
        assert stored[f"{name}.step"].dtype == torch.float16
    assert (sizes.packed_bytes, sizes.packed_weights) == (expected, weights)
    loaded = load_model(tmp_path / "m.safetensors", strangers)[0]
    assert sum(module.packed_nbytes() for module in of_this_linear(loaded).values()) == expected
    assert load_model(run.folder, strangers)[-1].packed_bytes == expected + 4 * sum(
        p.numel() for p in model.parameters()) - 4 * weights


def test_a_file_of_other_sizes_is_refused_before_it_is_taken(trained, strangers, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    run, _ = trained
    export(run.folder, strangers, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    stored = load_file(tmp_path / "m.safetensors")
    name = next(name for name in stored if name.endswith(".step"))
    for wrong, said in ((stored[name][..., :-1, :], "belong to another spec"), (stored[name].float(), "float32")):
        save_file({**stored, name: wrong.contiguous()}, tmp_path / "w.safetensors", metadata)
        with pytest.raises(UserError, match=said):
            load_model(tmp_path / "w.safetensors", strangers)


def test_one_that_packs_to_something_else_than_it_says_is_named(trained, strangers, tmp_path, monkeypatch):
    run, _ = trained
    affine = strangers.get("linear", "affine4")
    honest = affine.pack
    monkeypatch.setattr(affine, "pack", lambda self: honest(self) | {"step": honest(self)["step"].float()})
    for do in (lambda: export(run.folder, strangers, tmp_path / "m"), lambda: load_model(run.folder, strangers)):
        with pytest.raises(PluginFault, match=r"linear affine4, .*affine_plugin.py\): pack gave .*float32.*float16"):
            do()
    assert not (tmp_path / "m").exists()
