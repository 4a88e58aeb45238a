"""`tryplicity import`: shards and GGUF files, a tokenizer with special tokens and a template of its own, files that
lie."""

from __future__ import annotations

import copy
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command_line import call
from tests.exchange.models import configs, save
from tryplicity import UserError, load_plugins
from tryplicity.data.conversations import chat_format
from tryplicity.data.tokenizer import load_tokenizer
from tryplicity.exchange.importing import import_model
from tryplicity.inference import chat
from tryplicity.inference.engine import Engine
from tryplicity.inference.packed import open_model
from tryplicity.inference.sampler import Sampling

REGISTRY = load_plugins().registry
PROMPT = [259, 60, 70, 256, 258, 99]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A Llama as transformers saves it, in many shards."""
    folder = tmp_path_factory.mktemp("there")
    save(configs()["llama"], folder, shard="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def run(there, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    import_model(there, folder, REGISTRY)
    return folder


def test_a_run_like_any_other(there, run, tmp_path, capfd):
    code, out, _ = call(capfd, "import", str(there), "--run", str(tmp_path / "r"), "--name", "mine",
                        "--context-length", "64", "--json")
    said = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(there)
    assert said["parameters"] == sum(p.numel() for p in model.parameters()) and said["chat"]
    opened = open_model(tmp_path / "r", REGISTRY)
    assert (opened.spec.name, opened.spec.context_length) == ("mine", 64)
    assert sorted(path.name for path in run.iterdir()) == ["model.safetensors", "origin.json", "spec.yaml",
                                                          "tokenizer.json", "tokenizer_config.json"]
    assert code == 0
    code, out, _ = call(capfd, "generate", str(run), "the", "--temperature", "0", "--max-tokens", "4")
    assert code == 0 and out.startswith("the")


# --- the tokenizer and its special tokens ---

def test_text_begins_and_ends_as_the_tokenizer_has_it(there, run):
    engine, theirs = Engine.load(run, REGISTRY), AutoTokenizer.from_pretrained(there)
    for text in ("the other thing", "", "naïve 🙂\n\t</s>"):
        assert engine.encode(text) == theirs(text).input_ids
    vocabulary = engine.vocabulary
    assert (vocabulary.begin, vocabulary.eos, vocabulary.ends) == ((259,), 260, {260, 261})
    assert engine.card.chat
    # no token beyond the tokenizer's own breaks a text: the model's vocabulary is larger
    pieces = list(engine.generate(chat.request(engine, [{"role": "user", "content": "Hi"}], Sampling(seed=1), 40)))
    assert pieces[-1].finish in ("length", "stop")
    engine.close()


MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "the other\nthing"},
            {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]


def test_conversations_are_written_as_transformers_writes_them(there, run):
    theirs = AutoTokenizer.from_pretrained(there)
    write = chat_format(load_tokenizer(run / "tokenizer.json"))
    due = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert write.prompt(MESSAGES) == due
    begun = [*MESSAGES, {"role": "assistant", "content": "Because"}]
    due = theirs.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    assert write.prompt(begun, go_on=True) == due


def test_a_special_token_in_a_message_ends_nothing(run):
    tokenizer = load_tokenizer(run / "tokenizer.json")
    write = chat_format(tokenizer)
    ids = write.prompt([{"role": "user", "content": "a</s>b<|end|>"}])
    assert ids.count(260) == 1 and 261 not in ids  # the template's own
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>[user] a</s>b<|end|></s>\n[assistant] "


def test_of_a_conversation_the_assistants_words_are_learnt(run):
    tokenizer = load_tokenizer(run / "tokenizer.json")
    write = chat_format(tokenizer)
    messages = [*MESSAGES, {"role": "assistant", "content": "So."}]
    (ids, mask), = write.encode([messages])
    learnt = [id for id, own in zip(ids, mask, strict=True) if own]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == "Yes.</s>So.</s>"
    assert ids[:len(write.prompt(MESSAGES))] == write.prompt(MESSAGES) and ids[-1] == 260
    (_, mask), = write.encode([[*MESSAGES, {"role": "assistant", "content": "So.", "weight": 0}]])
    assert sum(mask) == len(tokenizer.encode("Yes.</s>", add_special_tokens=False).ids)


@pytest.mark.parametrize("template, message", [
    ("{% if", "the model's template cannot be read"),
    ("{{ raise_exception('only users may speak') }}", "does not take these messages: only users may speak"),
    ("{{ ''.__class__.__mro__ }}", "does not take these messages"),
])
def test_a_template_that_cannot_be_used_is_told(run, tmp_path, template, message):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with pytest.raises(UserError, match=message):
        chat_format(load_tokenizer(tmp_path / "run" / "tokenizer.json")).prompt(MESSAGES)


# --- GGUF ---

def write_gguf(path, model, folder, **changes):
    """As llama.cpp's converter does it: rows of q and k so that neighbours turn together."""
    config, tokenizer = model.config, json.loads((folder / "tokenizer.json").read_text())
    said = {"architecture": "llama", "pre": "gpt-2", "kind": "gpt2", "drop": "", "type": gguf.GGMLQuantizationType.F32}
    said |= changes
    writer = gguf.GGUFWriter(path, said["architecture"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    words |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    words |= {number: f"[PAD{number}]" for number in range(len(words), config.vocab_size)}
    writer.add_tokenizer_model(said["kind"])
    writer.add_tokenizer_pre(said["pre"])
    writer.add_token_list([words[number] for number in range(config.vocab_size)])
    writer.add_token_types([3 if number in special else 1 if number < 262 else 5
                            for number in range(config.vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(260)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        name = names.get_name(name, (".weight",))
        if name != said["drop"]:
            kind = said["type"] if array.ndim == 2 and array.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose matrices can be quantised in blocks of 32."""
    folder = tmp_path_factory.mktemp("wide")
    return save(configs()["llama"].__class__(**{**configs()["llama"].to_dict(), "hidden_size": 64, "head_dim": None,
                                                "intermediate_size": 96}), folder), folder


def test_a_gguf_file_is_the_same_model(wide, tmp_path):
    model, folder = wide
    write_gguf(tmp_path / "m.gguf", model, folder)
    done = import_model(tmp_path / "m.gguf", tmp_path / "run", REGISTRY)
    assert done.spec.name == "m"
    import_model(folder, tmp_path / "due", REGISTRY)
    ours, due = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "due"))
    assert ours.keys() == due.keys() and all(torch.equal(ours[name], due[name]) for name in due)
    engine, theirs = Engine.load(tmp_path / "run", REGISTRY), AutoTokenizer.from_pretrained(folder)
    for text in ("the other thing's 12 3", "naïve 🙂\n\t  x"):
        assert engine.encode(text) == theirs(text).input_ids
    assert chat.prompt(engine, [{"role": "user", "content": "a"}])[-1] == 260
    engine.close()


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16,
                                  gguf.GGMLQuantizationType.F16])
def test_quantised_tensors_are_what_transformers_reads(wide, tmp_path, kind):
    model, folder = wide
    write_gguf(tmp_path / "m.gguf", model, folder, type=kind)
    import_model(tmp_path / "m.gguf", tmp_path / "run", REGISTRY)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    engine, ids_BT = Engine.load(tmp_path / "run", REGISTRY), torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(engine.model(ids_BT), theirs(ids_BT).logits, rtol=1e-5, atol=1e-5)
        assert not torch.equal(theirs(ids_BT).logits, model(ids_BT).logits)
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_as_gguf_it_comes_back_and_transformers_reads_it(wide, tmp_path, dtype, capfd):
    model, folder = wide
    shutil.copytree(folder, tmp_path / "there")
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path / "there")
    import_model(tmp_path / "there", tmp_path / "run", REGISTRY)
    assert call(capfd, "export", str(tmp_path / "run"), "--format", "gguf", "--out", str(tmp_path / "m.gguf"))[0] == 0
    import_model(tmp_path / "m.gguf", tmp_path / "again", REGISTRY)
    due, found = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert found.keys() == due.keys() and all(torch.equal(found[name].float(), due[name].float()) for name in due)
    assert all(tensor.dtype == (dtype if tensor.ndim > 1 else torch.float32) for tensor in found.values())
    first, second = Engine.load(tmp_path / "run", REGISTRY), Engine.load(tmp_path / "again", REGISTRY)
    assert first.encode("the other 12's\n") == second.encode("the other 12's\n")
    assert chat.prompt(first, MESSAGES) == chat.prompt(second, MESSAGES)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids_BT = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(first.model(ids_BT), theirs(ids_BT).logits, rtol=1e-5, atol=1e-5)
    first.close()
    second.close()


@pytest.mark.parametrize("changes, message", [
    ({"architecture": "gemma"}, "a GGUF of architecture 'gemma'"),
    ({"pre": "strange"}, "its tokenizer (gpt2, strange) is not read"),
    ({"kind": "llama"}, "its tokenizer (llama, gpt-2) is not read"),
    ({"drop": "blk.1.ffn_up.weight"}, "model.layers.1.mlp.up_proj.weight is missing"),
])
def test_a_gguf_file_that_cannot_be_read(wide, tmp_path, changes, message, capfd):
    write_gguf(tmp_path / "m.gguf", *wide, **changes)
    refused(tmp_path / "m.gguf", tmp_path, message, capfd)


def test_a_gguf_file_that_is_cut_short(wide, tmp_path, capfd):
    write_gguf(tmp_path / "m.gguf", *wide)
    for size in (100, 20_000, 100_000):
        (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:size])
        refused(tmp_path / "cut.gguf", tmp_path, "cut.gguf: not a GGUF file, or one cut short", capfd)


# --- files that lie ---

def refused(source, tmp_path, message, capfd):
    """One line, exit code 2, and nothing left behind."""
    before = sorted(tmp_path.rglob("*"))
    code, _, err = call(capfd, "import", str(source), "--run", str(tmp_path / "run"))
    line, = err.splitlines()
    assert code == 2 and message in line, line
    assert sorted(tmp_path.rglob("*")) == before


def _edit(name, **changes):
    def lie(folder):
        said = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return lie


def _tensors(change):
    def lie(folder):
        path = next(folder.glob("model-00002-*.safetensors"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    return lie


def _shard_is_gone(folder):
    next(folder.glob("model-00002-*.safetensors")).unlink()


def _of_another_model(folder):
    (folder / "model.safetensors.index.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _half(folder):
    path = next(folder.glob("model-00002-*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])


def _header(says):
    """A shard whose first eight bytes say how long its header is, and what stands there."""
    def lie(folder):
        path = next(folder.glob("model-00002-*.safetensors"))
        path.write_bytes(says.to_bytes(8, "little") + b'{"model.norm.weight": ')
    return lie


def _link(folder):
    """A shard that is a link to itself."""
    path = next(folder.glob("model-00002-*.safetensors"))
    path.unlink()
    path.symlink_to(path.name)


def _tokenizer(text):
    return lambda folder: (folder / "tokenizer.json").write_text(text)


LIES = {
    "is missing, which model.safetensors.index.json names": _shard_is_gone,
    "cannot be read as safetensors": _half,
    "pytorch_model.bin is a pickle": _of_another_model,
    "models of type gptx are not read": _edit("config.json", model_type="gptx"),
    "config.json has no model_type": _edit("config.json", model_type=None),
    "config.json has no intermediate_size": _edit("config.json", intermediate_size=None),
    "the activation quick_gelu has no counterpart here": _edit("config.json", hidden_act="quick_gelu"),
    "has no place in a model of type llama": _edit("config.json", num_hidden_layers=2),
    "is missing; its files are incomplete": _edit("config.json", num_hidden_layers=4),
    "and by its config.json it must be [96, 48]": _edit("config.json", intermediate_size=96),
    "and by its config.json it must be [48, 48]": _edit("config.json", num_key_value_heads=4),
    "config.json is no sound one of a llama": _edit("config.json", rms_norm_eps="small"),
    "is in another file of": _tensors(lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(2)})),
    "quantised in a way that is not read here": _tensors(
        lambda tensors: tensors.update({name: tensor.to(torch.int8) for name, tensor in tensors.items()})),
    "config.json: cannot be read as JSON": lambda folder: (folder / "config.json").write_text("{'model_type': 1"),
    "config.json: not a mapping of names": lambda folder: (folder / "config.json").write_text("[1]"),
    "header too large": _header(10**15),
    "header length": _header(500),
    "model-00002-of-00007.safetensors is missing": _link,
    "hidden_size: expected a whole number from 1 to 1,048,576": _edit("config.json", hidden_size=10**12),
    "chat_template.jinja: cannot be read": lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff{{"),
    "chat_template is no text": _edit("tokenizer_config.json", chat_template=[7]),
    "says num_hidden_layers 1,000,000,000; at most 1,000": _edit("config.json", num_hidden_layers=10**9),
    "weight_map does not say which file of the folder has which tensor": _edit(
        "model.safetensors.index.json", weight_map={"model.norm.weight": "../model.safetensors"}),
    "tokenizer.json is none of Hugging Face's tokenizers": _tokenizer("{}"),
    "there is no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "eos_token is '</nothing>', which the tokenizer does not have": _edit("tokenizer_config.json",
                                                                        eos_token="</nothing>"),
    "it has 362 tokens and the model 320": lambda folder: _larger(folder),
}


def _larger(folder):
    """A tokenizer of another model."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"word{number}" for number in range(100)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("message", LIES)
def test_a_folder_that_lies(there, tmp_path, message, capfd):
    shutil.copytree(there, tmp_path / "lies")
    LIES[message](tmp_path / "lies")
    refused(tmp_path / "lies", tmp_path, message, capfd)


def test_a_run_that_is_there_is_left_alone(there, run, tmp_path):
    with pytest.raises(UserError, match="is there already; give another --run"):
        import_model(there, run, REGISTRY)
