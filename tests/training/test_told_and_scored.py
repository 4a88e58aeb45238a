"""What a training tells and measures, by hand: bits per byte, when it is scored, what is announced, the time."""

import json
import math
import time

import pytest
import torch
from torch.nn import functional as F

from tests.training.conftest import SPEC
from tests.training.plain import steps_of
from tryplicity import IGNORE, load_plugins
from tryplicity.builder import build
from tryplicity.errors import Refused
from tryplicity.model import initialise
from tryplicity.run import Run
from tryplicity.training import threads as threads_module
from tryplicity.training.checkpoint import TrainingProgress, load_weights
from tryplicity.training.evaluate import bits_per_byte
from tryplicity.training.loop import Budget, train
from tryplicity.training.metrics import MetricsFile, curve, read_lines
from tryplicity.training.pace import Pace
from tryplicity.training.threads import Threads
from tryplicity.training.watchers import Watcher

SMALL = ["layers=[attention]", "heads=[]"]


class Ear(Watcher):
    def __init__(self):
        self.notes, self.steps, self.scored = [], [], []

    def step(self, progress, metrics, spent, left):
        self.steps.append((progress.step, spent, left))

    def note(self, text):
        self.notes.append(text)

    def scoring(self, share, left):
        self.scored.append((share, left))

    @property
    def announced(self):
        return [note for note in self.notes if "tokens a row" in note]


def test_bits_per_byte_are_the_nats_of_the_targets_over_the_bytes(make_model, prepared):
    model, told = make_model("heads=[]").train(), []
    batches = list(prepared.held_out().batches(2, 48, 6))
    assert len(batches) == 3
    found = bits_per_byte(model, batches, precision="fp32", progress=told.append)
    assert told == [1, 2, 3] and model.training
    nats = size = 0.0
    with torch.no_grad():
        model.eval()
        for batch in batches:
            logits_BTV = model(batch.ids_BT, doc_ids_BT=batch.doc_ids_BT)
            nats += F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE,
                                    reduction="sum").item()
            size += batch.bytes
    assert found == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_scoring_that_is_stopped_counts_what_was_done_before(make_model, prepared):
    model, batches = make_model("heads=[]").eval(), list(prepared.held_out().batches(2, 48, 6))
    answers = iter([False, True])
    first = bits_per_byte(model, batches, precision="fp32", stopping=lambda: next(answers))
    assert first == bits_per_byte(model, batches[:1], precision="fp32") and not model.training
    assert bits_per_byte(model, batches, precision="fp32", stopping=lambda: True) is None
    assert bits_per_byte(model, [], precision="fp32") is None


def test_the_end_scores_so_many_rows_spread_over_all_and_says_so(go, make_build, prepared):
    ear = Ear()
    run = go("run", ["training.final_validation_rows=3", *SMALL], steps=1, watcher=ear)
    built = make_build(*SMALL)
    context = built.spec.context_length
    model, there = initialise(built.model, "cpu", 0), prepared.held_out().rows(context)
    load_weights(model, run.weights)
    *_, last = read_lines(run.metrics)
    assert last["validation_bits_per_byte"] == pytest.approx(
        bits_per_byte(model, prepared.held_out().batches(1, context, 3), precision="fp32"), rel=1e-5)
    [said] = [note for note in ear.notes if "spread evenly" in note]
    assert f"of 3 of {there:,} rows" in said and there > 3 and ear.scored[-1][0] == 1
    for enough in ([], [f"training.final_validation_rows={there}"]):
        ear = Ear()
        go(f"all-{len(enough)}", [*enough, *SMALL], steps=1, watcher=ear)
        assert not [note for note in ear.notes if "spread evenly" in note]


@pytest.mark.parametrize("budget, progress, spent", [
    (Budget(steps=8), TrainingProgress(step=2), 0.25), (Budget(tokens=1000), TrainingProgress(tokens=1500), 1.5),
    (Budget(minutes=2), TrainingProgress(seconds=30.0), 0.25),
    (Budget(minutes=0.5), TrainingProgress(seconds=30.0), 1.0)])
def test_the_share_of_a_budget(budget, progress, spent):
    assert budget.spent(progress) == spent


def scored(run, name="validation_bits_per_byte"):
    """The steps whose lines have a score, that of the end apart."""
    return [line["step"] for line in steps_of(run) if name in line]


def test_it_is_scored_when_it_is_due_and_at_the_end(go):
    run = go("run", [*SMALL, "training.validate_every=3", "training.validation_rows=2"], steps=9)
    assert scored(run) == [3, 6]        # not at 9: the end is scored on all of it
    assert [line["step"] for line in read_lines(run.metrics) if "loss" not in line] == [9]


