"""Steps of decoding on tensors that stay where they are: the same tokens as the ordinary pass, nothing waited for or
put elsewhere in between, and one program for all tokens, which is what a card records.

Mostly in fp64, where the order of sums decides no token.
"""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tryplicity.components import tensors
from tryplicity.inference.choosing import next_tokens
from tryplicity.inference.engine import Engine, Request, Sampling, decode
from tryplicity.inference.fixed import FixedSteps, way
from tryplicity.inference.sampler import Sampler
from tryplicity_plugins.layers.fixed_pages import FixedPages

PROMPTS = [tuple(range(6, 6 + size)) for size in (3, 29, 9, 20)]


@pytest.fixture(scope="module")
def model(make_packed):
    return make_packed("layers=[memory, attention]", "heads=[]", linear="linear", dtype=torch.float64)


def read(model, prompts):
    """Sequences that have read their prompts and chosen a token."""
    sequences = []
    with torch.no_grad():
        for prompt in prompts:
            state = model.new_state(1)
            token = model(torch.tensor([prompt]), state=state, last_only=True)[0, -1].argmax()
            sequences.append(SimpleNamespace(ids=[*prompt, int(token)], read=len(prompt), state=state))
    return sequences


def greedy(model, prompt, tokens):
    return list(itertools.islice(decode(model, prompt, Sampler(Sampling(temperature=0), ())), tokens))


@torch.no_grad()
def write(steps, sequences, tokens):
    for _ in range(tokens):
        found = steps.write(sequences)
        for row, own in zip(found.rows, sequences, strict=True):
            own.ids.append(found.tokens[row])


