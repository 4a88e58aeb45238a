"""Random models of published architectures, built small by transformers itself."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY = 320
TEMPLATE = ("{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}"
            "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE whose special tokens stand last, as many published ones have them."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate(signs)} | {"Ġt": 256, "he": 257, "Ġthe": 258}
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|end|>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 259)])
    return made


def save(config, folder: Path, *, shard: str = "5GB", template: str | None = TEMPLATE) -> torch.nn.Module:
    """The model of a config with random weights, as transformers saves it, and its tokenizer beside it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # what starts as ones or zeros would hide a mix-up
            if parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias", ".D")):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("proj.weight") or "expert" in name or "router" in name or "gate" in name:
                parameter.mul_(4)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 259, "eos_token_id": [260, 261]}))
    return model


def sizes(**options):
    return {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 259,
            "eos_token_id": 260, "pad_token_id": None, **options}


def configs() -> dict:
    """By name; what makes each of them special is switched on."""
    import transformers as t

    return {
        "llama": t.LlamaConfig(**sizes(rope_theta=500.0)),
    }
