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
    assert untied.active == tied.total + D, "of the embedding table one token reads one row"
    assert [(layer.index, layer.mixer, layer.feed_forward) for layer in untied.layers] == [
        (i, "gqa", "gated_mlp") for i in range(3)]


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
