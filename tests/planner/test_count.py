"""Parameters, active parameters and packed bytes, against real builds and by hand."""

import pytest
from planning_tools import DENSE, EVERYTHING, HYBRID, make_model

from tryplicity.model import initialise
from tryplicity.planner.count import count


@pytest.mark.parametrize(("text", "settings"), [(DENSE, ()), (HYBRID, ()), (HYBRID, EVERYTHING),
                                                (DENSE, ("tied_embeddings=false",))])
def test_total_is_that_of_a_real_model_and_components_and_layers_add_up_to_it(registry, text, settings):
    counts = count(make_model(registry, text, *settings))
    real = initialise(make_model(registry, text, *settings), "cpu", 0)
    assert counts.total == sum(p.numel() for p in real.parameters())
    assert sum(counts.by_component.values()) == counts.total
    outside = sum(p.numel() for name, p in real.named_parameters() if not name.startswith("layers."))
    assert sum(layer.parameters for layer in counts.layers) + outside == counts.total
    assert counts.buffer_bytes == sum(b.numel() * b.element_size() for b in real.buffers())


def test_dense_model_by_hand(registry):
    D, V, F, qkv = 64, 512, 160, (4 + 2 * 2) * 16
    block = D * qkv + 4 * 16 * D + 3 * D * F
    norms = D * (2 * 3 + 1)
    tied = count(make_model(registry, DENSE))
    assert tied.by_component == {"embedding": V * D, "mixer": 3 * (D * qkv + 64 * D), "feed_forward": 3 * 3 * D * F,
                                 "norm": norms}
    assert tied.total == tied.active == V * D + 3 * block + norms
    assert tied.packed_bytes_per_token == 2 * tied.total

    untied = count(make_model(registry, DENSE, "tied_embeddings=false"))
    assert untied.total == tied.total + V * D
    assert untied.active == untied.total
    assert untied.packed_bytes_per_token == 2 * (tied.total + D), "of the embedding table one token reads one row"
    assert [(layer.index, layer.mixer, layer.feed_forward) for layer in untied.layers] == [
        (i, "gqa", "gated_mlp") for i in range(3)]


#: what model cards say: the spec, all parameters and the active ones, in billions
CARDS = {
    "Qwen3-30B-A3B": ((151936, 2048, 48, 32, 4, 128, 128, 8, 768), 30.5, 3.3),
    "Mixtral-8x7B": ((32000, 4096, 32, 32, 8, 128, 8, 2, 14336), 46.7, 12.9),
    "OLMoE-1B-7B": ((50304, 2048, 16, 16, 16, 128, 64, 8, 1024), 6.9, 1.3),
}


@pytest.mark.parametrize("card", CARDS)
def test_figures_are_those_of_published_cards(registry, card):
    """Untied models: cards count both tables."""
    (vocabulary, hidden, layers, heads, kv_heads, head_dim, experts, top_k, inner), total, active = CARDS[card]
    counts = count(make_model(registry, f"""
name: {card}
vocab_size: {vocabulary}
hidden_size: {hidden}
context_length: 256
tied_embeddings: false
blocks:
  block:
    mixer: {{type: gqa, heads: {heads}, kv_heads: {kv_heads}, head_dim: {head_dim}}}
    feed_forward: {{type: moe, experts: {experts}, top_k: {top_k}, inner_size: {inner}, shared_experts: 0}}
layers: [{{repeat: {layers}, of: block}}]
"""))
    assert counts.total / 1e9 == pytest.approx(total, abs=0.05)
    assert counts.active / 1e9 == pytest.approx(active, abs=0.06)  # Qwen3's 3.35 is printed as 3.3


def test_active_is_the_chosen_share_of_the_experts(registry):
    model = make_model(registry, HYBRID)
    counts = count(model)
    routed = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 and p.shape[0] == 8)
    assert routed == 2 * 8 * 3 * 128 * 128
    assert counts.active == counts.total - routed + routed * 2 // 8


def test_packed_bytes_take_ternary_weights_at_a_tenth(registry):
    plain, packed = (count(make_model(registry, DENSE, *s)) for s in ((), ("linear=bitlinear",)))
    linears = plain.by_component["mixer"] + plain.by_component["feed_forward"]
    assert packed.total == plain.total
    assert plain.packed_bytes_per_token - packed.packed_bytes_per_token == round(linears * (16 - 1.6) / 8)


def test_packed_bytes_leave_out_the_training_heads(registry):
    with_heads, without = (count(make_model(registry, HYBRID, *s)) for s in ((), ("heads=[]",)))
    assert with_heads.total > without.total
    assert with_heads.packed_bytes_per_token == without.packed_bytes_per_token
