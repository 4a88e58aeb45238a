"""Runs that were not imported go out to transformers too, where their spec is that of an architecture there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command_line import call
from tests.exchange.models import configs, save
from tests.inference.conftest import run_of
from tryplicity import UserError, load_plugins
from tryplicity.data import load_tokenizer
from tryplicity.data.conversations import chat_format
from tryplicity.exchange.exporting import export_transformers
from tryplicity.exchange.gguf_writing import export_gguf
from tryplicity.exchange.importing import import_model
from tryplicity.inference.packed import load_model
from tryplicity.spec import load_spec
from tryplicity.spec.loader import dump_yaml, parse_yaml

REGISTRY = load_plugins().registry
IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
GQA = {"type": "gqa", "heads": 4, "kv_heads": 2}
MOE = {"type": "moe", "experts": 4, "top_k": 2, "inner_size": 24, "shared_experts": 0,
       "router": {"type": "top_k", "score": "softmax"}}
SCALED = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 32}


def small(mixer, *feed_forwards, **more):
    blocks = {f"of{i}": {"mixer": mixer, "feed_forward": one} for i, one in enumerate(feed_forwards)}
    said = {"name": "mine", "vocab_size": 300, "hidden_size": 32, "context_length": 64, "blocks": blocks,
            "layers": [*blocks, *blocks], **more}
    return load_spec(parse_yaml(dump_yaml(said), "mine.yaml"), REGISTRY)


WRITTEN = {
    "llama": small(GQA, "gated_mlp"),
    "llama, scaled, with biases": small({**GQA, "rope_scaling": SCALED, "bias": True, "out_bias": True},
                                        {"type": "gated_mlp", "inner_size": 40, "bias": True}, tied_embeddings=False,
                                        heads=[{"type": "multi_token_prediction", "inner_size": 32}],
                                        brain=["hebbian_loss"], phases=[{"kind": "pretrain"}, {"kind": "chat"}]),
    "mistral": small({**GQA, "window": 8}, "gated_mlp"),
    "qwen2": small({**GQA, "bias": True}, {"type": "gated_mlp", "activation": "gelu"}),
    "qwen3": small({**GQA, "qk_norm": True, "head_dim": 16}, "gated_mlp"),
    "mixtral": small(GQA, MOE),
    "qwen3_moe": small({**GQA, "qk_norm": True}, "gated_mlp", {**MOE, "router": {
        "type": "top_k", "score": "softmax", "normalize": False}})}


@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_gives_the_logits_of_the_run(name, prepared, tmp_path):
    spec = WRITTEN[name]
    run, _ = run_of(spec, tmp_path / "run", prepared.tokenizer_path)
    done = export_transformers(run.folder, tmp_path / "there", REGISTRY)
    assert done.model_type == name.partition(",")[0]
    assert all(any(what in part for what in ("heads.", "objectives.", "router")) for part in done.left_out)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "there", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(load_model(run.folder, REGISTRY)[0](IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    words = AutoTokenizer.from_pretrained(tmp_path / "there")
    ours = load_tokenizer(prepared.tokenizer_path)
    assert words("the list of sums").input_ids == ours.encode("the list of sums").ids
    if "biases" in name:
        messages = [{"role": "user", "content": "the list?"}]
        due = chat_format(ours).prompt(messages)
        assert words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == due
    import_model(tmp_path / "there", tmp_path / "again", REGISTRY)
    before, after = load_file(run.weights), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_a_run_that_went_on_from_an_imported_one_goes_back(tmp_path):
    save(configs()["llama"], tmp_path / "there")
    import_model(tmp_path / "there", tmp_path / "run", REGISTRY)
    (tmp_path / "run" / "origin.json").unlink()  # as a training that begins from it has it
    weights = load_file(tmp_path / "run" / "model.safetensors")
    weights["norm.weight"] += 1
    save_file(weights, tmp_path / "run" / "model.safetensors")
    export_transformers(tmp_path / "run", tmp_path / "back", REGISTRY)
    theirs, model = AutoModelForCausalLM.from_pretrained(tmp_path / "back"), load_model(tmp_path / "run", REGISTRY)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    words = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert words.chat_template and words("the").input_ids[0] == 259
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [260, 261]


def test_llama_cpps_file_too(tmp_path):
    """Of a tokenizer that cuts as GPT-2's does."""
    pytest.importorskip("gguf")
    save(configs()["llama"], tmp_path / "there")
    tokenizer = json.loads((tmp_path / "there" / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = True
    (tmp_path / "there" / "tokenizer.json").write_text(json.dumps(tokenizer))
    import_model(tmp_path / "there", tmp_path / "run", REGISTRY)
    (tmp_path / "run" / "origin.json").unlink()
    export_gguf(tmp_path / "run", tmp_path / "m.gguf", REGISTRY)
    import_model(tmp_path / "m.gguf", tmp_path / "again", REGISTRY)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


@pytest.mark.parametrize("spec", [
    small({"type": "mamba2", "head_dim": 16}, "gated_mlp"), small(GQA, "gated_mlp", MOE),
    small(GQA, "gated_mlp", residual={"type": "hyper_connections", "streams": 2}),
    small(GQA, "gated_mlp", linear="bitlinear"), small({**GQA, "rope_base": None}, "gated_mlp"),
    small(GQA, {**MOE, "router": "top_k"}), small(GQA, "gated_mlp", {"type": "gated_mlp", "inner_size": 40})])
def test_what_none_of_them_is_ends_in_one_line(spec, prepared, tmp_path, capfd):
    run, _ = run_of(spec, tmp_path / "run", prepared.tokenizer_path)
    with pytest.raises(UserError, match="its spec is that of no architecture that is written from a spec alone") as e:
        export_transformers(run.folder, tmp_path / "there", REGISTRY)
    assert "\n" not in str(e.value) and not (tmp_path / "there").exists()
    code, _, err = call(capfd, "export", str(run.folder), "--format", "gguf", "--out", str(tmp_path / "m.gguf"))
    assert code == 2 and "Traceback" not in err and not (tmp_path / "m.gguf").exists()
