"""The judge that reads, against the engine's own account of a text's tokens."""

import math

import pytest
import torch

from tests.corpus.stories import story
from tryplicity import Document, TextScorer, load_plugins, train_reference
from tryplicity.corpus import load_recipe
from tryplicity.errors import UserError
from tryplicity.inference.engine import Engine

SMALL = "tests/small.yaml"


@pytest.fixture(scope="module")
def registry():
    return load_plugins().registry


@pytest.fixture(scope="module")
def run(registry, tmp_path_factory, request):
    place = tmp_path_factory.mktemp("reference")
    (place / "texts").mkdir()
    for number in range(40):
        (place / "texts" / f"{number}.txt").write_text(story(number))
    source = registry.part("source", {"type": "files", "path": str(place / "texts")})
    small = str(request.config.rootpath / SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRYPLICITY_CACHE", str(place / "cache"))
        made = train_reference(small, source.build(), place / "run", 6, ["heads=[]"])
        before = made.weights.stat().st_mtime_ns
        again = train_reference(small, source.build(), place / "run", 6, ["heads=[]"])
    assert again == made and made.weights.stat().st_mtime_ns == before  # what is trained is not trained again
    return made.folder


def judge(registry, **options):
    made = registry.part("judge", {"type": "perplexity", **options}).build()
    made.load(torch.device("cpu"))
    return made


def test_bits_per_byte_are_those_of_the_tokens_one_by_one(registry, run):
    """Texts of other lengths beside it, and one that is cut at the context, change nothing."""
    texts = [story(1, 1), story(2, 3)[:60], "x", story(3, 12), ""]
    scorer = TextScorer(run, registry)
    engine = Engine.load(run, registry, ternary=False)
    for text, found in zip(texts, scorer.bits_per_byte(texts), strict=True):
        ids = engine.tokenizer.encode(text, add_special_tokens=False).ids[:scorer.spec.context_length]
        if not ids:
            assert math.isnan(found)
            continue
        tokens = engine.score([2, *ids[:-1]]).tokens if len(ids) > 1 else []
        said = len(engine.tokenizer.decode(ids).encode())
        with torch.no_grad():
            logits_BTV = scorer.model(torch.tensor([[2, *ids[:-1]]]))
        nats = -logits_BTV.float().log_softmax(-1)[0, torch.arange(len(ids)), ids].sum().item()
        assert found == pytest.approx(nats / math.log(2) / said, rel=1e-4)
        heard = sum(token.logprob for token in tokens[1:])  # the engine says all but the last
        last = logits_BTV.float().log_softmax(-1)[0, -1, ids[-1]].item()
        assert -(heard + last) == pytest.approx(nats, rel=1e-3)
    engine.close()
    short, = scorer.bits_per_byte([texts[3]], tokens=5)
    whole, = scorer.bits_per_byte([engine.tokenizer.decode(scorer.tokenizer.encode(texts[3]).ids[:5])])
    assert short == pytest.approx(whole, rel=1e-4)


def test_what_costs_too_much_and_what_costs_too_little_is_not_kept(registry, run):
    documents = [Document("a", story(1), "text", ""), Document("b", "\u00e4\u00f6" * 200, "text", ""),
                 Document("c", "", "text", "")]
    prose, odd = TextScorer(run, registry).bits_per_byte([document.text for document in documents[:2]])
    assert prose < odd
    between = (prose + odd) / 2
    said = judge(registry, run=str(run), most=between).judge(documents)
    assert [verdict.keep for verdict in said] == [True, False, None]
    assert said[1].reason == "strange to the model" and said[0].score == pytest.approx(-prose, abs=1e-3)
    said = judge(registry, run=str(run), least=between, most=100).judge(documents[:2])
    assert [verdict.reason for verdict in said] == ["too easy for the model", ""]


def test_without_a_model_it_says_so(registry, tmp_path):
    with pytest.raises(UserError, match="give `run`, the folder of one"):
        judge(registry)
    with pytest.raises(UserError, match="nothing: there is no"):
        judge(registry, run=str(tmp_path / "nothing"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: r\nbytes: 1\nsources: [{source: python-docs}]\n"
                      "judges: [{judge: {type: perplexity, least: 3, most: 2}}]")
    with pytest.raises(UserError, match=r"recipe\.yaml:4:.*least: 3 is not under most \(2\)"):
        load_recipe(recipe, registry)