def test_a_single_phase_is_not_announced_and_several_are_once_each(go):
    ear = Ear()
    go("one", SMALL, steps=3, watcher=ear)
    assert ear.announced == []
    phases = "phases=[{kind: pretrain}, {kind: pretrain}]"
    ear = Ear()
    go("two", [*SMALL, phases], steps=4, watcher=ear)
    assert ear.announced == ["pretrain: 48 tokens a row"]
    stages = "brain=[{type: neuro_curriculum, stages: [{name: a, share: 0.5, context: 0.5}, {name: b, share: 0.5}]}]"
    ear = Ear()
    go("staged", [*SMALL, stages], steps=4, watcher=ear)
    assert ear.announced == ["pretrain a: 24 tokens a row", "pretrain b: 48 tokens a row"]


def test_a_watcher_is_told_each_step_and_all_of_the_scoring(go):
    ear = Ear()
    go("run", SMALL, steps=4, watcher=ear)
    assert [(step, spent) for step, spent, _ in ear.steps] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    shares = [share for share, _ in ear.scored]
    assert shares == sorted(shares) and shares[-1] == 1.0 and shares[0] < 0.5 and ear.scored[-1][1] == 0.0
    assert all(left >= 0 for _, left in ear.scored)


def test_the_time_that_scoring_took_is_what_its_rest_is_reckoned_from(go, prepared, monkeypatch):
    """A row that takes far longer to score than to train on."""
    from tryplicity.training import evaluate

    on_device = evaluate.on_device
    monkeypatch.setattr(evaluate, "on_device", lambda *given: time.sleep(0.12) or on_device(*given))
    ear, rows = Ear(), prepared.held_out().rows(48)
    go("run", [*SMALL, "training.validate_every=4", "training.validation_rows=2"], steps=8, watcher=ear)
    assert ear.steps[-1][2] >= 0.99 * rows * 0.12 / 2       # two rows a batch, nothing of the budget is left


SEER = """
import json
from tryplicity import Brain, hookimpl

class Seer(Brain):
    '''Writes down which documents were seen, and how hard they were.'''
    name = "seer"

    def __init__(self, config):
        pass

    def observe(self, documents, losses, seed):
        with open({file!r}, "a") as file:
            file.write(json.dumps([documents.tolist(), losses.tolist()]) + "\\n")

@hookimpl
def tryplicity_brain_modules():
    return [Seer]
"""


def test_the_documents_that_were_learnt_from_are_observed_and_no_others(go, prepared, tmp_path):
    """Of a document that a row only has the end of, nothing is learnt, and there is no loss to tell."""
    (tmp_path / "seer.py").write_text(SEER.format(file=str(tmp_path / "seen")))
    settings = [*SMALL, "context_length=4", "hardware.batch=32", "brain=[seer]"]
    go("run", settings, steps=30, plugins=load_plugins((str(tmp_path / "seer.py"),)))
    stream, unlearnt = prepared.stream(seed=0), 0
    for step, line in enumerate((tmp_path / "seen").read_text().splitlines()):
        documents, losses = json.loads(line)
        batch = stream.batch(step * 32 * 4, 32, 4)
        learnt = {int(batch.documents[row][batch.doc_ids_BT[row, at]])
                  for row, at in (batch.targets_BT != IGNORE).nonzero().tolist()}
        unlearnt += len({int(d) for row in batch.documents for d in row} - learnt)
        assert documents == sorted(learnt) and len(losses) == len(documents)
        assert all(2 < loss < 9 for loss in losses)
    assert step == 29 and unlearnt > 0      # or this shows nothing


SLEEPER = """
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tryplicity import Brain, hookimpl

class Sleeper(Brain):
    '''Sleeps for a while after step 2.'''
    name = "sleeper"

    @dataclass(frozen=True)
    class Config:
        replayed: int = 0
        '''steps'''

    def __init__(self, config):
        self.config = config

    def wants_sleep(self, step):
        return step == 2

    def sleep(self, night):
        time.sleep(0.4)
        said = {"score": night.score(), "none": night.replay(np.array([0]), 0, 0.0)}
        return said | {"replayed": night.replay(np.array([0]), self.config.replayed, 0.0)}

@hookimpl
def tryplicity_brain_modules():
    return [Sleeper]
"""


