"""The curriculum over the real loader: reading level, mixture, length and boundaries of each stage."""

import json

import numpy as np
import pytest
import torch

from tryplicity import Document, Source, UserError
from tryplicity.data import load_tokenizer, prepare
from tryplicity.data.mixture import Mixture
from tryplicity.run import Run
from tryplicity.training.loop import Budget, train
from tryplicity.training.metrics import read_lines
from tryplicity_plugins.brain.neuro_curriculum import NeuroCurriculum, StageConfig

CONTEXT = 48
KINDS = {   # by how they read; the number in each text tells the documents apart
    "easy": "The cat sat on the mat and saw a red dog {0}. The dog ran to the big tree. The cat had a nap by the door. "
            "Then it was time to eat and they sat down.",
    "middle": "The river begins in the mountains {0} and flows through three small towns before it reaches the sea. In "
              "spring the melting snow makes it rise, and farmers open the gates to water their fields.",
    "hard": "Notwithstanding considerable methodological heterogeneity {0}, several epidemiological investigations "
            "consistently demonstrate statistically significant associations between socioeconomic disadvantage and "
            "deteriorating cardiovascular outcomes, necessitating comprehensive interdisciplinary interventions.",
    "nothing": "x_{0} = f(y)\nz += 12 * [a, b]\n",
}
#: up to grade 6, up to grade 10, any, any
ALLOWED = {"infancy": {"easy"}, "childhood": {"easy", "middle"}, "adolescence": {*KINDS}, "mastery": {*KINDS}}
DOMAINS = ("text", "code", "math")


