"""When a training ends, what it has cost, and that it ends in a step that cannot be waited for."""

import os
import re
import signal
import time

import pytest

from tests.command_line import call
from tryplicity.training import process
from tryplicity.training.checkpoint import TrainingProgress
from tryplicity.training.loop import Budget, Together
from tryplicity.training.metrics import read_lines
from tryplicity.training.process import Stopped, StopSignals
from tryplicity.world import World


def test_a_budget_is_spent_in_its_own_measure():
    progress = TrainingProgress(step=30, tokens=6000, seconds=1800.0)
    spent = [Budget(**given, dollars_per_hour=28.0).spent(progress) for given in (
        {"steps": 40}, {"tokens": 8000}, {"minutes": 40}, {"dollars": 28.0})]
    assert spent == [0.75, 0.75, 0.75, 0.5]
    assert Budget(steps=1, dollars_per_hour=28.0).cost(progress) == 14.0 and Budget(steps=1).cost(progress) == 0.0


def test_dollars_end_a_run_the_decay_with_them_and_the_cost_is_on_each_line(command, capfd, tmp_path):
    """The rate of a step is the schedule's, at the share that was spent between the step before and this one."""
    line = command("run", "--dollars", "0.02", "--set", "hardware.price_per_hour=60", "--set",
                   "training.validate_every=1", "--set",
                   "training.schedule={type: wsd, warmup_steps: 0, decay: 1.0, floor: 0.0}")
    code, out, err = call(capfd, *line[3:])
    *steps, last = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert code == 0 and "validation_bits_per_byte" in last
    for step in steps:
        assert step["dollars"] == pytest.approx(step["seconds"] / 60)
    assert all(step["dollars"] < 0.02 for step in steps[:-1])  # no step is begun with all of it spent
    spent = [0.0, *(step["dollars"] / 0.02 for step in steps)]
    for step, before, after in zip(steps, spent, spent[1:], strict=False):
        falling = [3e-3 * (1 - min(1.0, share) ** 0.5) for share in (before, after)]
        assert falling[1] - 1e-9 <= step["learning_rate"] <= falling[0] + 1e-9
    assert "  $0." in err and float(re.search(r" tokens, .*, \$(0\.\d\d)$", out, re.M)[1]) >= 0.02


def test_dollars_without_a_price_are_refused(command, capfd, tmp_path):
    code, _, err = call(capfd, *command("run", "--dollars", "5")[3:])
    assert code == 2 and "cpu has no price" in err and not (tmp_path / "run").exists()


def test_time_between_steps_is_part_of_the_budget():
    progress = TrainingProgress(seconds=100.0)
    together = Together(World(), StopSignals(), progress)
    time.sleep(0.05)  # of scoring, say
    assert not together.stopping() and progress.seconds >= 100.05


@pytest.fixture
def prompt(monkeypatch):
    monkeypatch.setattr(process, "PROMPT", 0.05)


def test_a_step_without_which_nothing_is_lost_is_ended_in_the_middle(prompt):
    with StopSignals() as signals:
        with pytest.raises(Stopped), signals.nothing_to_lose():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        assert signals.received == signal.SIGINT


@pytest.mark.parametrize("told", ["inside", "before", "unsure"])
def test_a_step_that_ends_in_time_or_is_worth_keeping_is_not(prompt, told):
    with StopSignals() as signals:
        with signals.nothing_to_lose(told != "unsure"):
            if told != "before":
                os.kill(os.getpid(), signal.SIGTERM)
            if told == "unsure":
                time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # what was to remind it comes to nothing now
        assert signals.received == signal.SIGTERM
