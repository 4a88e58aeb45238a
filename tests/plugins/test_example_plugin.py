"""The example of a third-party layer, tested as its author would test it."""

from pathlib import Path

import pytest
import torch

from tryplicity import Site, UserError, load_plugins

FILE = str(Path(__file__).with_name("example_plugin.py"))


@pytest.fixture
def layer():
    registry = load_plugins((FILE,)).registry
    linear = registry.part("linear", "linear")
    site = Site(hidden_size=6, vocab_size=300, context_length=8, layers=2, linear_part=linear)
    layer = registry.part("mixer", {"type": "shift", "share": 0.25}, site).build(site)
    torch.manual_seed(0)
    for module in layer.modules():
        module.reset_parameters()
    return layer


def test_each_token_sees_the_one_before(layer):
    x_BTD = torch.randn(2, 5, 6)
    expected_BTD = x_BTD.clone()
    expected_BTD[:, 1:] += 0.25 * x_BTD[:, :-1]
    torch.testing.assert_close(layer(x_BTD), expected_BTD @ layer.out.weight.T)


@pytest.mark.parametrize("chunks", [[5], [1, 1, 1, 1, 1], [2, 3]])
def test_whole_is_chunk_by_chunk_is_token_by_token(layer, chunks):
    x_BTD = torch.randn(2, 5, 6)
    state = layer.new_state(2)
    parts = [layer(part, state=state) for part in x_BTD.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x_BTD))


def test_documents_do_not_reach_one_another(layer):
    x_BTD, doc_ids = torch.randn(1, 5, 6), torch.tensor([[0, 0, 1, 1, 1]])
    packed = layer(x_BTD, doc_ids=doc_ids)
    torch.testing.assert_close(packed, torch.cat([layer(x_BTD[:, :2]), layer(x_BTD[:, 2:])], dim=1))


def test_its_options_are_checked():
    with pytest.raises(UserError, match=r"share: expected a number from 0 to 1, got 2"):
        load_plugins((FILE,)).registry.part("mixer", {"type": "shift", "share": 2})


def test_a_model_with_it_runs_whole_and_token_by_token():
    from tryplicity.model import assemble, initialise
    from tryplicity.spec import load_spec, parse_yaml

    text = ("name: shifts\nvocab_size: 300\nhidden_size: 16\ncontext_length: 12\n"
            "layers: [{repeat: 2, of: {mixer: shift, feed_forward: {type: gated_mlp, inner_size: 16}}}]\n")
    model = initialise(assemble(load_spec(parse_yaml(text, "s.yaml"), load_plugins((FILE,)).registry)), "cpu", seed=0)
    ids_BT = torch.randint(300, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = model.new_state(2)
        one_by_one = [model(ids_B1, state=state) for ids_B1 in ids_BT.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(one_by_one, dim=1), model(ids_BT))