@pytest.mark.parametrize("replayed", [1, 3])
def test_a_sleep_takes_time_and_tokens_of_the_budget_and_tells_mean_losses(go, tmp_path, replayed):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    plugins, ear = load_plugins((str(tmp_path / "sleeper.py"),)), Ear()
    settings = [*SMALL, f"brain=[{{type: sleeper, replayed: {replayed}}}]", "training.validation_rows=4"]
    run = go("run", settings, steps=4, plugins=plugins, watcher=ear)
    [slept] = [line["sleep"] for line in read_lines(run.metrics) if "sleep" in line]
    lines = steps_of(run)
    # nothing is learnt at a rate of nothing: each replayed loss is that of an untrained model's, and so is their mean
    assert slept["none"] == 0.0 and slept["replayed"] == pytest.approx(lines[1]["loss"], rel=0.15)
    assert 2 < slept["score"] < 5
    assert [line["tokens"] for line in lines] == [96 * n for n in (1, 2, 3 + replayed, 4 + replayed)]
    assert lines[2]["seconds"] - lines[1]["seconds"] >= 0.4
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    [said] = [note for note in ear.notes if note.startswith("slept")]
    assert f"score {slept['score']:.4g}" in said and "none 0" in said


def test_a_sleep_phase_right_after_a_sleep_that_a_module_wanted_is_that_sleep(make_build, prepared, tmp_path):
    """What is replayed are tokens of the budget: they end the phase, and the one that follows has been slept."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    plugins = load_plugins((str(tmp_path / "sleeper.py"),))
    built = build(str(SPEC), "cpu", plugins.registry, [
        *SMALL, "hardware.batch=2", "brain=[{type: sleeper, replayed: 3}]", "training.validation_rows=4",
        "phases=[{kind: pretrain}, {kind: sleep}, {kind: pretrain}]"])
    run = Run(tmp_path / "run")
    run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={}, tokenizer=prepared.tokenizer_path.read_text())
    outcome = train(built, prepared, run, Budget(tokens=10 * 96), plugins)
    assert [line["step"] for line in read_lines(run.metrics) if "sleep" in line] == [2]
    assert [line["tokens"] // 96 for line in steps_of(run)] == [1, 2, 6, 7, 8, 9, 10] and outcome.progress.sleeps == 1


def test_a_run_begins_with_the_threads_that_are_free_and_says_so(go, monkeypatch):
    for name in ("TRYPLICITY_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads_module, "cores", lambda: {0, 1, 2})
    monkeypatch.setattr(threads_module, "quota", lambda: None)
    monkeypatch.setattr(threads_module, "load", lambda allowed: None)
    before, ear = torch.get_num_threads(), Ear()
    torch.set_num_threads(2)
    try:
        go("run", SMALL, steps=1, watcher=ear)
    finally:
        torch.set_num_threads(before)
    assert ear.notes == ["2 threads on 3 cores; fewer while others keep them busy"]


def test_so_many_steps_in_a_row_without_a_number_end_it_and_no_fewer(go, capsys):
    hot = [*SMALL, "training.optimizer.learning_rate=1e6", "training.schedule={type: wsd, warmup_steps: 0}",
           "training.bad_steps=2", "training.gradient_clip=1e6"]
    with pytest.raises(Refused, match=r"not a number 2 steps in a row, .*nothing was saved yet"):
        go("run", hot, steps=30)
    said = [line for line in capsys.readouterr().err.splitlines() if "changed nothing" in line]
    assert len(said) == 2
    first, second = (int(line.split("tokens ")[1].split(" to ")[0]) for line in said)
    assert second == first + 96 and f"to {second - 1})" in said[0]


# --- windows of time ---

class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def paced(*steps, tokens=0, spent=0.0):
    """A pace after steps of (seconds, tokens, share of the budget)."""
    clock = Clock()
    pace = Pace(tokens, spent, clock)
    for seconds, more, share in steps:
        clock.now, tokens, spent = clock.now + seconds, tokens + more, spent + share
        pace.step(tokens, spent)
    return pace


def test_the_time_left_is_reckoned_from_the_last_minutes():
    """Five minutes, or the last step where that took longer: the first hour was slower and says nothing."""
    assert paced((400, 10, 0.1), (400, 10, 0.2)).seconds_left(0, 1) == pytest.approx(0.7 * 400 / 0.2)
    assert paced((400, 10, 0.1), (200, 10, 0.1), (200, 10, 0.2)).seconds_left(0, 1) == pytest.approx(0.6 * 400 / 0.3)
    slow, fast = [(10, 10, 0.001)] * 100, [(10, 10, 0.01)] * 40
    assert paced(*slow, *fast).seconds_left(0, 1) == pytest.approx(0.5 * 10 / 0.01)


def test_the_speed_is_that_of_the_last_half_minute():
    assert paced((100, 1000, 0.1), (10, 10, 0.1), (10, 10, 0.1), (10, 40, 0.1)).tokens_per_second() == 2.0
    assert paced((1, 7, 0.1)).tokens_per_second() == 7.0
    assert paced((50, 10, 0.1), (50, 100, 0.1)).tokens_per_second() == 2.0


def test_steps_of_a_millisecond_are_counted_whole():
    pace = paced(*[(0.001, 5, 0.0001)] * 1000)
    assert pace.tokens_per_second() == pytest.approx(5000) and len(pace.marks) < 25
    assert pace.seconds_left(0, 1) == pytest.approx(9.0)


def test_with_nothing_scored_a_row_takes_a_third_of_what_training_on_it_does():
    pace = paced((2, 100, 0.1), (2, 100, 0.1))
    assert pace.seconds_left(0, 50) == pytest.approx(16.0)
    assert pace.seconds_left(6, 50) == pytest.approx(16.0 + 6 * 50 * 0.02 / 3)
    pace.scored(4, 2.0)
    pace.scored(4, 6.0)
    assert pace.seconds_left(6, 50) == pytest.approx(16.0 + 6 * 1.0)
    assert paced((1, 1, 1.0)).seconds_left(0, 1) == 0.0 == paced((1, 1, 2.0)).seconds_left(0, 1)


# --- threads and charts ---

@pytest.mark.parametrize("cores, granted, torch_has, number", [
    ({0}, None, 4, 1), ({0, 1}, None, 4, 2), ({0, 1, 2, 3}, None, 2, 2), ({0, 1, 2, 3}, 1.5, 4, 1),
    ({0, 1, 2, 3}, 0.5, 4, 1), ({0, 1, 2, 3}, 3.0, 4, 3)])
def test_a_run_begins_with_as_many_threads_as_there_are_cores(monkeypatch, cores, granted, torch_has, number):
    for name in ("TRYPLICITY_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads_module, "cores", lambda: cores)
    monkeypatch.setattr(threads_module, "quota", lambda: granted)
    before = torch.get_num_threads()
    torch.set_num_threads(torch_has)
    try:
        with Threads(TrainingProgress().threads, look=lambda: None) as own:
            assert own.number == own.most == torch.get_num_threads() == number
            assert own.between_steps() is None      # where the load is not told
        with Threads(fixed=True) as own:
            assert own.number == torch.get_num_threads() == torch_has
        assert torch.get_num_threads() == torch_has
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("values, dots", [
    ([3.0, 2.0, 1.0, 0.0], ["\u2839\u2844", "\u2800\u28b3"]), ([1.0, 0.0], ["\u28b9", "\u28b8"]),
    ([0.0, 1.0], ["\u28b8", "\u28f8"]), ([2.0, 2.0], ["\u2809", "\u2800"]), ([5.0, math.nan, None, 5.0],
                                                                            ["\u2809", "\u2800"])])
def test_a_chart_by_hand(values, dots):
    """Braille, two columns and four rows of dots a character: each value's dot, and a line down or up to it from the
    height of the one before; the largest value on top, the least at the bottom."""
    said = [v for v in values if v is not None and math.isfinite(v)]
    assert curve(values, height=2).splitlines() == [f"{max(said):8.3f} ┤{dots[0]}", f"{min(said):8.3f} ┤{dots[1]}"]


def test_no_chart_of_less_than_two_values():
    assert curve([]) == curve([1.0]) == curve([1.0, math.inf]) == ""


def test_a_chart_is_as_wide_and_high_as_it_says():
    """72 characters and 12 lines; more values than dots are means."""
    drawn = curve([float(i % 7) for i in range(1000)]).splitlines()
    assert len(drawn) == 12 and {len(line) for line in drawn} == {9 + 1 + 72}
    assert [line[:9].strip() for line in drawn[1:-1]] == [""] * 10
    assert {len(line) for line in curve([1.0, 2.0, 3.0]).splitlines()} == {9 + 1 + 2}
    mean = curve([0.0, 2.0, 10.0, 10.0], width=1, height=2).splitlines()
    assert mean[0].startswith("  10.000") and mean[1].startswith("   1.000")


def test_metrics_are_json_whatever_is_in_them(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.write({"step": 1, "a": 1 / 3, "b": math.inf, "c": [math.nan, 2, {"d": -math.inf, "e": 0.1234567891}],
                "f": "x"})
    file.close()
    assert read_lines(tmp_path / "m.jsonl") == [
        {"step": 1, "a": 0.3333333, "b": None, "c": [None, 2, {"d": None, "e": 0.1234568}], "f": "x"}]


def test_a_sleep_that_is_to_be_slept_again_is_dropped_from_the_metrics(tmp_path):
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path, 0)
    for line in ({"step": 1}, {"step": 2}, {"step": 2, "sleep": {}}, {"step": 3}, {"step": 4},
                 {"step": 4, "sleep": {}}):
        file.write(line)
    file.close()
    for step, slept_at, left in ((4, 4, 6), (4, 2, 5), (3, 2, 4), (2, 2, 3), (2, -1, 2), (2, 1, 2)):
        copy = tmp_path / f"{step}.{slept_at}.jsonl"
        copy.write_text(path.read_text())
        MetricsFile(copy, step, slept_at).close()
        assert len(read_lines(copy)) == left, (step, slept_at)
