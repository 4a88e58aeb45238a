"""Files of tensors, and the index that puts their pieces together: what is written any reader can read; what is wrong
is told before anything is used."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tryplicity.errors import UserError
from tryplicity.training.saved import DTYPES, indexed, saved_weights, write_tensors


def test_what_is_written_any_reader_of_safetensors_reads(tmp_path):
    tensors = {f"of.{name}": (torch.arange(6).reshape(2, 3) % 2).to(dtype) for dtype, name in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "ä": torch.ones(1, dtype=torch.bfloat16)}
    digest = write_tensors(tmp_path / "a", tensors)
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8) if tensor.ndim else found[name],
                           tensor.view(torch.uint8) if tensor.ndim else tensor), name
    assert digest == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert write_tensors(tmp_path / "b", dict(reversed(tensors.items()))) == digest  # whatever the order


@pytest.fixture
def folder(tmp_path):
    """A tensor of 3 x 2 in two pieces, and a whole one."""
    save_file({"w@0,0": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(7.0)}, tmp_path / "one")
    save_file({"w@2,0": torch.tensor([[5.0, 6.0]])}, tmp_path / "two")
    pieces = [{"file": "one", "key": "w@0,0", "offsets": [0, 0], "shape": [2, 2]},
              {"file": "two", "key": "w@2,0", "offsets": [2, 0], "shape": [1, 2]}]
    whole = [{"file": "one", "key": "b", "offsets": [], "shape": []}]
    entries = {name: {"dtype": "F32", "shape": shape, "pieces": found} for name, shape, found in (
        ("w", [3, 2], pieces), ("b", [], whole))}
    (tmp_path / "index.json").write_text(json.dumps({"model": entries}))
    return tmp_path


def test_pieces_make_up_the_whole(folder):
    weights = saved_weights(folder)
    assert weights.names == {"w", "b"} and weights.shape("w") == [3, 2] and weights.shape("b") == []
    assert torch.equal(weights["w"], torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])) and weights["b"] == 7


@pytest.mark.parametrize(("change", "why"), [
    (lambda w: w["pieces"].pop(), "a piece is missing"),
    (lambda w: w["pieces"][1].update(offsets=[3, 0]), "does not lie in the whole"),
    (lambda w: w["pieces"][1].update(offsets=[-1, 0]), "does not lie in the whole"),
    (lambda w: w["pieces"][1].update(offsets=[2]), "does not lie in the whole"),
    (lambda w: w["pieces"][1].update(shape=[1, 1]), r"two has no w@2,0 of shape \[1, 1\]"),
    (lambda w: w["pieces"][1].update(key="other"), "two has no other of shape"),
    (lambda w: w["pieces"][1].update(file="../two"), "no name of a file in it"),
    (lambda w: w["pieces"][1].update(file="three"), "three"),
    (lambda w: w.update(dtype="F31"), "F31"),
    (lambda w: w.clear(), "pieces"),
])
def test_an_index_that_does_not_fit_its_files_is_refused(folder, change, why):
    index = json.loads((folder / "index.json").read_text())
    change(index["model"]["w"])
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"index.json: cannot be read .*{why}"):
        saved_weights(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', '{"model": {"w": []}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json: cannot be read"):
        indexed(tmp_path, "model")


def test_weights_of_before_there_was_an_index(tmp_path):
    save_file({"w": torch.ones(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    assert torch.equal(saved_weights(tmp_path)["w"], torch.ones(2, dtype=torch.float16))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as safetensors"):
        saved_weights(tmp_path)


def test_files_are_let_go_of_and_mapped_anew_where_something_is_read_again(tmp_path):
    save_file({"x": torch.arange(3.0)}, tmp_path / "model.safetensors")
    saved = saved_weights(tmp_path)

    def mapped():
        return str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()

    for _ in range(2):
        assert saved["x"].tolist() == [0, 1, 2] and mapped()
        saved.let_go()
        assert not mapped() and saved.names == {"x"} and saved.shape("x") == [3]
