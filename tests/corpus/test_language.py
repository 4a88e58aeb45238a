"""Which language a text is in, on sentences whose language a reader knows."""

import json

import pytest

from tests.corpus.stories import story
from tryplicity import Document
from tryplicity.corpus import load_recipe
from tryplicity.corpus.download import download
from tryplicity.corpus.filtering import filter_corpus
from tryplicity.corpus.language import another_language, language

SENTENCES = {
    "en": "The river rises in the hills above the village, and for most of its length it is narrow.",
    "de": "Der Fluss entspringt in den Bergen oberhalb des Dorfes und ist auf weiten Strecken recht schmal.",
    "fr": "La rivière prend sa source dans les collines au-dessus du village et reste étroite sur son cours.",
    "zh": "这条河发源于村庄上方的山丘",
    "ru": "Река берёт начало в холмах над деревней и на большей части своего течения довольно узка.",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_language_is_known_by_a_sentence(name):
    found, sure = language(SENTENCES[name])
    assert found == name and sure > 0.5
    document = Document("x", SENTENCES[name], "text", "")
    assert another_language(document, ["en", "fr"]) == (None if name in ("en", "fr") else name)
    assert another_language(document, []) is None
    assert another_language(document._replace(domain="code"), ["xx"]) is None  # it is in none at all


@pytest.mark.parametrize("text", ["", "   \n ", "\ud800 lone", "12 34 56", "def f(x):\n    return x"])
def test_what_nobody_can_tell_stays(text):
    assert another_language(Document("x", text, "text", ""), ["en"]) is None


def test_another_language_is_left_out_of_a_corpus_and_counted(registry, recipe_file, texts, tmp_path):
    (texts / "900.txt").write_text(" ".join([SENTENCES["de"]] * 3), encoding="utf-8")
    (texts / "901.py").write_text("# Der Fluss entspringt in den Bergen oberhalb des Dorfes\nx = 1\n")
    folder = tmp_path / "c"
    download(load_recipe(recipe_file(judges="[]", more="languages: [en]\n"), registry), folder, lambda *_: None)
    summaries = filter_corpus(folder, registry, lambda *_: None)
    dropped = {reason: count for summary in summaries for reason, count in summary["dropped"].items()}
    assert dropped == {"language: de": 1}
    kept = json.loads((folder / "filtered" / "manifest.json").read_text())
    assert kept["documents"] == 61 and kept["bytes"] > len(story(0)) * 60 * 0.5
