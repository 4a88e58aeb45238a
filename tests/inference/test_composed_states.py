"""States that hold states: copied all the way down, or refused when the model is built."""

import collections
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.registries import unshared
from tryplicity import Mixer, PluginFault, State, load_plugins
from tryplicity.components import Rows
from tryplicity.inference.engine import Engine, Request
from tryplicity.inference.prefix import Prefixes
from tryplicity.inference.sampler import Sampling
from tryplicity.model import assemble, initialise
from tryplicity.spec import load_spec, parse_yaml

PLUGIN = str(Path(__file__).parents[1] / "plugins" / "parallel_plugin.py")
SMALL = {"left": "{type: mamba2, state_size: 16, head_dim: 16, chunk: 16}",
         "right": "{type: gqa, heads: 4, head_dim: 8}"}


def made(mixer, registry=None):
    """A model with two such mixers, in fp64, in which rounding cannot change a token."""
    text = (f"name: composed\nvocab_size: 300\nhidden_size: 32\ncontext_length: 128\n"
            f"layers: [{{repeat: 2, of: {{mixer: {mixer}, feed_forward: {{type: gated_mlp, inner_size: 32}}}}}}]\n")
    spec = load_spec(parse_yaml(text, "composed.yaml"), registry or load_plugins((PLUGIN,)).registry)
    model = initialise(assemble(spec), "cpu", 0).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def request(prompt, tokens=12):
    return Request(tuple(prompt), Sampling(temperature=0), tokens, end_tokens=frozenset())


def answers(engine, prompts):
    """The tokens of each, asked for all at once."""
    heard = [[] for _ in prompts]
    asked = [engine.submit(request(prompt), listener.append) for prompt, listener in zip(prompts, heard, strict=True)]
    for one in asked:
        assert one._finished.wait(60)
    return [[token.id for piece in pieces for token in piece.tokens] for pieces in heard]


@pytest.mark.parametrize("held", ["state", "list", "tuple", "dict"])
def test_a_mixer_of_two_others_answers_alike_with_and_without_reuse(held, plain):
    model = made(f"{{type: two_mixers, left: {SMALL['left']}, right: {SMALL['right']}, held: {held}}}")
    begin = torch.randint(6, 300, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [begin, [*begin, 7, 8], [*begin[:66], 9]]
    wanted = [list(plain(model, request(prompt))) for prompt in prompts]
    assert len({tuple(tokens) for tokens in wanted}) == 3  # the prompts matter
    engine = Engine(model, None, slots=3)
    for prompt, expected in [*zip(prompts, wanted, strict=True)] * 2:  # one after the other: each goes on from others'
        assert answers(engine, [prompt]) == [expected]
    assert engine.statistics()["cached_tokens_total"] > 200
    assert answers(engine, prompts) == wanted  # in one batch, of different lengths
    engine.close()


class Pair(NamedTuple):
    a: torch.Tensor
    b: int


class Wide(State):
    """One with a constructor and an attribute of its own."""

    def __init__(self, size):
        super().__init__(x=torch.zeros(size))
        self.beside = torch.zeros(size)


def test_nothing_of_a_clone_is_the_originals():
    shared = torch.zeros(6)
    inner = State(y=torch.zeros(3), deep=[{"z": torch.zeros(2)}, (torch.zeros(1),)])
    state = State(x=torch.zeros(3), n=4, nested=inner,
                  pair=Pair(torch.zeros(2), 5), rows=Rows([State(r=torch.zeros(2))]), wide=Wide(3),
                  whole=shared, part=shared[2:4], again=shared, none=None, dtype=torch.float32)
    twin = state.clone()
    assert type(twin["nested"]) is State and type(twin["wide"]) is Wide and type(twin["rows"]) is Rows
    assert type(twin["pair"]) is Pair and twin["pair"].b == 5 and twin["n"] == 4 and twin["dtype"] == torch.float32
    spots = lambda s: [s["x"], s["nested"]["y"], s["nested"]["deep"][0]["z"], s["nested"]["deep"][1][0],  # noqa: E731
                       s["pair"].a, s["rows"][0]["r"], s["wide"]["x"], s["wide"].beside, s["whole"]]
    for own in spots(state):
        own.fill_(7)
    state["nested"]["deep"].append(1)
    assert all((own == 0).all() for own in spots(twin)) and len(twin["nested"]["deep"]) == 2
    twin["whole"][2] = 3  # what is one memory in the original is one in the copy
    assert twin["again"] is twin["whole"] and twin["part"].tolist() == [3, 0]


def test_every_byte_of_a_kept_state_is_counted_once():
    shared = torch.zeros(100)
    state = State(a=shared, b=[shared[:10]], c=State(d=(torch.zeros(50),)), wide=Wide(25))
    kept = Prefixes(1 << 20)
    kept.keep([1, 2], [[state, None]])
    assert kept.bytes == 4 * (100 + 50 + 25 + 25)
    kept.keep([1, 2, 3], [[state.clone(), None]])
    assert kept.bytes == 2 * 4 * (100 + 50 + 25 + 25)


class Odd(Mixer):
    """Passes its tokens on; its state is whatever a test says."""

    name = "test_odd"
    make = None

    def __init__(self, config, site):
        super().__init__()

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        return x_BTD

    def new_state(self, batch, *, device=None, dtype=None):
        return type(self).make(batch)


class Forgetful(Odd):
    """One whose new_state does not take what it is given."""

    name = "test_forgetful"

    def new_state(self, batch):
        return State()


@pytest.fixture(scope="module")
def with_odd():
    registry = unshared()
    for cls in (Odd, Forgetful):
        registry.add(cls, "plugin stranger")
    return registry


@pytest.mark.parametrize("make, said", [
    (lambda b: State(ok=1, window=collections.deque([torch.zeros(1)])), r"state\['window'\] is a deque"),
    (lambda b: State(inner=State(cell=[torch.nn.Linear(1, 1)])), r"state\['inner'\]\['cell'\]\[0\] is a Linear"),
    (lambda b: State(done={1}), r"state\['done'\] is a set"),
    (lambda b: {"x": torch.zeros(1)}, r"its decoding state is a dict; return a State"),
    (lambda b: torch.zeros(b), r"its decoding state is a Tensor; return a State"),
    (lambda b: State(x=torch.zeros(b) + torch.zeros(3, b, 2)[5]), r"cannot make its decoding state: IndexError"),
    (None, r"cannot make its decoding state: TypeError: .*unexpected keyword argument"),
])
def test_a_state_that_cannot_be_decoded_with_is_refused_at_build(make, said, monkeypatch, with_odd):
    monkeypatch.setattr(Odd, "make", make)
    name = "test_odd" if make else "test_forgetful"
    with pytest.raises(PluginFault, match=rf"layers.0.mixer \(mixer {name}\): {said}.*{Path(__file__).name}:\d+"):
        made(name, with_odd)
