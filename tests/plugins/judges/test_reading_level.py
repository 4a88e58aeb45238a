"""How hard a text reads, as a vote."""

import math

import pytest

from tests.corpus.stories import story
from tryplicity import Document, load_plugins


def verdict(text, domain="text", **options):
    part = load_plugins().registry.part("judge", {"type": "reading_level", **options})
    judge = part.build()
    return judge.judge([Document("a", text, domain, "")])[0]


def test_prose_is_kept_with_its_grade_and_what_is_no_prose_is_not():
    # the index by hand: 4.71 x 4 letters a word + 0.5 x 10 words a sentence - 21.43 = 2.41
    plain = " ".join(["Word " + "word " * 8 + "word."] * 6)
    assert verdict(plain).score == pytest.approx(2.41, abs=0.6) and verdict(plain).keep
    assert verdict(story(3)).keep and verdict(story(3)).reason == ""
    endless = verdict(story(3, 40).replace(".", ""), most=5)
    assert (endless.keep, endless.reason) == (False, "reads like no sentences")
    single = verdict("He is on it. " * 40)
    assert (single.keep, single.reason, single.score) == (False, "reads like single words", 0)


def test_borders_are_kept_and_what_has_no_prose_is_nobodys_business():
    level = verdict(story(3)).score
    assert verdict(story(3), least=level).keep and verdict(story(3), most=level).keep
    assert not verdict(story(3), least=level + 0.1).keep and not verdict(story(3), most=level - 0.1).keep
    for text, domain in (("12 34 56", "text"), ("x = 1\n" * 40, "code")):
        said = verdict(text, domain)
        assert said.keep is None and math.isnan(said.score)


def test_no_grade_is_no_border():
    part = load_plugins().registry.part("judge", {"type": "reading_level", "least": 9, "most": 9})
    assert list(part.component.check(part.config, None)) == [
        ("least", "9 is not under most (9): nothing would ever be kept")]