@pytest.mark.parametrize("how", ["captured", "compiled"])
def test_the_same_tokens_as_each_alone(model, how):
    """Of sequences at unlike places, some of which come later and leave earlier; more places than at first are
    needed, and once a row has nobody in it."""
    said, wanted = [], [[*prompt, *greedy(model, prompt, 13)] for prompt in PROMPTS]
    steps, sequences = FixedSteps(model, 4, how, said.append, backend="eager", places=16), read(model, PROMPTS)
    write(steps, sequences[:3], 6)
    assert steps.places == 64
    write(steps, sequences[1:], 6)  # the first leaves, and the last moves into its row
    assert not said and steps.how == how
    for own, ids, tokens in zip(sequences, wanted, (7, 13, 13, 7), strict=True):
        assert own.ids == ids[:own.read + 1] and len(own.ids) == len(ids) - 13 + tokens
    with torch.no_grad():  # and what they take with them is what they would have had
        steps.leave(*sequences)
        for own, ids in zip(sequences, wanted, strict=True):
            alone = model.new_state(1)
            model(torch.tensor([own.ids[:own.read]]), state=alone)
            next_V = [model(torch.tensor([ids[-1:]]), state=state) for state in (own.state, alone)]
            torch.testing.assert_close(*next_V, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_one_program_for_all_tokens(make_packed, monkeypatch):
    """Traced once, replayed for 32 tokens, equal to the last bit to running the step itself, state and all; it holds
    nothing whose shape or value the host would have to wait for, and every tensor stays where it is. In bf16, as on a
    card."""
    latent = "{mixer: {type: mla, heads: 2, head_dim: 6, rope_dim: 2, latent_size: 8}}"
    model = make_packed(f"layers=[memory, attention, {latent}]", "heads=[]", linear="linear", dtype=torch.bfloat16)
    # of what a router chose the numbers are looked at each time on a CPU, and on a card once
    monkeypatch.setattr("tryplicity_plugins.layers.moe.check_routing", lambda *_: None)
    steps = FixedSteps(model, 4, "captured", places=64)
    write(steps, read(model, PROMPTS), 1)
    outside = ["ids_R", "likeliest_R", "logits_RV"]
    inside = [(state, name) for layer in steps.room for state in layer if state is not None for name in state]

    def run(*given):
        for name, tensor in zip(outside, given[:3], strict=True):
            setattr(steps, name, tensor)
        for (state, name), tensor in zip(inside, given[3:], strict=True):
            state[name] = tensor
        steps._function(4, steps.room)()
        return steps.logits_RV

    held = [getattr(steps, name) for name in outside] + [state[name] for state, name in inside]
    addresses, replayed, spare = [t.data_ptr() for t in held], [t.clone() for t in held], [t.clone() for t in held]
    program = make_fx(run)(*spare)
    places = [t.data_ptr() for t in replayed]
    waits = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    for node in program.graph.nodes:
        if node.op == "call_function" and waits & set(getattr(node.target, "tags", ())):
            indices = [index for index in node.args[1] if index is not None]  # numbers, of which there are as many
            assert node.target is torch.ops.aten.index.Tensor
            assert all((i.meta.get("val", i.meta.get("tensor_meta"))).dtype == torch.int64 for i in indices)
    for _ in range(32):
        program(*replayed)
        run(*held)
        assert torch.equal(replayed[2], held[2])
    assert all(torch.equal(a, b) for a, b in zip(replayed, held, strict=True))
    assert [t.data_ptr() for t in held] == addresses and [t.data_ptr() for t in replayed] == places


def test_ternary_blocks_are_one_program_each(make_packed):
    """Packed weights, with experts chosen inside it: compiled whole, so that the host looks at nothing."""
    model, said = make_packed("layers=[memory, attention]", "heads=[]"), []
    steps, sequences = FixedSteps(model, 4, "compiled", said.append, backend="eager", places=64), read(model, PROMPTS)
    write(steps, sequences, 3)
    assert not said and steps.how == "compiled"
    for own, prompt in zip(sequences, PROMPTS, strict=True):
        assert own.ids == [*prompt, *greedy(model, prompt, 4)]


def test_the_engine_answers_as_it_does_without(model, plain, monkeypatch):
    """Greedy and drawn, more requests than slots, of unlike lengths; and it goes on from what was kept."""
    monkeypatch.setenv("TRYPLICITY_STEPS", "captured")
    requests = [Request(prompt, Sampling(temperature=heat, seed=5), tokens, end_tokens=frozenset())
                for prompt, heat, tokens in zip(PROMPTS, (0, 0.8, 0, 1.0), (4, 9, 6, 7), strict=True)]
    engine = Engine(model, None, slots=3)
    try:
        assert engine.scheduler.fixed is not None
        answers = [[] for _ in requests]
        under_way = [engine.submit(request, lambda piece, own=own: own.extend(token.id for token in piece.tokens))
                     for request, own in zip(requests, answers, strict=True)]
        for generation in under_way:
            assert generation.wait(120)
        assert engine.scheduler.fixed.steps and not engine.scheduler.fixed.seated
        assert answers == [plain(model, request) for request in requests]
        onward = Request((*PROMPTS[1], *answers[1], 7), Sampling(temperature=0), 3, end_tokens=frozenset())
        assert list(engine.tokens(onward.prompt, onward.sampling, 3)) == plain(model, onward)
        assert engine.statistics()["cached_tokens_total"] >= len(PROMPTS[1]) + len(answers[1]) - 1
    finally:
        engine.close()


def test_rows_of_a_thread_that_dies_are_nobodys(model, plain, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_STEPS", "captured")
    engine, request = Engine(model, None, slots=2), Request(PROMPTS[0], Sampling(temperature=0), 200)
    try:
        for _ in range(2):
            hold, at_work = threading.Event(), threading.Event()

            def listener(piece, hold=hold, at_work=at_work):
                at_work.set()
                hold.wait(30)

            under_way = [engine.submit(request, listener) for _ in range(3)]  # one of them waits
            assert at_work.wait(30)
            dying = pytest.MonkeyPatch()
            dying.setattr(engine.scheduler, "_await_work", lambda: 1 / 0)
            hold.set()
            assert all(generation.wait(30) and generation.finish == "error" for generation in under_way)
            dying.undo()
            short = Request(PROMPTS[1], Sampling(temperature=0), 5, end_tokens=frozenset())
            assert list(engine.tokens(short.prompt, short.sampling, 5)) == plain(model, short)
    finally:
        engine.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_gives_the_same_text_and_probabilities_as_without(model, monkeypatch, seed):
    """All rows are chosen together, those with penalties too."""
    options = [{"top_p": 0.9}, {"temperature": 0.0}, {"presence_penalty": 0.5, "top_k": 30},
               {"top_k": 20, "min_p": 0.02}]
    requests = [Request(prompt, Sampling(**{"temperature": 0.9, "seed": seed} | own), 12, logprobs=alternatives,
                        end_tokens=frozenset())
                for prompt, own, alternatives in zip(PROMPTS, options, (2, None, 0, 5), strict=True)]

    def answers(how):
        monkeypatch.setenv("TRYPLICITY_STEPS", how)
        engine = Engine(model, None, slots=4)
        try:
            heard = [[] for _ in requests]
            under_way = [engine.submit(request, own.append) for request, own in zip(requests, heard, strict=True)]
            assert all(generation.wait(120) for generation in under_way)
            return [[token for piece in own for token in piece.tokens] for own in heard]
        finally:
            engine.close()

    drawn_together = []
    monkeypatch.setattr("tryplicity.inference.scheduler.next_tokens",
                        lambda logits_RV, samplers: drawn_together.append(samplers) or next_tokens(logits_RV, samplers))
    wanted, recorded = answers("eager"), answers("captured")
    assert any(sum(sampler is not None for sampler in samplers) == 4 for samplers in drawn_together)
    for ours, theirs in zip(recorded, wanted, strict=True):
        assert len(ours) == 12 and [token.id for token in ours] == [token.id for token in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprob == (None if other.logprob is None else pytest.approx(other.logprob, abs=1e-6))
            assert [number for number, _ in one.top] == [number for number, _ in other.top]


@pytest.mark.parametrize(("broken", "line"), [
    ("number", "layer 0 has a state that cannot be kept at one address"),
    ("address", "a layer puts other tensors in the place of its state's"),
    ("value", "of their size from the ordinary pass's")])
def test_what_cannot_be_done_so_goes_on_in_the_ordinary_way(model, monkeypatch, broken, line):
    sequences, said = read(model, PROMPTS[:2]), []
    mixer = type(model.layers[0].mixer.layer)
    if broken == "number":
        for own in sequences:
            own.state[0][0]["seen"] = own.read
    elif broken == "address":
        def elsewhere(self, x_BTD, *, state=None, doc_ids=None, forward=mixer.forward):
            if len(x_BTD) > 1 and state is not None and not isinstance(state, tuple):
                state["ssm"] = state["ssm"].clone()
            return forward(self, x_BTD, state=state, doc_ids=doc_ids)

        monkeypatch.setattr(mixer, "forward", elsewhere)
    else:
        monkeypatch.setattr(FixedPages, "attend", lambda self, q_BHK, *_: q_BHK)
    steps = FixedSteps(model, 4, "captured", said.append, places=64)
    before = [[t.clone() for t in tensors(own.state)] for own in sequences]
    with torch.no_grad():
        assert steps.write(sequences) is None and steps.write(sequences) is None
    assert len(said) == 1 and said[0].startswith("warning: steps of decoding are not recorded: ") and line in said[0]
    for own, was in zip(sequences, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(own.state), was, strict=True))
        assert own.read == len(own.ids) - 1


def test_where_steps_are_recorded(monkeypatch):
    monkeypatch.delenv("TRYPLICITY_STEPS", raising=False)
    assert way(torch.device("cuda")) == "compiled" and way(torch.device("cpu")) == "eager"
    monkeypatch.setenv("TRYPLICITY_STEPS", "quick")
    with pytest.raises(Exception, match="TRYPLICITY_STEPS=quick: it can be auto, eager, captured, compiled"):
        way(torch.device("cpu"))
