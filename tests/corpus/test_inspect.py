"""`tryplicity data inspect`: counts of what was put there, and held-out text that stands in the training text."""

import json
import random

import pytest

from tests.command_line import call
from tests.corpus.stories import story
from tryplicity import Document
from tryplicity.corpus import shards
from tryplicity.corpus.download import download
from tryplicity.corpus.overlap import overlap
from tryplicity.corpus.recipe import Recipe, load_recipe
from tryplicity.data.documents import HELD_OUT_SHARE, split_hash


def named(held_out, many):
    """Ids that the trainer holds out, or trains on."""
    found = [f"d/{n}" for n in range(2000) if (split_hash(f"d/{n}") < HELD_OUT_SHARE) == held_out]
    return found[:many]


def plainly(documents):
    """The same counts with sets of words."""
    def windows(text):
        words = text.lower().split()
        return [tuple(words[i:i + 13]) for i in range(len(words) - 12)]

    held = [d for d in documents if split_hash(d.id) < HELD_OUT_SHARE]
    trained = {window for d in documents if d not in held for window in windows(d.text)}
    counts = [(sum(window in trained for window in windows(d.text)), len(windows(d.text))) for d in held]
    return (len(held), sum(of for _, of in counts), sum(n for n, _ in counts), sum(n > 0 for n, _ in counts),
            sum(of > 0 and n >= of / 2 for n, of in counts))


@pytest.mark.parametrize("seed", range(5))
def test_overlap_is_what_sets_of_words_say(seed):
    rng = random.Random(seed)
    pool = [[rng.choice("abcdefghij") for _ in range(rng.randint(5, 60))] for _ in range(12)]
    documents = [Document(name, " ".join(rng.choice(pool) + rng.choice(pool)), "text", "")
                 for name in named(True, 8) + named(False, 20)]
    rng.shuffle(documents)
    said = overlap(lambda: iter(documents))
    assert tuple(said[key] for key in ("held_out_documents", "windows", "windows_in_training", "documents_with_any",
                                       "documents_with_half")) == plainly(documents)
    assert said["share"] == said["windows_in_training"] / said["windows"]
    assert all(a["share"] >= b["share"] for a, b in zip(said["worst"], said["worst"][1:], strict=False))


def test_of_more_held_out_text_than_is_looked_for_the_rest_is_no_training_text(monkeypatch):
    monkeypatch.setattr("tryplicity.corpus.overlap.MOST_BYTES", 1)
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    first, second = (Document(name, text, "text", "") for name in named(True, 2))
    assert overlap(lambda: iter([first, second]))["windows_in_training"] == 0
    trained = second._replace(id=named(False, 1)[0])
    assert overlap(lambda: iter([first, trained]))["windows_in_training"] == 1


def test_of_a_small_corpus_the_document_that_the_trainer_holds_out():
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    documents = [Document(name, text + f" {n}", "text", "") for n, name in enumerate(named(False, 4))]
    said = overlap(lambda: iter(documents))
    assert said["held_out_documents"] == 1 and (said["windows"], said["windows_in_training"]) == (3, 2)
    assert said["worst"] == [{"id": min((d.id for d in documents), key=split_hash), "share": 2 / 3}]
    assert overlap(lambda: iter([]))["share"] is None


def test_what_was_put_there_is_counted(registry, recipe_file, tmp_path, capfd):
    folder = tmp_path / "c"
    recipe = load_recipe(recipe_file(size="5000"), registry)
    assert isinstance(recipe, Recipe) and download(recipe, folder, lambda *told: None)
    raw = folder / "raw" / "stories"
    for path in shards.shards(raw):
        path.unlink()
    copied, *others = [story(n) for n in range(20)]
    words = copied.split()
    near = " ".join([*words[:-1], "otherwise"])
    texts = [copied, *others, copied, near]
    names = named(False, len(texts))
    documents = [Document(name, text, "code" if n % 2 else "text", "", float(n)) for n, (name, text) in
                 enumerate(zip(names, texts, strict=True))]
    documents.append(Document(named(True, 1)[0], copied + " and so on", "text", "", None))
    shards.write(shards.path_of(raw, 0), documents[:9], "stories")
    shards.write(shards.path_of(raw, 1), documents[9:], "stories")
    code, out, err = call(capfd, "data", "inspect", str(folder), "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["documents"] == sum(said["characters"].values()) == len(documents) and said["files"] == 2
    assert said["bytes"] == sum(len(d.text.encode()) for d in documents)
    assert said["domains"]["code"]["documents"] == sum(d.domain == "code" for d in documents)
    assert said["copies"] == 1 and said["near_copies"] == 2
    assert said["held_out"]["held_out_documents"] == said["held_out"]["documents_with_half"] == 1
    assert 0.8 < said["held_out"]["share"] < 1
    assert [one["quality"] for one in said["by_quality"]] == [0, 11, 21]
    code, out, _ = call(capfd, "data", "inspect", str(folder))
    assert code == 0 and "1 copies to the letter, 2 nearly so" in out and "13 words stand in the training text" in out
