"""Large vocabularies, long contexts and long templates: random weights of two layers, against transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config

from tests.exchange.models import save
from tryplicity import load_plugins
from tryplicity.data.conversations import chat_format
from tryplicity.data.tokenizer import load_tokenizer
from tryplicity.exchange.importing import import_model
from tryplicity.inference.engine import Engine
from tryplicity.inference.sampler import Sampling

REGISTRY = load_plugins().registry
LONG = ("{% if messages[0]['role'] != 'system' %}" + "You follow each of the rules. " * 2_000 + "{% endif %}"
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}")


@pytest.mark.slow
def test_eight_thousand_tokens_of_a_vocabulary_of_150_thousand_in_a_context_of_32_thousand(tmp_path):
    config = Qwen3Config(vocab_size=151_936, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32_768,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
                         bos_token_id=259, eos_token_id=260, pad_token_id=None, initializer_range=0.1)
    theirs = save(config, tmp_path / "there", template=LONG)
    theirs.set_attn_implementation("sdpa")
    import_model(tmp_path / "there", tmp_path / "run", REGISTRY)
    prompt_BT = torch.randint(300, 151_936, (1, 8_000), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        due = theirs.generate(prompt_BT, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    engine = Engine.load(tmp_path / "run", REGISTRY)
    written = list(engine.tokens(prompt_BT[0].tolist(), Sampling(temperature=0, repetition_penalty=1.0), 24))
    engine.close()
    assert engine.card.context_length == 32_768
    assert written == due[0, 8_000:].tolist() and len(set(written)) > 3

    said = [{"role": "user", "content": "What is a tuple?"}]
    ours = chat_format(load_tokenizer(tmp_path / "run" / "tokenizer.json")).prompt(said)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "there")
    due = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert len(ours) > 40_000 and list(ours) == list(due)
    assert json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())["chat_template"] == LONG
