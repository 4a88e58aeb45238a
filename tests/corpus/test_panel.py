"""The vote of several judges, against the rule written out."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tryplicity import Document, Judge, PluginFault, Verdict
from tryplicity.corpus.panel import Panel
from tryplicity.corpus.recipe import Portion, Recipe, Seat
from tryplicity.errors import UserError
from tryplicity.parts import Part

WORDS = {True: "keep", False: "drop", None: "none"}


class Clerk(Judge):
    """Says of each document what stands in it under its own name: `keep`, `drop` or `none`."""

    name = "clerk"

    @dataclass(frozen=True)
    class Config:
        place: int = 0
        cost: float = 1.0
        score: bool = False
        missing: bool = False

    def __init__(self, config):
        super().__init__(config)
        self.cost, self.asked = config.cost, []

    def load(self, device):
        if self.config.missing:
            raise UserError(f"clerk {self.config.place} is ill")

    def judge(self, documents):
        self.asked += [document.id for document in documents]
        said = [document.text.split()[self.config.place] for document in documents]
        if self.config.score:
            return [Verdict(float(word), None) for word in said]
        return [Verdict(1.0, {"keep": True, "drop": False, "none": None}[word], f"clerk {self.config.place} minds")
                for word in said]


def panel(*configs, votes=None, quorum=None, **seats):
    judges = [Seat(Part(Clerk, config), **seats) for config in configs]
    recipe = Recipe("r", 1, [Portion()], judges=judges, votes=votes, quorum=quorum)
    return Panel.seated(recipe, torch.device("cpu"))


def documents(*texts):
    return [Document(str(number), text, "text", "") for number, text in enumerate(texts)]


@given(st.integers(1, 5), st.data())
def test_the_vote_is_that_of_the_rule_and_no_judge_is_asked_in_vain(size, data):
    """A document is kept where the votes for it are at least as large a share of the opinions as `votes` are of the
    panel, rounded up; one that nobody has an opinion of is kept."""
    votes = data.draw(st.integers(1, size))
    opinions = data.draw(st.lists(st.sampled_from([True, False, None]), min_size=size, max_size=size))
    seated = panel(*(Clerk.Config(place=i, cost=float(i)) for i in range(size)), votes=votes)
    vote, = seated.vote(documents(" ".join(WORDS[o] for o in opinions)))
    said = [o for o in opinions if o is not None]
    assert vote.kept == (not said or said.count(True) >= math.ceil(votes * len(said) / size - 1e-9))
    asked = len(vote.verdicts)
    assert asked == size or asked >= 1
    if asked < size:  # whatever the rest had said
        for rest in ([True] * (size - asked), [False] * (size - asked), [None] * (size - asked)):
            all_said = [o for o in [*opinions[:asked], *rest] if o is not None]
            assert vote.kept == (not all_said or
                                 all_said.count(True) >= math.ceil(votes * len(all_said) / size - 1e-9))


def test_the_cheap_are_asked_first_and_the_dear_only_where_the_vote_is_open():
    seated = panel(Clerk.Config(place=0, cost=9.0), Clerk.Config(place=1, cost=1.0), Clerk.Config(place=2, cost=2.0))
    votes = seated.vote(documents("drop keep keep", "drop drop keep", "keep drop drop"))
    assert [vote.kept for vote in votes] == [True, False, False]
    asked = {judge.config.place: judge.asked for _, judge, _ in seated.judges}
    assert asked == {1: ["0", "1", "2"], 2: ["0", "1", "2"], 0: ["1"]}
    assert votes[1].reason == "clerk-2: clerk 1 minds" and votes[2].reason == "clerk-2: clerk 1 minds"


def test_a_score_is_a_vote_from_keep_at_on():
    seated = panel(Clerk.Config(score=True), keep_at=3.0)
    votes = seated.vote(documents("3.0", "2.99", "nan"))
    assert [vote.kept for vote in votes] == [True, False, True]
    assert votes[1].reason == "clerk: a score under 3"


def test_without_its_quorum_a_panel_does_not_sit():
    configs = [Clerk.Config(place=0), Clerk.Config(place=1, missing=True), Clerk.Config(place=2)]
    with pytest.raises(UserError, match="2 of 3 judges can work, 3 must: clerk-2: clerk 1 is ill"):
        panel(*configs)
    seated = panel(*configs, quorum=2)
    assert [name for name, *_ in seated.judges] == ["clerk-1", "clerk-3"] and "clerk-2" in seated.absent
    assert seated.vote(documents("keep drop keep"))[0].kept


def test_a_judge_that_does_not_answer_for_each_is_named():
    class Lazy(Clerk):
        name = "lazy"

        def judge(self, documents):
            return []

    recipe = Recipe("r", 1, [Portion()], judges=[Seat(Part(Lazy, Lazy.Config()))])
    with pytest.raises(PluginFault, match=r"judge 'lazy'.*0 answers for 1 documents"):
        Panel.seated(recipe, torch.device("cpu")).vote(documents("keep"))
