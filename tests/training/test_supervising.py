"""What the supervisor makes of its ranks' ends. The ranks are processes that do what a line of Python says, so that
they are there at once."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tryplicity import UserError
from tryplicity.run import Run
from tryplicity.training import launching
from tryplicity.training.launching import LOST, NAMED, NOTHING_LOST
from tryplicity.training.process import allocator_settings

COMMAND = """
import click, os, signal, subprocess, sys, time
from pathlib import Path
from tryplicity import hookimpl
from tryplicity.training.launching import tie_to_parent

def stopped(number, frame):
    os._exit(143)

@click.command()
@click.argument("lines", nargs=-1)
def work(lines):
    tie_to_parent()
    rank = int(os.environ["RANK"])
    Path(f"ready-{rank}").touch()
    exec(lines[rank])
    time.sleep(1000)

@hookimpl
def tryplicity_commands():
    return [work]
"""


@pytest.fixture
def supervise(tmp_path, monkeypatch, capfd):
    """`supervise("rank 0's line", "rank 1's", signals=[...])`: what it exits with, what was said on stderr, and
    whether any process is left. The signals come to this process once all ranks are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "SETTLE", 0.5)
    (tmp_path / "work.py").write_text(COMMAND)

    def send(ranks, signals):
        while len(list(tmp_path.glob("ready-*"))) < ranks:
            time.sleep(0.01)
        for number in signals:
            time.sleep(0.3)
            os.kill(os.getpid(), number)

    def go(*lines, signals=()):
        sender = threading.Thread(target=send, args=(len(lines), signals))
        sender.start()
        code = launching.supervise(["work", "--plugin", "work.py", "--", *lines], len(lines), Run(tmp_path / "run"))
        sender.join()
        left = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "work.py"], capture_output=True, text=True).stdout
        assert not left
        return code, capfd.readouterr().err

    return go


KEPT = "there is no checkpoint yet: begin again with the same command and --resume"


def test_all_well(supervise, tmp_path):
    assert supervise("os._exit(0)", "print('not heard'); sys.stdout.flush(); os._exit(0)") == (0, "")


def test_what_a_rank_left_behind_ends_with_it(supervise, tmp_path):
    line = f"subprocess.Popen(['sh', '-c', 'sleep 1000; : {tmp_path}/mark']); os._exit(0)"
    assert supervise(line, "os._exit(0)") == (0, "")


def test_a_rank_that_fails_is_shown_with_its_last_words(supervise):
    code, err = supervise("", "print('\\n'.join(map(str, range(50)))); print('error: oh', flush=True); os._exit(2)")
    assert code == 2 and "error: rank 1 (process " in err and " ended with 2; what it said last:\n" in err
    assert "  rank 1: oh\n" in err and "  rank 1: 49\n" in err and "  rank 1: 20\n" not in err and KEPT in err


def test_what_rank_0_has_said_is_not_said_again(supervise):
    code, err = supervise("print('error: no', file=sys.stderr, flush=True); os._exit(1)", f"os._exit({LOST})")
    assert code == 1 and err == "error: no\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_with_its_signal(supervise, rank):
    lines = [f"time.sleep(0.1); os._exit({LOST})"] * 2
    lines[rank] = "os.kill(os.getpid(), signal.SIGKILL)"
    code, err = supervise(*lines)
    assert code == 3 and f"error: rank {rank} (process " in err and "was ended by SIGKILL\n" in err and KEPT in err


def test_a_rank_that_does_not_end_is_named(supervise):
    code, err = supervise(f"os._exit({LOST})", "os.kill(os.getpid(), signal.SIGSTOP)")
    assert code == 3 and "error: rank 1 (process " in err and "did not answer the others" in err and KEPT in err


def test_who_was_waited_for_is_named_too(supervise):
    code, err = supervise("", "os.kill(os.getpid(), signal.SIGABRT)")
    assert code == 3 and "error: rank 1 (process " in err and "was ended by SIGABRT" in err
    assert "error: rank 0 (process " in err and "had not ended by then" in err


def test_ranks_that_all_lost_each_other(supervise):
    code, err = supervise(f"os._exit({LOST})", f"os._exit({LOST})")
    assert code == 3 and "error: the ranks did not answer each other; " in err and KEPT in err


def test_what_another_rank_says_of_rank_0_is_shown(supervise):
    code, err = supervise("os.kill(os.getpid(), signal.SIGSTOP)",
                          f"print('error: rank 0 (here) has not answered', flush=True); os._exit({NAMED})")
    assert code == 3 and err.splitlines()[0] == "error: rank 0 (here) has not answered" and KEPT in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_signal_goes_to_all_and_is_answered_in_its_own_code(supervise, number, code):
    line = "signal.signal(signal.SIGTERM, stopped)"
    ended, err = supervise(line, line, signals=[number])
    assert ended == code and ("stopping: what is at hand" in err) == (number == signal.SIGINT)


def test_a_second_ctrl_c_ends_those_that_do_not_hear(supervise):
    line = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert supervise(line, line, signals=[signal.SIGINT, signal.SIGINT])[0] == 130


def test_a_signal_before_anything_was_done_loses_nothing(supervise):
    for line in ("", f"signal.signal(signal.SIGTERM, lambda *_: os._exit({NOTHING_LOST}))"):
        code, err = supervise(line, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", signals=[signal.SIGTERM])
        assert code == 143 and "interrupted; nothing is lost" in err and "error" not in err


def test_a_rank_that_somebody_else_ends_is_not_taken_for_a_stop(supervise):
    code, err = supervise("", "os.kill(os.getpid(), signal.SIGTERM)")
    assert code == 143 and "error: rank 1" in err and "was ended by SIGTERM" in err


def test_a_worker_whose_launcher_is_gone_ends_at_once(monkeypatch):
    monkeypatch.setenv(launching.PARENT, str(os.getpid()))
    program = "from tryplicity.training.launching import tie_to_parent; tie_to_parent(); print('on')"
    line = [sys.executable, "-c", program]
    assert subprocess.run(line, capture_output=True, text=True).stdout == "on\n"
    child = f'{shlex.quote(sys.executable)} -c "{program}"; exit $?'
    done = subprocess.run(["sh", "-c", child], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (LOST, "")


@pytest.mark.parametrize("port", ["many", "70000"])
def test_a_port_that_is_none(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=f"MASTER_PORT={port}"):
        launching.supervise([], 2, Run(Path("nowhere")))


def test_data_is_prepared_by_one_process_after_another(tmp_path, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path))
    done, inside = [], []

    def prepare(name):
        with launching.in_turn():
            inside.append(name)
            time.sleep(0.2)
            done.append(inside.copy())
            inside.clear()

    threads = [threading.Thread(target=prepare, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(("device", "given", "expected"), [
    ("cuda", {}, "expandable_segments:True"), ("rocm", {}, "expandable_segments:True"), ("cpu", {}, None),
    ("cuda", {"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ("cuda", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native")])
def test_the_profile_s_allocator_settings_hold_unless_the_user_has_some(monkeypatch, device, given, expected):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    allocator_settings(SimpleNamespace(device=device, expandable_segments=True))
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
