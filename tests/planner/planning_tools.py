"""Small specs and machines to plan with."""

import dataclasses

from tryplicity.hardware import Hardware
from tryplicity.model import assemble
from tryplicity.spec import load_spec, parse_yaml

DENSE = """
name: dense
vocab_size: 512
hidden_size: 64
context_length: 128
blocks:
  attention: {mixer: {type: gqa, heads: 4, kv_heads: 2, head_dim: 16}, feed_forward: {type: gated_mlp, inner_size: 160}}
layers: [{repeat: 3, of: attention}]
"""

HYBRID = """
name: hybrid
vocab_size: 1024
hidden_size: 128
context_length: 256
blocks:
  memory:
    mixer: {type: mamba2, state_size: 32, head_dim: 32}
    feed_forward: {type: moe, experts: 8, top_k: 2, inner_size: 128, shared_experts: 1, shared_inner_size: 128}
  attention:
    mixer: {type: gqa, heads: 4, kv_heads: 2, head_dim: 32}
    feed_forward: {type: gated_mlp, inner_size: 512}
layers: [memory, attention, memory]
heads: [{type: multi_token_prediction, tokens: 3, inner_size: 256}]
"""

EVERYTHING = ("linear=bitlinear", "residual={type: hyper_connections, streams: 2}", "blocks.memory.feed_forward.router="
              "{type: dynamic_sparsity, min_experts: 1, max_experts: 4, mean_experts: 2}")


def make_spec(registry, text, *settings):
    return load_spec(parse_yaml(text, "test.yaml"), registry, settings)


def make_model(registry, text, *settings):
    return assemble(make_spec(registry, text, *settings))


CPU = Hardware(name="test", device="cpu", accelerator="cores", memory_gb=8, tflops=0.1, memory_bandwidth_gbs=30,
               precision="fp32", batch=4, activation_checkpointing=False)
GPUS = Hardware(name="test", device="cuda", accelerator="GPU", memory_gb=100, tflops=1000, memory_bandwidth_gbs=4000,
                count=8, link_bandwidth_gbs=500, batch=2, accumulation=4, price_per_hour=3.0, utilisation=0.5)


def like(hardware, **changes):
    return dataclasses.replace(hardware, **changes)
