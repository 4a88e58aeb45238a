"""Every mixer, every shipped spec at small widths and every kind of published model, random, takes part in recorded
steps: the tokens of each sequence alone, whoever sits beside it, in tensors that stay where they are."""

import json
from pathlib import Path

import pytest
import torch

from tests.exchange.models import configs
from tests.inference.test_fixed import PROMPTS, greedy, read, write
from tryplicity import load_plugins
from tryplicity.components import tensors
from tryplicity.inference.fixed import FixedSteps
from tryplicity.model import assemble, initialise
from tryplicity.spec import load_spec, parse_yaml
from tryplicity.spec.loader import dump_yaml

PLUGIN = str(Path(__file__).parents[1] / "plugins" / "parallel_plugin.py")
REGISTRY = load_plugins((PLUGIN,)).registry
FURTHER = {"gqa": [{"heads": 4, "window": 7, "softcap": 3.0}],
           "mla": [{"heads": 2, "head_dim": 6, "rope_dim": 2, "value_head_dim": 5, "latent_size": 8}],
           "two_mixers": [{"held": held} for held in ("state", "list", "tuple", "dict")]}
MIXERS = [{"type": name, **options} for name in REGISTRY.names("mixer")
          for options in (*getattr(REGISTRY.get("mixer", name), "trials", ()), *FURTHER.get(name, ()))]
SMALL = ["hidden_size=64", "vocab_size=300", "context_length=128", "expect=null", "heads=[]",
         "blocks.memory.mixer.state_size=16", "blocks.memory.mixer.head_dim=16", "blocks.attention.mixer.heads=4",
         "blocks.attention.mixer.kv_heads=2", "blocks.attention.mixer.head_dim=16",
         *(f"blocks.{block}.feed_forward.{size}" for block in ("memory", "attention")
           for size in ("experts=16", "inner_size=32", "shared_inner_size=32"))]
SHIPPED = {"tiny": ["vocab_size=300", "expect=null"], "5090": SMALL, "full": SMALL}
AS_IS = ["linear=linear", "layers=[memory, attention]"]  # rounding stays rounding


def with_values(spec):
    """In fp64, where the order of sums decides no token, every value away from the initial one."""
    model = initialise(assemble(spec), "cpu", 0).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def takes_part(model, how="captured"):
    """Some come later and some leave earlier, and the last moves into the row of one that left."""
    said, wanted = [], [[*prompt, *greedy(model, prompt, 9)] for prompt in PROMPTS]
    steps, sequences = FixedSteps(model, 4, how, said.append, backend="eager", places=64), read(model, PROMPTS)
    write(steps, sequences[:3], 1)
    addresses = [tensor.data_ptr() for tensor in tensors(steps.room)]
    write(steps, sequences[:3], 3)
    write(steps, sequences[1:], 4)
    assert not said and addresses == [tensor.data_ptr() for tensor in tensors(steps.room)]
    for own, ids, tokens in zip(sequences, wanted, (5, 9, 9, 5), strict=True):
        assert own.ids == ids[:len(ids) - 9 + tokens]
    steps.leave(*sequences)
    for own, ids in zip(sequences, wanted, strict=True):  # what they take with them is what they would have had
        alone = model.new_state(1)
        model(torch.tensor([own.ids[:own.read]]), state=alone)
        next_V = [model(torch.tensor([ids[-1:]]), state=state) for state in (own.state, alone)]
        torch.testing.assert_close(*next_V, rtol=1e-5, atol=1e-5)  # routers compute in fp32


def of_mixer(mixer):
    spec = parse_yaml("name: one\nvocab_size: 300\nhidden_size: 32\ncontext_length: 128\nlayers: [{repeat: 2, of: "
                      f"{{mixer: {json.dumps(mixer)}, feed_forward: {{type: mlp, inner_size: 32}}}}}}]\n", "one.yaml")
    return with_values(load_spec(spec, REGISTRY))


@pytest.mark.parametrize("mixer", MIXERS, ids=json.dumps)
def test_every_mixer(mixer):
    takes_part(of_mixer(mixer))


@pytest.mark.parametrize("name", ["mla", "parallel", "shared_attention"])
def test_mixers_of_their_own_state_are_one_program_each(name):
    takes_part(of_mixer({"type": name, **REGISTRY.get("mixer", name).trials[-1]}), "compiled")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_spec(name):
    takes_part(with_values(load_spec(name, REGISTRY, [*SHIPPED[name], *AS_IS])))


@pytest.mark.parametrize("name", configs())
def test_every_kind_of_published_model(name):
    config = json.loads(configs()[name].to_json_string(use_diff=False))
    data = {"name": "published", **REGISTRY.get("architecture", config["model_type"]).spec(config)}
    takes_part(with_values(load_spec(parse_yaml(dump_yaml(data), name), REGISTRY)))
