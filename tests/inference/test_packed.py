"""A model packed into one file is the model it was made of."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.inference.conftest import run_of
from tests.registries import unshared
from tryplicity.components import Activation
from tryplicity.errors import Refused, UserError
from tryplicity.inference.exported import export
from tryplicity.inference.packed import load_model
from tryplicity.inference.prefix import tensors
from tryplicity.model import assemble
from tryplicity.spec import load_spec
from tryplicity.training.checkpoint import load_weights


@pytest.fixture(scope="module")
def make_run(registry, prepared, tmp_path_factory):
    """A run folder of tests/small.yaml with weights away from their initial values."""
    from pathlib import Path

    def make(*settings, registry=registry):
        spec = load_spec(str(Path(__file__).parent.parent / "small.yaml"), registry, settings)
        run, _ = run_of(spec, tmp_path_factory.mktemp("runs") / "small", prepared.tokenizer_path)
        return run

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run("linear=bitlinear")


@pytest.fixture
def ids():
    return torch.randint(6, 300, (2, 30), generator=torch.Generator().manual_seed(1))


def trained_model(run, registry):
    """The model as training has it: nothing packed, nothing kept."""
    model = assemble(load_spec(str(run.spec), registry)).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    load_weights(model, run.weights)
    return model.eval()


def relative(found, wanted):
    """The error of logits as a share of their size."""
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def test_packed_logits_are_the_unpacked_ones(run, registry, ids, tmp_path):
    wanted = trained_model(run, registry)(ids)
    assert relative(load_model(run.folder, registry)[0](ids), wanted) < 1e-3
    export(run.folder, registry, tmp_path / "m.safetensors", "fp32")
    assert relative(load_model(tmp_path / "m.safetensors", registry)[0](ids), wanted) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rest", ["bf16", "int8"])
def test_the_rest_in_fewer_bits_is_that_rounding_and_nothing_else(run, registry, ids, tmp_path, rest):
    """The same logits as the trained model whose tensors outside of BitLinear were rounded by hand."""
    model = trained_model(run, registry)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or (type(module).__name__ == "BitLinear" and name == "weight"):
                continue
            if rest == "int8" and module is model.embedding:
                step_V1 = parameter.abs().amax(1, keepdim=True) / 127
                parameter.copy_((parameter / step_V1).round() * step_V1)
            else:
                parameter.copy_(parameter.bfloat16().float())
    sizes = export(run.folder, registry, tmp_path / "m.safetensors", rest)
    packed, spec, tokenizer, info = load_model(tmp_path / "m.safetensors", registry)
    assert relative(packed(ids), model(ids)) < 1e-3
    assert tokenizer.get_vocab_size() == spec.vocab_size == 300
    assert info.format == f"ternary, tables in {rest}"
    assert sizes.file_bytes == (tmp_path / "m.safetensors").stat().st_size


def test_bytes_of_the_file_by_hand(run, registry, tmp_path):
    """Five digits a byte in every row of every matrix, and four bytes for each matrix' scale."""
    export(run.folder, registry, tmp_path / "m.safetensors")
    trained, stored = load_file(run.weights), load_file(tmp_path / "m.safetensors")
    packed = {name.removesuffix("_ternary") for name in stored if name.endswith("weight_ternary")}
    assert len(packed) > 10
    for name in packed:
        *stack, rows, columns = trained[name].shape
        assert stored[f"{name}_ternary"].shape == (*stack, rows, -(-columns // 5))
        assert stored[f"{name}_ternary"].dtype == torch.uint8
        mean = trained[name].abs().mean((-2, -1), keepdim=True)
        torch.testing.assert_close(stored[f"{name}_scale"], mean)
        # the digits by hand: byte = sum of (digit + 1) * 3^i
        digits = (trained[name] / mean).round().clamp(-1, 1)
        first = stored[f"{name}_ternary"].flatten(0, -2)[0, 0].item()
        ours = [int(d) + 1 for d in digits.flatten(0, -2)[0, :5]]
        assert first in (sum(d * 3**i for i, d in enumerate(ours)), sum(d * 3 ** (4 - i) for i, d in enumerate(ours)))
    assert not [name for name in stored if name in packed]
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert load_spec(str(run.spec), registry).as_yaml() == file.metadata()["spec"]


def test_a_loaded_model_holds_two_bits_a_weight_and_no_floats_of_them(run, registry, tmp_path):
    export(run.folder, registry, tmp_path / "m.safetensors")
    for source in (run.folder, tmp_path / "m.safetensors"):
        model = load_model(source, registry)[0]
        linears = [m for m in model.modules() if type(m).__name__ == "BitLinear"]
        assert linears and all(m.weight is None for m in linears)
        for linear in linears:
            rows, columns = (-(-linear.out_features // 4) * 4, -(-linear.in_features // 128) * 128)
            assert linear.matrix.planes.numel() == (linear.experts or 1) * rows * columns // 4


def test_initial_weights_are_packed_the_same_every_time(registry, tmp_path, ids):
    from pathlib import Path

    text = (Path(__file__).parent.parent / "small.yaml").read_text()
    spec = tmp_path / "s.yaml"
    spec.write_text(text + "linear: bitlinear\n")
    for name in "ab":
        export(spec, registry, tmp_path / name, initialised=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    model, _, tokenizer, _ = load_model(tmp_path / "a", registry)
    assert tokenizer is None
    with torch.no_grad():
        logits = model(ids)
    assert logits.isfinite().all() and logits.std() > 0


@torch.no_grad()
@pytest.mark.parametrize("rest", ["bf16", "int8"])
def test_a_state_is_fp32_whatever_the_tables_are(run, registry, ids, tmp_path, rest):
    """Thousands of steps are summed in it."""
    export(run.folder, registry, tmp_path / "m.safetensors", rest)
    model = load_model(tmp_path / "m.safetensors", registry)[0]
    assert model.embedding.weight.dtype == {"bf16": torch.bfloat16, "int8": torch.int8}[rest]
    state = model.new_state(1)
    model(ids[:1], state=state)
    kept = [tensor for tensor in tensors(state) if tensor.is_floating_point()]
    assert kept and {tensor.dtype for tensor in kept} == {torch.float32}


class Counting(Activation):
    """One with a buffer of a dtype of its own."""

    name = "test_counting"
    dtype = torch.int32

    def __init__(self, config, features, groups=None):
        super().__init__()
        self.register_buffer("counts", torch.empty(3, dtype=self.dtype))

    def reset_parameters(self):
        self.counts.copy_(torch.tensor([1, 2, 3]))

    def forward(self, x, group=None):
        return x.relu()


def test_a_buffer_of_any_dtype_is_in_the_file_or_refused(make_run, tmp_path, monkeypatch):
    registry = unshared()
    registry.add(Counting, "plugin stranger")
    settings = ("linear=bitlinear", "blocks.attention.feed_forward.activation=test_counting")
    run = make_run(*settings, registry=registry)
    export(run.folder, registry, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors", registry)[0]
    counts = [module.counts for module in model.modules() if isinstance(module, Counting)]
    assert counts and all(own.tolist() == [1, 2, 3] and own.dtype == torch.int32 for own in counts)
    monkeypatch.setattr(Counting, "dtype", torch.complex64)
    with pytest.raises(Refused, match=r"counts is torch.complex64"):
        export(make_run(*settings, registry=registry).folder, registry, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_packed_rows_that_are_not_the_specs_are_refused(make_packed):
    """C would read past the end of what another part of the model made."""
    model = make_packed()
    for module in [module for module in model.modules() if type(module).__name__ == "BitLinear"]:
        rows = torch.zeros(*((module.experts,) if module.experts else ()), module.out_features - 1,
                           -(-module.in_features // 5), dtype=torch.uint8)
        with pytest.raises(UserError, match="another model's file"):
            module.adopt({"weight_ternary": rows, "weight_scale": torch.ones(module.experts or 1)})


def test_a_disk_that_is_full_is_told_with_the_files_name(run, registry, tmp_path, monkeypatch):
    from tryplicity.inference import exported

    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exported._Writer, "add", full)
    with pytest.raises(UserError, match=r"m.safetensors: cannot be written \(No space left"):
        export(run.folder, registry, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_export_that_ends_early_leaves_nothing(run, registry, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run.folder, registry, tmp_path / "m.safetensors", progress=stop)
    assert not list(tmp_path.iterdir())


def test_refusals_say_what_to_do(make_run, run, registry, tmp_path):
    plain = make_run()
    with pytest.raises(Refused, match="no linear of this spec can be packed"):
        export(plain.folder, registry, tmp_path / "m")
    info = load_model(plain.folder, registry)[-1]
    assert info.format == "fp32"
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(tmp_path / "text", registry)
    with pytest.raises(UserError, match="not a model that `tryplicity export` wrote"):
        load_model(run.weights, registry)
    with pytest.raises(UserError, match="no such run folder"):
        load_model(tmp_path / "nothing", registry)
    other = tmp_path / "other"
    shutil.copytree(run.folder, other)
    shutil.copy(plain.weights, other / "model.safetensors")
    (other / "spec.yaml").write_text((other / "spec.yaml").read_text().replace("inner_size: 16", "inner_size: 24"))
    with pytest.raises(UserError, match="belong to another spec"):
        load_model(other, registry)
    whole = tmp_path / "whole"
    export(run.folder, registry, whole)
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(tmp_path / "cut", registry)


def test_the_command_prints_sizes(run):
    from click.testing import CliRunner

    from tryplicity.cli import main

    done = CliRunner().invoke(main, ["export", str(run.folder), "--json"], standalone_mode=False)
    said = json.loads(done.stdout)
    assert said["file_bytes"] == (run.folder / "model-ternary.safetensors").stat().st_size
    assert 8 < said["smaller_than_fp16"] < 10


def test_nothing_but_an_exported_model_is_written_over(run, registry, tmp_path):
    """Not the run's own files, least of all its weights; an earlier export is."""
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.name != "model-ternary.safetensors"]
    before = {path: path.read_bytes() for path in files}
    assert {run.weights, run.spec, run.tokenizer} <= before.keys()
    for path in files:
        with pytest.raises(UserError, match="another --out") as told:
            export(run.folder, registry, path)
        assert str(path) in str(told.value) and "\n" not in str(told.value)
    link = tmp_path / "link"
    link.symlink_to(run.weights)
    with pytest.raises(UserError, match="would destroy it"):
        export(run.folder, registry, link)
    assert {path: path.read_bytes() for path in files} == before
    out = tmp_path / "m"
    assert export(run.folder, registry, out).file_bytes == export(run.folder, registry, out).file_bytes
    packed_as_weights = tmp_path / "other"
    shutil.copytree(run.folder, packed_as_weights)
    shutil.copy(out, packed_as_weights / "model.safetensors")
    with pytest.raises(UserError, match="would destroy it"):
        export(packed_as_weights, registry, packed_as_weights / "model.safetensors")
