"""One training in a run folder at a time; nothing of killed ones stays; old weights are never written over."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from tryplicity.cli import main
from tryplicity.errors import Refused, UserError
from tryplicity.files import clear_folders, locked, whole_folder
from tryplicity.planner.memory import Saving
from tryplicity.run import Run
from tryplicity.training.folder import alone, check_free, check_room


def call(capfd, line):
    """Exit code and stderr of a command line, in this process."""
    with pytest.raises(SystemExit) as end:
        main(line[3:], prog_name="tryplicity")
    return end.value.code, capfd.readouterr().err


def test_a_second_training_is_turned_away_and_one_that_was_killed_holds_nobody_up(command, start, wait_for_steps,
                                                                                 tmp_path, capfd):
    folder, many = tmp_path / "run", ["--steps", "100000", "--set", "training.checkpoint_every=2"]
    process = start(command("run", *many))
    wait_for_steps(process, folder, 4)
    process.send_signal(signal.SIGSTOP)  # it is there, and takes no processor from this test
    for options in ([*many, "--resume"], many):
        code, said = call(capfd, command("run", *options))
        assert code == 2 and f"a training is at work there (process {process.pid} on " in said, said
    with pytest.raises(SystemExit) as read:  # reading needs no lock
        main(["brain", str(folder), "--json"])
    assert read.value.code == 0 and json.loads(capfd.readouterr().out)["step"] >= 4
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = folder / "checkpoints" / ".step-9999.77-0123abcd.tmp"  # as if it had been in the middle of one
    left.mkdir()
    (left / "optimizer.safetensors").write_bytes(b"half" * 1000)
    (folder / ".model.safetensors.tmp-elsewhere-1-0123abcd").write_bytes(b"half" * 250_000)
    before = os.umask(0o027)
    try:
        main(command("run", "--steps", "6", "--resume")[3:], prog_name="tryplicity", standalone_mode=False)
    finally:
        os.umask(before)
    said = re.search(r"note: .*removed what killed trainings had not finished writing \((\d+) file.*, ([\d.]+) MB\)",
                     capfd.readouterr().err)
    assert int(said[1]) >= 2 and float(said[2]) >= 1.0  # more where it was killed in the middle of a checkpoint
    assert not [path.name for path in folder.rglob(".*")] and not (folder / "lock").exists()
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    for path in (folder / "model.safetensors", newest / "optimizer.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) in (0o640, 0o644), path  # a checkpoint may be of before the umask
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o640


HOLDING = """
import sys
from pathlib import Path
from tryplicity.files import locked
with locked(Path(sys.argv[1])) as other:
    print(other, flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_one_processes_and_goes_with_it(tmp_path):
    lock = tmp_path / "run" / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(lock)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "None\n"
    with locked(lock) as other:
        assert other.startswith(f"process {process.pid} on ")
    with pytest.raises(UserError, match=f"process {process.pid} on"), alone(Run(lock.parent)):
        pass
    process.kill()
    process.communicate()
    assert lock.exists()  # left over
    with locked(lock) as other:
        assert other is None and f"process {os.getpid()} on" in lock.read_text()
    assert not lock.exists()


def test_where_the_file_system_has_no_locks_what_the_file_says_must_do(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = os.uname().nodename
    for said, free in ((f"process {ended.pid} on {host}", True), (f"process {os.getppid()} on {host}", False),
                       (f"process {ended.pid} on another.example", False), ("", True)):
        (tmp_path / "lock").write_text(said)
        with locked(tmp_path / "lock") as other:
            assert (other is None) == free and (free or other == said), said


def test_a_folder_that_was_being_replaced_when_its_writer_was_killed_is_put_back(tmp_path):
    with whole_folder(tmp_path / "step-4") as folder:
        (folder / "a").write_text("first")
    os.replace(tmp_path / "step-4", tmp_path / ".step-4.12-0123abcd.old.tmp")  # killed between the two renames
    half = tmp_path / ".step-4.12-0123abcd.tmp"
    half.mkdir()
    (tmp_path / ".notes.tmp").mkdir()  # somebody's
    assert clear_folders(tmp_path) == (1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", "step-4"]
    assert (tmp_path / "step-4" / "a").read_text() == "first"


def test_weights_that_are_there_are_not_written_over(tmp_path):
    run = Run(tmp_path / "model")
    run.folder.mkdir()
    run.weights.write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"model\.safetensors is there already"):
        check_free(run, resume=False)
    with pytest.raises(UserError, match="weights but no checkpoint to go on from"):
        check_free(run, resume=True)
    (run.checkpoints / "step-4").mkdir(parents=True)
    check_free(run, resume=True)
    run.weights.unlink()
    with pytest.raises(UserError, match="checkpoints is there already"):
        check_free(run, resume=False)


def test_a_folder_that_could_not_be_begun_leaves_no_trace(command, tmp_path, capfd):
    code, said = call(capfd, command("new", "--steps", "2", "--set", "hidden_sise=3"))
    assert code == 2 and "hidden_size" in said and not (tmp_path / "new").exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused_and_one_with_too_little_is_said(tmp_path, capfd):
    run, free = Run(tmp_path / "new" / "run"), shutil.disk_usage(tmp_path).free
    check_room(run, Saving(free // 8, 3, free // 24))
    assert capfd.readouterr().err == ""
    check_room(run, Saving(free // 3, 4, 0))
    assert "checkpoints and weights will take" in capfd.readouterr().err
    check_room(run, Saving(free // 3, 1, free))  # the weights at the end
    assert "training.keep_checkpoints" in capfd.readouterr().err
    with pytest.raises(Refused, match=f"^{re.escape(str(run.folder))}: .* are free there, and a checkpoint takes"):
        check_room(run, Saving(2 * free, 1, 0))
    for step in range(3):  # those that are there go as new ones come
        (run.checkpoints / f"step-{step}").mkdir(parents=True)
    check_room(run, Saving(free // 3, 4, 0))
    assert capfd.readouterr().err == ""


def test_nothing_is_begun_where_no_checkpoint_has_room(command, tmp_path, capfd):
    large = ["hidden_size=1048576", "hardware.memory_gb=1e9"]  # nothing of it is allocated
    code, said = call(capfd, command("run", "--steps", "1", *(part for s in large for part in ("--set", s))))
    assert code == 1 and "GB are free there, and a checkpoint takes" in said and said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


def test_checkpoints_and_weights_take_what_was_planned(go, make_build):
    run = go("run", ["training.checkpoint_every=1", "training.keep_checkpoints=1"], steps=2)
    saving = make_build().plan.saving
    [last] = run.checkpoints.iterdir()
    size = sum(path.stat().st_size for path in last.glob("*.safetensors"))
    assert saving.checkpoint <= size <= saving.checkpoint + 50_000  # names and shapes, and counts of steps
    assert saving.weights <= run.weights.stat().st_size <= saving.weights + 15_000
