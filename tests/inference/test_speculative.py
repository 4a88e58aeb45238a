"""Guessing ahead changes no token: whether the guesses are right, wrong, or right by half."""

import random

import pytest
import torch

from tryplicity.components import Head
from tryplicity.errors import UserError
from tryplicity.inference.engine import Engine, Request
from tryplicity.inference.sampler import Sampling
from tryplicity.inference.speculative import MOST_UNREAD, Drafter

NO_END = frozenset()


def ask(start, tokens, sampling):
    prompt = tuple(random.Random(start).randrange(6, 300) for _ in range(20))
    return Request(prompt, sampling, tokens, end_tokens=NO_END)


def tokens(engine, request):
    return [token.id for piece in engine.generate(request) for token in piece.tokens]


class Oracle:
    """In place of the heads: guesses from the text as it will be, wrong in a share of places."""

    def __init__(self, engine, wrong, ahead=3):
        self.engine, self.dice, self.wrong, self.ahead = engine, random.Random(0), wrong, ahead
        self.drafted = self.accepted = 0

    def tell(self, request, text):
        self.text, self.size = text, len(request.prompt)

    def __call__(self, h_D):
        [sequence] = self.engine.scheduler._active
        at = len(sequence.ids) - self.size
        right = self.text[at:at + self.ahead]
        return [token if self.dice.random() >= self.wrong else (token + 1) % 300 for token in right]


SAMPLINGS = [Sampling(temperature=0), Sampling(temperature=1.0, seed=1),
             Sampling(temperature=0.8, top_p=0.9, presence_penalty=0.5, repetition_penalty=1.1, seed=2)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalties"])
def test_the_heads_of_a_model(packed_model, plain, sampling):
    engine = Engine(packed_model, None, speculative=True)
    request = ask(0, 40, sampling)
    assert tokens(engine, request) == plain(packed_model, request)
    assert engine.statistics()["drafted_total"] > 10


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalties"])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_right_and_wrong_guesses(packed_model, plain, sampling, wrong):
    engine = Engine(packed_model, None, speculative=True)
    oracle = engine.scheduler.drafter = Oracle(engine, wrong)
    passes = []
    handle = packed_model.embedding.register_forward_hook(lambda module, ids, out: passes.append(ids[0].shape[1]))
    request = ask(1, 41, sampling)
    text = plain(packed_model, request)
    passes.clear()
    oracle.tell(request, text)
    assert tokens(engine, request) == text
    handle.remove()
    said = engine.statistics()
    assert said["drafted_total"] > 0
    if wrong == 0:  # the prompt; then each pass gives four tokens
        assert said["accepted_total"] == said["drafted_total"] == 30 and passes == [20, *[4] * 10]
    if wrong == 1:
        assert said["accepted_total"] == 0 and len(passes) > 41 and max(passes[1:]) <= MOST_UNREAD + 3
    if 0 < wrong < 1:
        assert 0 < said["accepted_total"] < said["drafted_total"] and len(passes) < 41


def test_a_second_one_joins_and_leaves(packed_model, plain):
    """Alone it guesses, together they do not; the one that was guessing goes on from wrong guesses too."""
    engine = Engine(packed_model, None, speculative=True)
    requests = [ask(0, 60, SAMPLINGS[1]), ask(1, 10, SAMPLINGS[1]), ask(2, 15, SAMPLINGS[0])]
    heard, generations = [[] for _ in requests], []

    def listener(number):
        def hear(piece):
            heard[number].extend(token.id for token in piece.tokens)
            if number == 0 and len(heard[0]) in (10, 40) and len(generations) < 3:
                generations.append(engine.submit(requests[len(generations)], listener(len(generations))))
        return hear

    generations.append(engine.submit(requests[0], listener(0)))
    assert generations[0].wait(60) and all(generation.wait(60) for generation in generations)
    assert heard == [plain(packed_model, request) for request in requests]
    assert engine.statistics()["drafted_total"] > 0


def test_the_next_turn_goes_on_from_what_was_read(packed_model, plain):
    engine = Engine(packed_model, None, speculative=True)
    oracle = engine.scheduler.drafter = Oracle(engine, 0.4)
    request = ask(1, 30, SAMPLINGS[0])
    text = plain(packed_model, request)
    oracle.tell(request, text)
    assert tokens(engine, request) == text
    after = Request((*request.prompt, *text, 50, 60), SAMPLINGS[0], 20, end_tokens=NO_END)
    oracle.tell(after, plain(packed_model, after))
    assert tokens(engine, after) == oracle.text
    new = engine.statistics()["prompt_tokens_total"] - 20
    assert 3 <= new <= 3 + MOST_UNREAD + 4  # beside the new ones at most those after the last wrong guess


def test_ending_in_the_middle_of_right_guesses(packed_model, plain):
    engine = Engine(packed_model, None, speculative=True)
    oracle = engine.scheduler.drafter = Oracle(engine, 0.0)
    whole = plain(packed_model, ask(3, 40, SAMPLINGS[1]))
    for at in range(8, 14):
        end = frozenset({whole[at]})
        request = Request(ask(3, 40, SAMPLINGS[1]).prompt, SAMPLINGS[1], 40, end_tokens=end)
        oracle.tell(request, whole)
        assert tokens(engine, request) == whole[:whole.index(whole[at])] == plain(packed_model, request)
    for most in range(1, 7):
        request = ask(3, most, SAMPLINGS[1])
        oracle.tell(request, whole)
        assert tokens(engine, request) == whole[:most]


def test_a_draft_is_what_the_heads_say(packed_model):
    h_D = torch.randn(32, generator=torch.Generator().manual_seed(0))
    [head] = packed_model.heads.values()
    with torch.no_grad():
        wanted = [int((depth(h_D[None, None])[0, 0] @ packed_model.unembedding_VD.T).argmax()) for depth in head.depths]
        assert Drafter(packed_model)(h_D) == wanted and len(wanted) == 2


def test_a_model_without_such_heads_says_so(make_packed):
    with pytest.raises(UserError, match="no head of this model can guess ahead"):
        Engine(make_packed("heads=[]"), None, speculative=True)


class Ahead(Head):
    """A stranger's, which sees so many tokens ahead, or for once none."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, h_BTD, targets, unembedding_VD):
        raise NotImplementedError

    def draft(self, h_BTD):
        steps = torch.arange(1.0, self.tokens + 1)
        return None if not self.tokens else torch.stack([h_BTD.roll(int(step), -1) for step in steps], dim=-2)


def test_of_several_heads_the_one_that_sees_furthest_guesses(make_packed, plain):
    model, h_D = make_packed(), torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert len(Drafter(model)(h_D)) == 2
        model.heads.update({"none": Ahead(0), "four": Ahead(4), "one": Ahead(1)})
        wanted = [int((h_D.roll(step) @ model.unembedding_VD.T).argmax()) for step in (1, 2, 3, 4)]
        assert Drafter(model)(h_D) == wanted
    engine = Engine(model, None, speculative=True)
    assert tokens(engine, ask(0, 20, SAMPLINGS[0])) == plain(model, ask(0, 20, SAMPLINGS[0]))
    assert engine.statistics()["drafted_total"] >= 4
    engine.close()


def test_heads_of_which_none_has_a_guess_leave_it_to_plain_decoding(make_packed, plain):
    model = make_packed("heads=[]")
    model.heads["none"] = Ahead(0)
    engine = Engine(model, None, speculative=True)
    assert tokens(engine, ask(0, 5, SAMPLINGS[0])) == plain(model, ask(0, 5, SAMPLINGS[0]))
    assert engine.statistics()["drafted_total"] == 0
    engine.close()
