"""A disk that fails for a while: what is told, what is kept, and when a signal must wait."""

import errno

import pytest

from tests.training.plain import steps_of
from tests.training.test_told_and_scored import SLEEPER, SMALL
from tryplicity import load_plugins
from tryplicity.errors import Refused
from tryplicity.training import checkpoint, saving
from tryplicity.training.metrics import read_lines


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_one_is(go, monkeypatch, capsys):
    write, failing = saving.write_tensors, {4, 6}

    def write_or_fail(path, tensors):
        if int(path.parent.name.split(".")[1].removeprefix("step-")) in failing:
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", write_or_fail)
    settings = [*SMALL, "training.checkpoint_every=2", "training.keep_checkpoints=9"]
    run = go("run", settings, steps=8)
    assert checkpoint.steps(run.checkpoints) == [2, 8] and run.weights.exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "could not be written" in line]
    assert [line.partition(":")[0] for line in said] == ["warning"] * 2
    assert ["step 4" in said[0], "step 6" in said[1]] == [True] * 2
    assert all("the newest complete one is step 2; training goes on" in line for line in said)
    failing |= {2, 8}
    with pytest.raises(Refused, match=r"step 8: .*could not be written .*there is no older one; free some"):
        go("other", settings, steps=8)
    assert capsys.readouterr().err.count("there is no older one; training goes on") == 4


def test_a_sleep_that_nothing_could_be_saved_before_is_slept_to_its_end(go, tmp_path, monkeypatch):
    """A signal in the middle of it must wait: there would be nothing to go on from."""
    text = SLEEPER.replace("time.sleep(0.4)", "os.kill(os.getpid(), signal.SIGTERM)")
    (tmp_path / "sleeper.py").write_text("import os\nimport signal\n" + text)
    plugins, write, failed = load_plugins((str(tmp_path / "sleeper.py"),)), saving.write_tensors, []

    def fail_once(path, tensors):
        if not failed:
            failed.append(True)
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", fail_once)
    run = go("run", [*SMALL, "brain=[{type: sleeper, replayed: 2}]", "training.validation_rows=2"], steps=4,
             plugins=plugins)
    [slept] = [line for line in read_lines(run.metrics) if "sleep" in line]
    assert failed and (slept["step"], slept["tokens"]) == (2, 4 * 96) and slept["sleep"]["replayed"] > 0
    assert [line["step"] for line in steps_of(run)] == [1, 2] and not run.weights.exists()
    assert checkpoint.read_progress(run.checkpoints / "step-2").slept_at == 2


def test_a_last_checkpoint_is_written_once_and_only_where_there_is_something_new(go, tmp_path):
    (tmp_path / "noting.py").write_text(f"""
from tryplicity import hookimpl

@hookimpl
def tryplicity_checkpoint_saved(step, checkpoint):
    with open({str(tmp_path / "saved")!r}, "a") as file:
        file.write(f"{{step}} {{checkpoint.name}}\\n")

@hookimpl
def tryplicity_run_finished(step, reason, scores):
    with open({str(tmp_path / "saved")!r}, "a") as file:
        file.write(f"{{step}} {{reason}} {{sorted(scores)}}\\n")
""")
    plugins = load_plugins((str(tmp_path / "noting.py"),))
    for name, steps, told in (("a", 4, ["2 step-2", "4 step-4"]), ("b", 5, ["2 step-2", "4 step-4", "5 step-5"])):
        go(name, [*SMALL, "training.checkpoint_every=2"], steps=steps, plugins=plugins)
        assert (tmp_path / "saved").read_text().splitlines() == [
            *told, f"{steps} budget ['validation_bits_per_byte']"]
        (tmp_path / "saved").unlink()
