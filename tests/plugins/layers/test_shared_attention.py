"""Zamba's shared block: against transformers' Zamba2 with gradients; whole, in pieces, packed. Logits, texts and files:
tests/exchange/test_architectures.py."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.exchange.models import configs
from tryplicity import UserError, load_plugins
from tryplicity.exchange.mapping import table
from tryplicity.model import assemble, initialise
from tryplicity.spec import load_spec, parse_yaml
from tryplicity.spec.loader import dump_yaml

REGISTRY = load_plugins().registry
ZAMBA2 = REGISTRY.get("architecture", "zamba2")
NAMES = [name for name in configs() if name.startswith("zamba2")]


def both(name):
    """(transformers' random model, ours with its weights, the table between them), in fp64"""
    config = configs()[name]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    said = config.to_dict()
    spec = load_spec(parse_yaml(dump_yaml({"name": "zamba", **ZAMBA2.spec(said)}), "zamba"), REGISTRY)
    ours, pieces, given = initialise(assemble(spec), "cpu", 0).double(), table(ZAMBA2, said), theirs.state_dict()
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            for piece in pieces[parameter_name]:
                parameter[piece.at] = piece.form.ours(given[piece.foreign])
    return theirs, ours, pieces


def ids():
    return torch.randint(6, 300, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_transformers_own(name):
    theirs, ours, pieces = both(name)
    generator = torch.Generator().manual_seed(1)
    weight_BTV = torch.randn(2, 23, theirs.config.vocab_size, generator=generator, dtype=torch.float64)
    for model in (theirs, ours):
        out = model.train()(ids(), **({"use_cache": False} if model is theirs else {}))
        ((out.logits if model is theirs else out) * weight_BTV).sum().backward()
    found = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        for piece in pieces[parameter_name]:
            due = piece.form.ours(found[piece.foreign].grad)
            # transformers keeps rotations, norms and scans in fp32
            torch.testing.assert_close(parameter.grad[piece.at], due, rtol=1e-3, atol=1e-4 * float(due.abs().max()),
                                       msg=lambda m, n=parameter_name: f"{n}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_whole_in_pieces_and_packed_are_the_same(name):
    _, ours, _ = both(name)
    ids_BT = ids()
    with torch.no_grad():
        whole_BTV = ours.eval()(ids_BT)
        state = ours.new_state(2)
        pieces = [ours(ids_BT[:, :11], state=state), *(ours(ids_BT[:, t:t + 1], state=state) for t in range(11, 23))]
        torch.testing.assert_close(torch.cat(pieces, 1), whole_BTV, rtol=1e-5, atol=1e-6)
        documents_BT = (torch.arange(23) >= 9).int().expand(2, -1)
        packed_BTV = ours(ids_BT, doc_ids_BT=documents_BT)
        apart = [ours(ids_BT[:, :9]), ours(ids_BT[:, 9:])]
        torch.testing.assert_close(packed_BTV, torch.cat(apart, 1), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(packed_BTV, whole_BTV, atol=1e-3)


def test_what_cannot_be_is_refused():
    def load(mixer):
        data = {"name": "z", "vocab_size": 300, "hidden_size": 48, "context_length": 32, "layers": [{"mixer": mixer}]}
        return load_spec(parse_yaml(dump_yaml(data), "z.yaml"), REGISTRY)

    one = {"type": "shared_attention", "mixer": "short_conv", "heads": 4}
    assert load(one)
    for more, said in (({"heads": 5}, "heads: 5 does not cut 2 hidden_size (96) into equal parts; take a divisor"),
                       ({"kv_heads": 3}, "kv_heads: 3 does not divide heads (4); take a divisor"),
                       ({"adapted_attention": True}, "adapted_attention: it needs adapter_rank; add it"),
                       ({"mixer": one}, "mixer: shared_attention has parts for each layer itself; it cannot be one of "
                                        "them")):
        with pytest.raises(UserError) as error:
            load({**one, **more})
        assert said in str(error.value)
    with pytest.raises(UserError, match="of: shared_attention needs to be a block's whole mixer"):
        load({"type": "parallel", "of": [{"mixer": one}]})
