"""What an export says of its file is what the file holds; and what is loaded has the dtype that was asked for."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.inference.conftest import run_of
from tryplicity.components import Linear
from tryplicity.errors import UserError
from tryplicity.inference.exported import Sizes, export
from tryplicity.inference.packed import load_model, open_model
from tryplicity.model import assemble
from tryplicity.spec import load_spec

SMALL = str(Path(__file__).parents[1] / "small.yaml")


@pytest.fixture(scope="module")
def run(registry, prepared, tmp_path_factory):
    spec = load_spec(SMALL, registry, ["linear=bitlinear"])
    return run_of(spec, tmp_path_factory.mktemp("runs") / "small", prepared.tokenizer_path)[0]


def test_a_file_is_told_to_the_byte(run, registry, tmp_path):
    out, told = tmp_path / "m.safetensors", []
    sizes = export(run.folder, registry, out, progress=lambda done, total: told.append((done, total)))
    packing = {path: module for path, module in assemble(load_spec(str(run.spec), registry)).named_modules()
               if isinstance(module, Linear) and module.packed_like()}
    numbers = [module.weight.numel() for module in packing.values()]
    stored = load_file(out)
    packed = {f"{path}.{name}" for path, module in packing.items() for name in module.packed_like()}
    rest = {}
    for name in stored.keys() - packed:
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[stored[name].dtype]
        rest[kind] = rest.get(kind, 0) + stored[name].nbytes
    assert sizes == Sizes(out, "ternary", sum(numbers), sum(stored[name].nbytes for name in packed),
                          sum(rest.values()), out.stat().st_size, rest)
    assert set(rest) == {"F32", "BF16"} and len(numbers) > 10
    total = sum(tensor.numel() for tensor in assemble(load_spec(str(run.spec), registry)).state_dict().values())
    loose = total - sum(numbers)
    assert told == [(loose + sum(numbers[:n]), total) for n in range(1, len(numbers) + 1)]


def test_how_much_smaller_than_fp16():
    """Five digits of three values in a byte, where fp16 takes ten; nothing is smaller than nothing."""
    assert Sizes(Path("m"), packed_weights=5, packed_bytes=1).ratio == 10
    assert Sizes(Path("m"), packed_weights=1000, packed_bytes=500).ratio == 4
    assert Sizes(Path("m")).ratio == 0 and Sizes(Path("m")).rest == {}


def test_a_file_is_a_head_and_its_tensors_without_gaps_each_aligned(run, registry, tmp_path):
    """As https://huggingface.co/docs/safetensors has it; a width other than one's own is slow to map."""
    export(run.folder, registry, tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8:8 + size])
    places = sorted((*tensor["data_offsets"], tensor["dtype"]) for name, tensor in head.items() if name[0] != "_")
    assert size % 8 == 0 and places[0][0] == 0 and places[-1][1] == len(whole) - 8 - size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(places))
    assert all(begin % {"F32": 4, "BF16": 2, "U8": 1}[kind] == 0 for begin, _, kind in places)


@torch.no_grad()
@pytest.mark.parametrize("rest", ["run", "fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_the_table_is_of_the_dtype_that_was_asked_for(run, registry, tmp_path, rest, dtype):
    """Fp32 is what it comes to by default, and then a table lies in the file as it is, in however few bits."""
    what = run.folder
    if rest != "run":
        what = tmp_path / "m"
        export(run.folder, registry, what, rest)
    model, _, _, info = load_model(what, registry, dtype=dtype)
    held = {"bf16": torch.bfloat16, "int8": torch.int8}.get(rest, torch.float32)
    if dtype == torch.bfloat16 and held == torch.float32:
        held = torch.bfloat16
    assert model.embedding.weight.dtype == held
    assert info.format == f"ternary, tables in { {torch.float32: 'fp32', torch.int8: 'int8'}.get(held, 'bf16')}"
    x_BTD = model.embedding(torch.tensor([[6, 7]]))
    assert x_BTD.dtype == (dtype or torch.float32)
    matrices = {p.dtype for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name}
    assert (dtype or torch.float32) in matrices


def test_what_is_told_of_a_model_before_and_after_its_weights_are_read(run, registry):
    opened = open_model(run.folder, registry)
    before = opened.card
    model, spec, _, info = load_model(opened, registry)
    told = dataclasses.asdict(info)
    assert {name: told[name] for name in before} == before
    assert info.parameters == sum(p.numel() for p in assemble(spec).parameters())
    assert info.context_length == 48 and not info.chat
    assert info.layers == ("mamba2 + moe", "gqa + moe", "mamba2 + moe")
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert info.packed_bytes == held + sum(m.packed_nbytes() for m in model.modules() if isinstance(m, Linear))
    assert load_model(run.folder, registry, ternary=False)[3].packed_bytes == 4 * info.parameters


def foreign(text, which):
    """A tokenizer that looks much like ours, as JSON."""
    told = json.loads(text)
    if which == "special":
        for token in told["added_tokens"]:
            token["content"] = token["content"].replace("im_end", "im_over")
        told["model"]["vocab"] = {name.replace("im_end", "im_over"): n for name, n in told["model"]["vocab"].items()}
    else:
        name = next(name for name, n in told["model"]["vocab"].items() if n == 299)
        told["model"]["merges"] = [pair for pair in told["model"]["merges"] if "".join(pair).replace(" ", "") != name]
        del told["model"]["vocab"][name]
        told["model"]["vocab"]["\u8a9e"] = 299
    return json.dumps(told)


@pytest.mark.parametrize("which, said", [("special", "must be <|im_end|> and is <|im_over|>; use a tokenizer that"),
                                         ("bytes", "it is no byte-level BPE with a token for each number")])
def test_a_tokenizer_of_another_kind_is_refused_in_a_run_and_in_a_file(run, registry, tmp_path, which, said):
    shutil.copytree(run.folder, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.json"
    path.write_text(foreign(path.read_text(), which))
    export(run.folder, registry, tmp_path / "m")
    tensors = load_file(tmp_path / "m")
    with safe_open(tmp_path / "m", framework="pt") as file:
        metadata = file.metadata()
    metadata["tokenizer"] = foreign(metadata["tokenizer"], which)
    save_file(tensors, tmp_path / "m", metadata)
    for what, named in ((tmp_path / "run", str(path)), (tmp_path / "m", f"{tmp_path / 'm'} (tokenizer)")):
        with pytest.raises(UserError) as told:
            open_model(what, registry)
        assert said in str(told.value) and str(told.value).startswith(named) and "\n" not in str(told.value)
