"""Rows made while the device is at work: the same training, whatever was foreseen."""

import json

import pytest

from tryplicity.errors import UserError
from tryplicity.training.ahead import Ahead
from tryplicity.training.session import Session


def test_what_was_foreseen_is_made_once_and_given_once():
    made = []
    ahead = Ahead(lambda x, y: made.append((x, y)) or [x, y])
    assert ahead(1, {"a": 2}) == [1, {"a": 2}]
    ahead.foresee(3, {"b": 4})
    assert len(made) == 2 and ahead(3, {"b": 4}) == [3, {"b": 4}] and len(made) == 2
    assert ahead(3, {"b": 4}) == [3, {"b": 4}] and len(made) == 3  # not kept for a second time


def test_another_question_has_its_own_answer():
    ahead = Ahead(lambda x: x + 1)
    ahead.foresee(1)
    assert ahead(5) == 6 and ahead(1) == 2


def test_who_asks_hears_what_is_wrong_and_nobody_before():
    def make(x):
        raise UserError(f"{x} is nothing")

    ahead = Ahead(make)
    ahead.foresee(1)
    with pytest.raises(UserError, match="1 is nothing"):
        ahead(1)


def test_a_training_that_looks_ahead_is_the_same(go, monkeypatch):
    """Line by line but for the times, through a change of stage, which is not foreseen."""
    stages = "brain=[{type: neuro_curriculum, stages: [{name: a, share: 0.5, context: 0.5}, {name: b, share: 0.5}]}]"

    def lines(name):
        run = go(name, [stages, "training.validate_every=100"], steps=4)
        found = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in found]

    plain, asked, foreseen = lines("plain"), [], []
    make = Session._rows_to_learn
    monkeypatch.setattr(Session, "_rows_to_learn", lambda *a: asked.append(a) or make(*a))
    foresee = Ahead.foresee
    monkeypatch.setattr(Ahead, "foresee", lambda self, *a: foreseen.append(a) or foresee(self, *a))
    monkeypatch.setattr(Session, "looks_ahead", True)
    assert lines("ahead") == plain and len({line.get("context_length") for line in plain} - {None}) == 2
    assert len(foreseen) == 4 and len(asked) == 6  # the first step, each step's guess, and the one that was wrong
