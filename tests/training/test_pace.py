"""What is printed of speed and time left, against a stopwatch."""

import re
import time

import pytest

from tryplicity import load_plugins
from tryplicity.run import Run
from tryplicity.training.loop import Budget, train
from tryplicity.training.pace import SHORT, Pace
from tryplicity.training.watchers import Watcher


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_speed_is_tokens_over_elapsed_time_and_not_a_mean_of_speeds():
    clock = Clock()
    pace = Pace(0, 0.0, clock)
    for step in range(1, 11):  # nine of a second and one of eleven: 1000 tokens in 20 s
        clock.now += 11.0 if step == 5 else 1.0
        pace.step(100 * step, step / 10)
    assert pace.tokens_per_second() == pytest.approx(1000 / 20)


def test_speed_follows_within_a_window():
    clock = Clock()
    pace = Pace(0, 0.0, clock)
    tokens = 0
    for step in range(100):
        clock.now += 1.0
        tokens += 100 if step < 50 else 10
        pace.step(tokens, step / 200)
    assert SHORT < 50 and pace.tokens_per_second() == pytest.approx(10.0)
    clock.now += 500.0  # a step that takes longer than the window
    pace.step(tokens + 1000, 0.6)
    assert pace.tokens_per_second() == pytest.approx(2.0)


def test_the_time_left_is_the_rest_of_the_budget_and_then_the_scoring():
    clock = Clock()
    pace = Pace(5000, 0.5, clock)  # a run that goes on at half
    for step in range(1, 6):
        clock.now += 2.0
        pace.step(5000 + 100 * step, 0.5 + 0.02 * step)
    # 0.1 of the budget in 10 s: 0.4 take 40 s; a row of 50 tokens takes 50 * 0.02 / 3 s
    assert pace.seconds_left(0, 50) == pytest.approx(40.0)
    assert pace.seconds_left(300, 50) == pytest.approx(40.0 + 300 / 3)
    pace.scored(10, 5.0)  # half a second a row, as measured
    assert pace.seconds_left(300, 50) == pytest.approx(40.0 + 150.0)


SLOW = """
import time
from tryplicity import hookimpl

@hookimpl
def tryplicity_step_finished(step):
    time.sleep(0.6 if step % 3 == 0 else 0.05)
"""


def test_a_run_with_a_slow_hook_is_as_fast_as_a_stopwatch_says(make_build, prepared, tmp_path, monkeypatch):
    """Whatever the machine is doing: speed and time left are compared with the same seconds."""
    from tryplicity.training import evaluate

    (tmp_path / "slow.py").write_text(SLOW)
    said, scored = [], []

    class Stopwatch(Watcher):
        def step(self, progress, metrics, spent, left):
            said.append((time.perf_counter(), progress.tokens, metrics["tokens_per_second"], left))

        def scoring(self, share, left):
            scored.append((time.perf_counter(), share, left))

    on_device = evaluate.on_device
    monkeypatch.setattr(evaluate, "on_device", lambda *given: time.sleep(0.25) or on_device(*given))  # slow to score
    build = make_build("layers=[attention]", "heads=[]", "training.validate_every=5", "training.validation_rows=8")
    train(build, prepared, Run(tmp_path / "run"), Budget(steps=12), load_plugins((str(tmp_path / "slow.py"),)),
          watcher=Stopwatch())
    ended = time.perf_counter()
    for at, tokens, speed, left in said[5:]:
        begun, before = next((then, count) for then, count, _, _ in said if then >= at - SHORT)
        assert 0.4 < speed / ((tokens - before) / (at - begun)) < 2.5
        assert 0.2 * (ended - at) < left < 5 * (ended - at)
    assert scored[0][1] < 0.5 and scored[-1][1:] == (1.0, 0.0)
    middle = scored[len(scored) // 2]
    assert 0.2 * (ended - middle[0]) < middle[2] < 5 * (ended - middle[0])


def test_the_lines_print_what_was_measured(capsys):
    from types import SimpleNamespace

    from tryplicity.pages import _Lines

    lines = _Lines()
    for step, speed in enumerate((100.0, 7000.0), start=1):
        lines.step(SimpleNamespace(step=step), {"loss": 3.0, "tokens_per_second": speed,
                                                "validation_bits_per_byte": 2.0}, 0.5, 125.0)
    lines.last = 0.0
    lines.scoring(0.25, 90.0)
    printed = capsys.readouterr().err.splitlines()
    assert [re.search(r"([\d,]+) tokens/s", line)[1] for line in printed[:2]] == ["100", "7,000"]
    assert "2m05s left" in printed[0] and printed[2] == "scoring held-out text   25%  1m30s left"
