"""The judge by meaning: its head is the least of what it minimises, and it says what it has learnt."""

import json

import numpy as np
import pytest
import torch

from tests.corpus.stories import story
from tests.plugins.judges.test_neural import classifier  # noqa: F401
from tryplicity import Document, load_plugins
from tryplicity.errors import UserError
from tryplicity_plugins.encoder import Encoder
from tryplicity_plugins.judges.embedding import RIDGE, fitted


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Prose, and the same in capitals."""
    place = tmp_path_factory.mktemp("sides")
    for name, change in (("good", str), ("bad", str.upper)):
        (place / name).mkdir()
        for number in range(30):
            (place / name / f"{number}.txt").write_text(change(story(number, 4)))
    return place


@pytest.fixture
def judge(sides, classifier, tmp_path):  # noqa: F811
    """Its encoder is a small BERT of random weights."""
    def made(**options):
        found = load_plugins().registry.part("judge", {
            "type": "embedding", "good": {"type": "files", "path": str(sides / "good")},
            "bad": {"type": "files", "path": str(sides / "bad")}, "model": str(classifier), **options}).build()
        found.folder = tmp_path / "judges" / "embedding"
        return found

    return made


def test_the_head_is_where_the_loss_has_no_slope():
    """Logistic regression with a ridge, both sides of the same weight: the gradient by hand is zero."""
    draw = np.random.default_rng(0)
    x_ND = draw.normal(size=(50, 4))
    good_N = x_ND @ np.array([1.0, -2.0, 0.5, 0.0]) + draw.normal(size=50) > 0.8
    weights_D, bias = fitted(x_ND, good_N)
    chance_N = 1 / (1 + np.exp(-(x_ND @ weights_D + bias)))
    pull_N = (chance_N - good_N) * np.where(good_N, 0.5 / good_N.sum(), 0.5 / (~good_N).sum())
    assert np.abs(x_ND.T @ pull_N + RIDGE * weights_D).max() < 1e-6 and abs(pull_N.sum()) < 1e-6
    with pytest.raises(UserError, match="good documents and bad ones"):
        fitted(x_ND, np.ones(50, dtype=bool))


def test_it_is_fitted_once_and_tells_the_two_apart(judge, sides, classifier):  # noqa: F811
    said = []
    judge().prepare(said.append)
    assert len(said) == 1 and said[0].startswith("a head fitted on 30 good and 30 bad documents; it is right about")
    judge().prepare(said.append)
    assert len(said) == 1
    made = judge()
    made.load(torch.device("cpu"))
    good = [Document(str(n), story(n, 4), "text", "") for n in range(100, 110)]
    bad = [document._replace(text=document.text.upper()) for document in good]
    verdicts = made.judge(good + bad)
    assert sum(verdict.keep for verdict in verdicts[:10]) >= 8 and sum(v.keep for v in verdicts[10:]) <= 2
    assert verdicts[-1].reason == "more like the bad documents"
    head = json.loads((made.folder / "head.json").read_text())
    vector_D = Encoder(classifier).encode([good[0].text])[0].astype(np.float64)
    chance = 1 / (1 + np.exp(-(vector_D @ head["weights"] + head["bias"])))
    assert verdicts[0].score == pytest.approx(chance, abs=2e-3)
    assert made.judge([good[3]])[0] == verdicts[3]  # whatever is judged beside it


def test_what_it_cannot_work_with(judge, tmp_path):
    made = judge()
    with pytest.raises(UserError, match=r"head\.json is missing; run tryplicity data filter"):
        made.load(torch.device("cpu"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("alone")
    with pytest.raises(UserError, match="1 documents are too few"):
        judge(bad={"type": "files", "path": str(tmp_path / "one")}).prepare(print)
    made = judge()
    made.folder = None
    with pytest.raises(UserError, match="name it in a recipe"):
        made.prepare(print)
