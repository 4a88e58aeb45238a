"""Threads are as many as there are free cores: by the numbers that Linux gives, by real processes, and as told."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tryplicity.errors import UserError
from tryplicity.training import threads as module
from tryplicity.training.threads import Threads, forced, load, others, quota, wanted

STAT = """cpu  {sum} 0 0 0 0 0 0 0 0 0
cpu0 {user0} 10 20 {idle0} 7 1 2 {steal0} 5 0
cpu1 {user1} 10 20 500 7 1 2 0 5 0
cpu2 999999 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""


@pytest.fixture
def free(monkeypatch):
    """Nothing is forced, and torch's number of threads is four, as on four cores."""
    for name in ("TRYPLICITY_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(module, "quota", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_what_others_used_by_hand(tmp_path):
    """Only cores that we may run on count, and time taken by other virtual machines is others' too."""
    file, ticks = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    file.write_text(STAT.format(sum=0, user0=100, idle0=500, steal0=0, user1=100))
    before = load({0, 1}, file)
    assert before.busy == pytest.approx((133 + 133) / ticks)
    file.write_text(STAT.format(sum=0, user0=100 + 3 * ticks, idle0=900, steal0=ticks, user1=100 + 2 * ticks))
    now = load({0, 1}, file)
    assert others(before._replace(at=0, own=0), now._replace(at=4, own=2)) == pytest.approx((3 + 1 + 2 - 2) / 4)
    assert load({0, 7}, file) is None and load({0}, tmp_path / "none") is None
    file.write_text("nothing of the kind\n")
    assert load({0}, file) is None


@pytest.mark.parametrize("most, available, busy, threads", [
    (2, 2, 0.0, 2), (2, 2, 0.3, 2), (2, 2, 0.67, 1), (2, 2, 1.0, 1), (2, 2, 2.0, 1), (2, 2, 5.0, 1), (16, 16, 1.0, 15),
    (8, 16, 4.0, 8), (8, 16, 12.0, 4), (1, 1, 0.0, 1), (2, 1.5, 0.0, 2),
])
def test_half_a_core_is_worth_a_thread(most, available, busy, threads):
    assert wanted(most, available, busy) == threads


def test_the_least_quota_of_the_groups_above_counts(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    assert quota(tmp_path, own) is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert quota(tmp_path, own) is None
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    assert quota(tmp_path, own) == 1.5
    (inner / "cpu.max").write_text("400000 100000\n")
    assert quota(tmp_path, own) == 1.5
    (tmp_path / "cpu").mkdir()  # version 1
    for what, number in (("quota", 50000), ("period", 100000)):
        (tmp_path / "cpu" / f"cpu.cfs_{what}_us").write_text(f"{number}\n")
    assert quota(tmp_path, own) == 0.5


def test_two_looks_in_a_row_must_want_another_number(free):
    clock, busy = [0.0], [0.0]

    def look():
        return module.Load(clock[0], busy[0], 0.0)

    with Threads(look=look, window=0.0) as own:
        said = []
        for by_others in (0, 1.2, 0, 3, 3, 3, 0, 0):  # cores
            clock[0], busy[0] = clock[0] + 5, busy[0] + 5 * by_others
            said.append((own.between_steps(), torch.get_num_threads()))
        assert [number for _, number in said] == [4, 4, 4, 4, 1, 1, 1, 4]
        assert own.chosen == "4 threads on 4 cores; fewer while others keep them busy"
        assert said[4][0] == "1 thread from here on: others keep 3.0 of 4 cores busy; TRYPLICITY_THREADS=4 would hold 4"
        assert [text is not None for text, _ in said] == [False] * 4 + [True, False, False, True]
        torch.set_num_threads(2)
    assert torch.get_num_threads() == 4  # as before


def test_a_resumed_run_begins_with_the_number_it_had(free):
    with Threads(3) as own:
        assert own.number == torch.get_num_threads() == 3
    with Threads(64) as own:  # another machine's
        assert own.number == 4


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", "1e20", "٣", "100000"])
def test_what_is_no_number_of_threads_is_refused(text, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_THREADS", text)
    with pytest.raises(UserError, match=f"TRYPLICITY_THREADS={text}: expected a whole number from 1 to 1024"):
        forced()


def test_a_forced_number_stays(free, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_THREADS", "3")
    with Threads(1, look=lambda: module.Load(time.monotonic(), 1e9 * time.monotonic(), 0.0), window=0.0) as own:
        assert [own.between_steps() for _ in range(3)] == [None] * 3 and torch.get_num_threads() == 3
    monkeypatch.delenv("TRYPLICITY_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # torch heeds it, and so do we
    with Threads(1) as own:
        assert own.number == 4


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the load is known on Linux alone")
def test_busy_processes_beside_it_take_its_threads(monkeypatch):
    """Real ones, two to a core."""
    for name in ("TRYPLICITY_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    allowed = len(module.cores())
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * allowed)]
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, allowed))
    try:
        with Threads(window=0.3) as own:
            deadline = time.monotonic() + 60
            while torch.get_num_threads() > 1 and time.monotonic() < deadline:
                own.between_steps()
                sum(range(10**5))
            assert torch.get_num_threads() == 1 or own.most == 1
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        torch.set_num_threads(before)


def test_a_run_keeps_and_says_its_number(make_build, prepared, tmp_path, monkeypatch):
    from tryplicity import load_plugins
    from tryplicity.run import Run
    from tryplicity.training.loop import Budget, train
    from tryplicity.training.watchers import Watcher

    class Ear(Watcher):
        def note(self, text):
            heard.append(text)

    heard = []
    run, build = Run(tmp_path / "run"), make_build()
    run.create(spec=build.spec.as_yaml(), hardware="", build={}, data={}, tokenizer=prepared.tokenizer_path.read_text())
    before = torch.get_num_threads()
    for threads, steps in ((3, 2), (1, 3)):
        monkeypatch.setenv("TRYPLICITY_THREADS", str(threads))
        train(build, prepared, run, Budget(steps=steps), load_plugins(), resume=steps > 2,
              watcher=Ear())
        said = json.loads((run.checkpoints / f"step-{steps}" / "progress.json").read_text())
        assert said["threads"] == threads
        assert torch.get_num_threads() == before
    assert [text for text in heard if "thread" in text] == ["3 threads, as TRYPLICITY_THREADS says",
                                                            "1 thread, as TRYPLICITY_THREADS says"]


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("TRYPLICITY_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module, "cores", lambda: set(range(8)))
    monkeypatch.setattr(module, "quota", lambda: None)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 8)
    for ranks, number in ((1, 8), (2, 4), (3, 2), (8, 1), (16, 1)):
        shared = Threads(ranks=ranks, window=0.0)
        assert shared.number == number
        assert ranks == 1 or (f"each of {ranks} ranks on 8 cores" in shared.chosen and shared.between_steps() is None)