class Graded(Source):
    name = "graded"

    def __init__(self):
        pass

    def fingerprint(self):
        return "1"

    def documents(self):
        for i in range(360):
            kind, domain = list(KINDS)[i // 3 % 4], DOMAINS[i % 3]
            text = KINDS[kind].format(i)
            if domain == "code" and kind != "nothing":
                text = f'def function_{i}():\n    """{text}"""\n    return {i}\n'
            yield Document(f"{kind}/{i}", text, domain, "")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(Graded(), 300, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def documents(prepared):
    return list(prepared.collection.documents(held_out=False))


@pytest.fixture(scope="module")
def curriculum():
    return NeuroCurriculum(NeuroCurriculum.Config())


def every_stage(curriculum):
    return [curriculum.stage(spent, CONTEXT) for spent in (0.05, 0.2, 0.5, 0.8)]


def test_the_default_stages_are_those_of_the_mission(curriculum):
    stages = [curriculum.stage(spent, 4096) for spent in (0.05, 0.2, 0.5, 0.8)]
    assert [s.name for s in stages] == ["infancy", "childhood", "adolescence", "mastery"]
    assert [s.context_length for s in stages] == [512, 2048, 4096, 4096]
    assert [s.max_grade for s in stages] == [6, 10, None, None]
    assert [[round(100 * s.mixture[d]) for d in DOMAINS] for s in stages] == [
        [90, 10, 0], [75, 15, 10], [65, 20, 15], [50, 25, 25]]
    assert [s.learning_rate_factor for s in stages] == [0.5, 1, 1, 0.7]
    assert [s.factors for s in stages] == [{"hebbian_loss": factor} for factor in (1, 0.5, 0.2, 0.1)]


@pytest.mark.parametrize("total", [10, 30, 1000, 12345, 2_000_000])
def test_a_stage_begins_exactly_where_its_share_does(curriculum, total):
    """Counted in whole steps or tokens, without a rounding of the shares' sums."""
    for tenths, before, after in ((1, "infancy", "childhood"), (3, "childhood", "adolescence"),
                                  (6, "adolescence", "mastery")):
        first = -(-tenths * total // 10)    # the first step at which so many tenths are spent
        assert curriculum.stage(first / total, CONTEXT).name == after
        assert curriculum.stage((first - 1) / total, CONTEXT).name == before
    assert curriculum.stage(0.0, CONTEXT).name == "infancy"
    assert curriculum.stage(1.0, CONTEXT) == curriculum.stage(1.7, CONTEXT) == curriculum.stage(0.6, CONTEXT)


@pytest.mark.parametrize("number", range(4))
def test_a_stage_delivers_only_what_it_may(prepared, documents, curriculum, number):
    stage = every_stage(curriculum)[number]
    mixture = Mixture.graded(prepared, 0, stage.mixture, stage.max_grade)
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    positions, seen, rows = {}, set(), dict.fromkeys(DOMAINS, 0)
    for _ in range(25):
        batch, positions = mixture.batch(positions, 8, stage.context_length)
        assert batch.ids_BT.shape == (8, stage.context_length)
        for ids_T, doc_ids_T, numbers in zip(batch.ids_BT, batch.doc_ids_BT, batch.documents, strict=True):
            domain, = {documents[number].domain for number in numbers}
            rows[domain] += 1
            for place, number in enumerate(numbers):
                piece = tokenizer.decode(ids_T[doc_ids_T == place].tolist(), skip_special_tokens=True)
                assert piece in documents[number].text
                seen.add(documents[number].id.partition("/")[0])
    assert seen == ALLOWED[stage.name] and mixture.warning is None
    for domain in DOMAINS:
        assert abs(rows[domain] / 200 - stage.mixture[domain]) < 0.02


def test_a_stage_that_was_stopped_goes_on_with_the_same_rows(prepared, curriculum):
    """Stopped after 3 of 7 steps of childhood, all that is left are the positions in the checkpoint."""
    whole, stopped, positions = [], [], {}
    for step in range(14):
        stage = every_stage(curriculum)[step // 7]
        batch, positions = Mixture.graded(prepared, 0, stage.mixture, stage.max_grade).batch(
            positions, 4, stage.context_length)
        whole.append(batch)
        if step == 9:
            checkpoint = json.dumps(positions)
    positions = json.loads(checkpoint)
    stage = curriculum.stage(0.2, CONTEXT)
    for _ in range(10, 14):
        batch, positions = Mixture.graded(prepared, 0, stage.mixture, stage.max_grade).batch(
            positions, 4, stage.context_length)
        stopped.append(batch)
    for a, b in zip(whole[10:], stopped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a.bytes == b.bytes
        assert all(np.array_equal(x, y) for x, y in zip(a.documents, b.documents, strict=True))


def test_a_run_goes_through_the_stages(registry, make_build, prepared, tmp_path):
    from tryplicity import load_plugins

    build, run = make_build("brain=[hebbian_loss, neuro_curriculum]"), Run(tmp_path / "run")
    run.create(spec=build.spec.as_yaml(), hardware="", build={}, data={},
               tokenizer=prepared.tokenizer_path.read_text())
    train(build, prepared, run, Budget(steps=10), load_plugins())
    lines = [line for line in read_lines(run.metrics) if "loss" in line]
    assert [line["stage"] for line in lines] == (
        ["infancy"] + ["childhood"] * 2 + ["adolescence"] * 3 + ["mastery"] * 4)
    assert [line["context_length"] for line in lines] == [6, 24, 24] + [48] * 7
    rate = {line["stage"]: line["learning_rate"] for line in lines[5:7]}    # warmed up, not yet decaying
    assert rate["mastery"] == pytest.approx(0.7 * rate["adolescence"])
    assert all(np.isfinite(line["loss"]) for line in lines)


def stages(*entries):
    return f"brain=[{{type: neuro_curriculum, stages: [{', '.join(entries)}]}}]"


@pytest.mark.parametrize(("setting", "message"), [
    (stages("{name: a, share: 0.5}", "{name: b, share: 0.6}"), r"stages: .* sum to 1\.1; they must sum to 1"),
    (stages("{name: a, share: 1, context: 0.01}"),
     r"stages\[0\]\.context: 0\.01 of context_length 48 is not even 2 tokens; 0\.0417 is"),
    (stages("{name: a, share: 0.5}", "{name: b, share: 0.5, mixture: {text: 0.5, code: 0.4}}"),
     r"stages\[1\]\.mixture: the shares of the domains sum to 0\.9; they must sum to 1"),
    (stages("{name: a, share: 1, mixture: {text: 0.5, coed: 0.5}}"),
     r"stages\[0\]\.mixture\.coed: no domain is called coed; there are: text, code, math"),
    (stages("{name: a, share: 1, shar: 1}"), r"stages\[0\]\.shar: unknown key \(did you mean share\?\)"),
    (stages("{name: a, share: 1, factors: {hebbian_loss: -1}}"), r"factors\.hebbian_loss: expected a number from 0"),
    (stages("{name: a, share: 0.5}", "{name: a, share: 0.5}"), r"stages\[1\]\.name: a is a stage already"),
    (stages(), "there are no stages; name at least one"),
])
def test_impossible_stages_are_refused_where_they_stand(make_spec, setting, message):
    with pytest.raises(UserError, match=message):
        make_spec(setting)


def test_a_mistake_inside_a_stage_has_its_line_and_column(registry, tmp_path):
    from pathlib import Path

    from tryplicity.spec import load_spec

    small = (Path(__file__).parents[2] / "small.yaml").read_text()
    file = tmp_path / "spec.yaml"
    file.write_text(f"{small}brain:\n- type: neuro_curriculum\n  stages:\n  - {{name: a, share: 0.5}}\n"
                    "  - name: b\n    share: 0.5\n    context: 0.01\n")
    line = len(small.splitlines()) + 7
    with pytest.raises(UserError, match=rf"spec\.yaml:{line}:14: brain\[0\]\.stages\[1\]\.context: 0\.01 of"):
        load_spec(str(file), registry)


def test_stages_of_ones_own(make_spec):
    part, = make_spec(stages(
        "{name: words, share: 0.25, context: 0.5, max_grade: 8, tokens_per_step: 96, factors: {pull: 2}}",
        "{name: books, share: 0.75, mixture: {text: 1}}")).brain
    curriculum = part.build()
    first, second = curriculum.stage(0.2499, CONTEXT), curriculum.stage(0.25, CONTEXT)
    assert (first.name, first.context_length, first.max_grade, first.tokens_per_step, first.factors) == (
        "words", 24, 8.0, 96, {"pull": 2.0})
    assert first.mixture is None and first.learning_rate_factor == 1
    assert (second.name, second.context_length, second.max_grade, second.mixture) == ("books", 48, None, {"text": 1.0})


def test_a_third_written_in_decimals_is_a_third():
    config = NeuroCurriculum.Config((StageConfig("a", 1.0, context=0.333333333),))
    assert not list(NeuroCurriculum.check(config, type("Site", (), {"context_length": 48})))
    assert NeuroCurriculum(config).stage(0, 48).context_length == 16
