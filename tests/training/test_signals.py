"""Signals: a closed terminal saves as SIGTERM does; a second Ctrl-C says what it loses."""

import fcntl
import os
import pty
import select
import signal
import termios

import pytest

from tryplicity.cli import main
from tryplicity.run import Run
from tryplicity.training import checkpoint, saving
from tryplicity.training.metrics import read_lines
from tryplicity.training.process import StopSignals, exit_code

STOPPER = """
import os
from tryplicity import hookimpl

@hookimpl
def tryplicity_step_finished(step):
    if step == {step}:
        for number in {numbers}:
            os.kill(os.getpid(), number)
"""


@pytest.fixture
def stopped(command, tmp_path, capfd):
    """`stopped(7, SIGINT, SIGINT)`: the exit code and stderr of a training that gets these signals after that step."""

    def go(step, *numbers, budget=10):
        file = tmp_path / "stopper.py"
        file.write_text(STOPPER.format(step=step, numbers=[int(number) for number in numbers]))
        with pytest.raises(SystemExit) as end:
            main(command("run", "--steps", str(budget), "--plugin", str(file))[3:], prog_name="tryplicity")
        return end.value.code, capfd.readouterr().err

    return go


def test_only_documented_exit_codes():
    assert [exit_code(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == [130, 143, 143]


def test_a_second_ctrl_c_says_what_it_loses(stopped, tmp_path):
    code, said = stopped(7, signal.SIGINT, signal.SIGINT)
    assert code == 130 and "Ctrl-C again ends at once, without saving" in said
    assert "error: ended at once, without saving: 3 steps lost; the checkpoint of step 4 is kept" in said
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]


def test_a_second_ctrl_c_before_any_checkpoint_says_so(stopped):
    code, said = stopped(1, signal.SIGINT, signal.SIGINT)
    assert code == 130 and "1 step lost; there is no checkpoint yet" in said


def test_one_ctrl_c_and_any_number_of_sigterms_lose_nothing(stopped, tmp_path):
    code, said = stopped(7, signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
    assert code == 143  # by the last of them
    assert "lost" not in said and checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 7]


def test_a_signal_during_the_last_scoring_keeps_the_weights_and_resuming_scores(command, tmp_path, capfd, monkeypatch):
    """The budget is spent and saved; the score is what is missing."""
    from tryplicity.training.loop import checkpoint as saving

    save, once = saving.save_weights, [signal.SIGTERM]

    def save_and_stop(model, path, weights=None):
        save(model, path, weights)
        if path.parent.name == "run" and once:
            os.kill(os.getpid(), once.pop())

    monkeypatch.setattr(saving, "save_weights", save_and_stop)
    with pytest.raises(SystemExit) as end:
        main(command("run", "--steps", "3")[3:], prog_name="tryplicity")
    run = Run(tmp_path / "run")
    assert end.value.code == 143 and run.weights.is_file()
    assert "validation_bits_per_byte" not in read_lines(run.metrics)[-1]
    assert "interrupted; all is saved at step 3" in capfd.readouterr().out
    main(command("run", "--steps", "3", "--resume")[3:], prog_name="tryplicity", standalone_mode=False)
    assert read_lines(run.metrics)[-1]["validation_bits_per_byte"] > 0
    assert "held-out bits per byte:" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_checkpoint_is_written_costs_nothing(command, tmp_path, capfd, monkeypatch, number):
    """The one of step 4, which is half written when it comes; what is gone on with is as if it had not come."""
    write, once = saving.write_tensors, [number]

    def write_and_stop(path, tensors):
        if "step-4" in str(path) and path.name == "optimizer.safetensors" and once:
            os.kill(os.getpid(), once.pop())
        return write(path, tensors)

    main(command("whole", "--steps", "10")[3:], prog_name="tryplicity", standalone_mode=False)
    monkeypatch.setattr(saving, "write_tensors", write_and_stop)
    with pytest.raises(SystemExit) as end:
        main(command("run", "--steps", "10")[3:], prog_name="tryplicity")
    run = Run(tmp_path / "run")
    assert end.value.code == exit_code(number) and not once
    first, *rest = checkpoint.steps(run.checkpoints)
    assert first == 4 and all(checkpoint.damage(run.checkpoints / f"step-{step}") is None for step in (first, *rest))
    assert checkpoint.steps(run.checkpoints)[-1] == read_lines(run.metrics)[-1]["step"]  # no step is lost
    main(command("run", "--steps", "10", "--resume")[3:], prog_name="tryplicity", standalone_mode=False)
    assert run.weights.read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    capfd.readouterr()


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_costs_nothing(command, start, tmp_path):
    """As when an ssh session ends: SIGHUP, and whatever is printed from then on fails."""
    ours, theirs = pty.openpty()
    process = start(command("run", "--steps", "100000", "--set", "training.checkpoint_every=100000"), stdin=theirs,
                    stdout=theirs, stderr=theirs, start_new_session=True,
                    preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0))
    os.close(theirs)
    folder = tmp_path / "run"
    _read_until(process, ours, lambda: (folder / "metrics.jsonl").exists() and
                (folder / "metrics.jsonl").read_text().count("\n") > 5)
    os.close(ours)
    assert process.wait(60) == 143
    last = [line["step"] for line in read_lines(folder / "metrics.jsonl")][-1]
    assert checkpoint.steps(folder / "checkpoints") == [last]


def _read_until(process, terminal, done):
    """Keep the terminal's buffer from filling up."""
    while not done():
        assert process.poll() is None
        if select.select([terminal], [], [], 0.02)[0]:
            os.read(terminal, 65536)
