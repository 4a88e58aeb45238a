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


ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


def save(config, folder: Path, *, shard: str = "5GB", template: str | None = TEMPLATE,
         quantization: dict | None = None) -> torch.nn.Module:
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
    if quantization:
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**said, "quantization_config": quantization}))
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return model


def sizes(**options):
    return {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 259,
            "eos_token_id": 260, "pad_token_id": None} | options


MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
         "mamba_chunk_size": 4}
ZAMBA2 = {**sizes(num_key_value_heads=4), "mamba_d_state": 8, "n_mamba_heads": 6, "mamba_ngroups": 2, "chunk_size": 4,
          "adapter_rank": 5, "initializer_range": 0.03}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def configs() -> dict:
    """By name; what makes each of them special is switched on."""
    import transformers as t

    return {
        "llama": t.LlamaConfig(**sizes(rope_theta=500.0)),
        "llama with biases and scaled positions, tied": t.LlamaConfig(**sizes(
            rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
        "mistral": t.MistralConfig(**sizes(sliding_window=8)),
        "qwen2": t.Qwen2Config(**sizes()),
        "qwen3": t.Qwen3Config(**sizes(head_dim=16)),
        "olmo2": t.Olmo2Config(**sizes()),
        "bitnet": t.BitNetConfig(**sizes()),
        "bitnet, ternary": t.BitNetConfig(**sizes(tie_word_embeddings=True)),
        "mixtral": t.MixtralConfig(**sizes(num_local_experts=4)),
        "qwen3_moe": t.Qwen3MoeConfig(**sizes(head_dim=16, mlp_only_layers=[1], norm_topk_prob=True, **MOE)),
        "qwen2_moe": t.Qwen2MoeConfig(**sizes(shared_expert_intermediate_size=40, **MOE)),
        "olmoe": t.OlmoeConfig(**sizes(num_experts=4, num_experts_per_tok=2)),
        "mamba2": t.Mamba2Config(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, num_heads=6, head_dim=16,
                                 state_size=8, n_groups=2, chunk_size=4, expand=2, use_bias=True, pad_token_id=None,
                                 bos_token_id=259, eos_token_id=260),
        "bamba": t.BambaConfig(**sizes(attn_layer_indices=[1], head_dim=16, **MAMBA)),
        "granitemoehybrid": t.GraniteMoeHybridConfig(**sizes(
            layers_block_type=["mamba", "attention", "mamba"], num_local_experts=4, num_experts_per_tok=2,
            shared_intermediate_size=40, embedding_multiplier=12.0, logits_scaling=0.25, residual_multiplier=0.22,
            attention_multiplier=0.5, tie_word_embeddings=True, **MAMBA)),
        "granitemoehybrid without experts, with positions": t.GraniteMoeHybridConfig(**sizes(
            layers_block_type=["mamba", "attention", "mamba"], num_local_experts=0, shared_intermediate_size=40,
            position_embedding_type="rope", **MAMBA)),
        "nemotron_h": t.NemotronHConfig(**sizes(
            hybrid_override_pattern="M-E*-M", num_hidden_layers=6, head_dim=16, mamba_num_heads=5, mamba_head_dim=16,
            ssm_state_size=8, n_groups=1, chunk_size=4, n_routed_experts=8, num_experts_per_tok=2, n_group=4,
            topk_group=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, routed_scaling_factor=2.5)),
        "falcon_h1": t.FalconH1Config(**sizes(
            head_dim=16, mamba_d_ssm=96, key_multiplier=0.7, attention_in_multiplier=1.2, attention_out_multiplier=0.8,
            ssm_in_multiplier=1.3, ssm_out_multiplier=0.6, embedding_multiplier=2.0, lm_head_multiplier=0.7,
            mlp_multipliers=[1.5, 0.5], ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 1.3], **MAMBA)),
        "falcon_h1 with a norm": t.FalconH1Config(**sizes(
            head_dim=16, mamba_d_ssm=96, mamba_rms_norm=True, mamba_norm_before_gate=False, **MAMBA)),
        "mamba": t.MambaConfig(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, state_size=8, expand=2,
                               time_step_rank=5, initializer_range=0.03, pad_token_id=None, bos_token_id=259,
                               eos_token_id=260),
        "jamba": t.JambaConfig(**sizes(num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, attn_layer_period=4,
                                       attn_layer_offset=2, expert_layer_period=2, expert_layer_offset=1,
                                       mamba_d_state=8, mamba_dt_rank=6, use_mamba_kernels=False)),
        "zamba2": t.Zamba2Config(**ZAMBA2 | {"num_hidden_layers": 7}, num_mem_blocks=2, layers_block_type=[
            "mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba", "hybrid"]),
        "zamba2 with positions and adapted attention": t.Zamba2Config(
            **ZAMBA2 | {"num_hidden_layers": 5}, num_mem_blocks=1, use_mem_rope=True, use_shared_attention_adapter=True,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"]),
        "lfm2": t.Lfm2Config(**sizes(layer_types=["conv", "full_attention", "conv"], block_multiple_of=16)),
    }
