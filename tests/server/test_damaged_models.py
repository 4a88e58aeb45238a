"""A model's file is not trusted: what is wrong with it is one line, before an address is shown."""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.server.conftest import make_run
from tryplicity import UserError, load_plugins
from tryplicity.inference.exported import export
from tryplicity.inference.packed import open_model
from tryplicity.server import app


@pytest.fixture(scope="module")
def ternary_run(registry, prepared, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("ternary") / "run", registry, prepared, "name=packed", "linear=bitlinear",
                    "phases=[{kind: pretrain, share: 0.5}, {kind: chat, share: 0.5}]")


@pytest.fixture(scope="module")
def exported(ternary_run, registry, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model.safetensors"
    export(ternary_run, registry, out, "fp32")
    return out


def changed(file, out, metadata=None, tensors=None):
    """A copy with other metadata (None: without it) and tensors."""
    with safe_open(file, framework="pt") as old:
        kept = {name: old.get_tensor(name) for name in old.keys()}     # noqa: SIM118
        words = old.metadata()
    words = {name: text for name, text in {**words, **(metadata or {})}.items() if text is not None}
    kept = {name: tensor for name, tensor in {**kept, **(tensors or {})}.items() if tensor is not None}
    save_file(kept, out, words)
    return out


def refused(what, monkeypatch):
    """What `serve` says of it; it must not have told an address."""
    monkeypatch.setattr(app, "_log_to_stderr", lambda: None)
    with pytest.raises(UserError) as caught:
        app.serve(what, plugins=load_plugins(), search="none", conversations="none", port=0, say=pytest.fail)
    return str(caught.value)


def words_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def without_special_tokens(text):
    value = json.loads(text)
    for token in value["added_tokens"]:
        token["content"] = token["content"].replace("im_end", "im_stop")
    value["model"]["vocab"] = {name.replace("im_end", "im_stop"): n for name, n in value["model"]["vocab"].items()}
    return json.dumps(value)


def with_other_letters(text):
    """Its tokens are no bytes any more."""
    value = json.loads(text)
    value["model"]["merges"] = []
    value["model"]["vocab"] = {("字" + name if n >= 290 else name): n for name, n in value["model"]["vocab"].items()}
    return json.dumps(value)


def of_another_size(text):
    value = json.loads(text)
    value["model"]["merges"] = []
    value["model"]["vocab"] = {name: n for name, n in value["model"]["vocab"].items() if n < 290}
    return json.dumps(value)


SPECS = {"none": None, "empty": "", "a list": "[]", "no YAML": "{",
         "an unknown part": "name: x\nlinear: {type: gone}\n"}
TOKENIZERS = {"no JSON": lambda text: "{", "cut short": lambda text: text[:len(text) // 2],
              "other special tokens": without_special_tokens, "no bytes": with_other_letters,
              "another size": of_another_size}


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_that_is_none(exported, tmp_path, monkeypatch, spec):
    file = changed(exported, tmp_path / "bad.safetensors", {"spec": SPECS[spec]})
    assert "bad.safetensors" in refused(file, monkeypatch)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit(exported, ternary_run, tmp_path, monkeypatch, tokenizer):
    text = TOKENIZERS[tokenizer](words_of(exported)["tokenizer"])
    assert "bad.safetensors" in refused(changed(exported, tmp_path / "bad.safetensors", {"tokenizer": text}),
                                        monkeypatch)
    run = shutil.copytree(ternary_run, tmp_path / "run")
    (run / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in refused(run, monkeypatch)


def test_a_run_without_a_tokenizer_or_without_weights(ternary_run, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "model.safetensors"):
        run = shutil.copytree(ternary_run, tmp_path / name.partition(".")[0])
        (run / name).unlink()
        assert str(run) in refused(run, monkeypatch)


def test_weights_that_do_not_fit(exported, tmp_path, monkeypatch):
    for number, (name, tensor) in enumerate((("embedding.weight", torch.zeros(299, 64)), ("norm.weight", None),
                                             ("embedding.weight", None))):
        with safe_open(exported, framework="pt") as old:
            name = next(n for n in old.keys() if n.endswith(name))     # noqa: SIM118
        file = changed(exported, tmp_path / f"bad{number}.safetensors", tensors={name: tensor})
        assert name in refused(file, monkeypatch) and "another spec" in refused(file, monkeypatch)
    more = changed(exported, tmp_path / "more.safetensors", tensors={"layers.9.gone": torch.zeros(2)})
    assert "it has no layers.9.gone" in refused(more, monkeypatch)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.999])
def test_a_file_cut_short(exported, tmp_path, monkeypatch, share):
    file = tmp_path / "bad.safetensors"
    content = exported.read_bytes()
    file.write_bytes(content[:int(share * len(content))])
    assert "bad.safetensors" in refused(file, monkeypatch)


def test_bytes_changed_at_random_in_the_head(exported, registry, tmp_path):
    """Either it can be opened all the same, or a line says why not."""
    rng, content, file = random.Random(0), exported.read_bytes(), tmp_path / "bad.safetensors"
    head = 8 + int.from_bytes(content[:8], "little")
    said = 0
    for _ in range(40):
        bad = bytearray(content)
        for _ in range(rng.choice([1, 3, 30])):
            bad[rng.randrange(rng.choice([8, 2000, head]))] = rng.randrange(256)
        file.write_bytes(bad)
        try:
            open_model(file, registry)
        except UserError as error:
            said += "bad.safetensors" in str(error)
    assert said > 20


# --- what works all the same ---

def test_prompts_of_tokens_need_no_tokenizer(started, exported, registry, tmp_path):
    """The answer is the model's own tokens; text is refused, and says why."""
    from tryplicity.inference.engine import decode
    from tryplicity.inference.packed import load_model
    from tryplicity.inference.sampler import Sampler, Sampling

    file = changed(exported, tmp_path / "mute.safetensors", {"tokenizer": ""})
    model, *_ = load_model(file, registry)
    wanted = decode(model, [2, 70, 80], Sampler(Sampling(temperature=0)))
    expected = [next(wanted) for _ in range(8)]
    asked = {"model": "packed", "prompt": [2, 70, 80], "temperature": 0, "max_tokens": 8}
    with started(file) as server:
        client = server.openai()
        [choice] = client.completions.create(**asked, logprobs=1).choices
        assert choice.text == "" and choice.model_extra["token_ids"] == expected
        assert choice.logprobs.tokens == [f"token_id:{id}" for id in expected]
        chunks = client.completions.create(**asked, stream=True)
        assert [id for chunk in chunks for id in chunk.choices[0].model_extra["token_ids"]] == expected
        echoed = client.completions.create(**{**asked, "max_tokens": 0}, echo=True, logprobs=0).choices[0].logprobs
        assert echoed.tokens == ["token_id:2", "token_id:70", "token_id:80"]
        for path, body in (("completions", {**asked, "prompt": "text"}), ("completions", {**asked, "stop": "x"}),
                           ("chat/completions", {"model": "packed", "messages": [{"role": "user", "content": "x"}]}),
                           ("responses", {"model": "packed", "input": "x"})):
            answer = server.http.post(f"/v1/{path}", json=body)
            assert answer.status_code == 400 and "without a tokenizer" in answer.json()["error"]["message"], path
        assert server.http.post("/tokenize", json={"prompt": "x"}).json()["error"]["code"] == "no_tokenizer"
        assert server.http.get("/api/model").status_code == 200


def test_the_fingerprint_is_that_of_the_weights(started, exported, tmp_path):
    """The same for the same file elsewhere; another when one number differs."""
    with safe_open(exported, framework="pt") as old:
        name = next(n for n in old.keys() if n.endswith("norm.weight"))     # noqa: SIM118
        tensor = old.get_tensor(name).clone()
    tensor[0] += 1e-3
    same = shutil.copy(exported, tmp_path / "same.safetensors")
    other = changed(exported, tmp_path / "other.safetensors", tensors={name: tensor})
    found = []
    for file in (exported, same, other):
        with started(file) as server:
            reply = server.openai().completions.create(model="packed", prompt=[2], max_tokens=1)
            found.append(reply.system_fingerprint)
    assert found[0] == found[1] != found[2]
