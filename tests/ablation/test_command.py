"""`tryplicity ablate` as a user starts it: killed and gone on with, failing cells, locks, cost."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from tryplicity.ablation import cost
from tryplicity.ablation.cell import BUSY, sampled
from tryplicity.ablation.cells import Setting, cell, result
from tryplicity.ablation.command import Request, portable
from tryplicity.ablation.modules import comparisons
from tryplicity.ablation.runner import Job, run_cells
from tryplicity.cli import main
from tryplicity.errors import Refused
from tryplicity.files import locked
from tryplicity.hardware import load_hardware
from tryplicity.run import Run
from tryplicity.spec import read_yaml

SMALL = str(Path(__file__).parents[1] / "small.yaml")
TOKENS = 3000  # of 4 rows of 48 tokens: 16 steps


@pytest.fixture
def line(corpus, cache, prepared, tmp_path, monkeypatch):
    """`line("out", ...)`: the whole command line; the data is in the cache already."""
    monkeypatch.setenv("TRYPLICITY_CACHE", str(cache))

    def made(out, *options):
        return ["ablate", SMALL, "--hw", "cpu", "--data", str(corpus),
                "--without", "spike", "--seeds", "1", "--tokens", str(TOKENS), "--rows", "4", "--out",
                str(tmp_path / out), *options]

    return made


@pytest.fixture
def setting(registry, corpus, cache, prepared, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(cache))
    return Setting(TOKENS, 4, str(corpus), prepared.identity, load_hardware("cpu", registry))


def call(capfd, line):
    """Exit code, stdout, stderr, as the console script would give them."""
    code = 0
    try:
        main(line, prog_name="tryplicity")
    except SystemExit as end:
        code = end.code or 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


def start(line, **options):
    return subprocess.Popen([sys.executable, "-m", "tryplicity.cli", *line], **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the table is that nobody disturbed, once a test has made it."""
    return tmp_path_factory.mktemp("whole") / "out"


def test_a_table_is_trained_and_reported(line, whole, capfd):
    code, out, err = call(capfd, line(whole, "--no-cost", "--json"))
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((whole / "report.json").read_text())
    assert "only the pretraining phase is measured" in (whole / "report.md").read_text()
    ElementTree.parse(whole / "report.svg")
    (row,) = report["modules"]
    assert row["verdict"] == "one seed" and report["cells"]["finished"] == report["cells"]["total"] == 2
    for each in report["cells"]["each"]:
        folder = whole / each["folder"]
        assert each["steps"] == 16 and (folder / "model.safetensors").is_file()
        assert not (folder / "checkpoints").exists()  # a finished cell needs none
        losses = [json.loads(text).get("loss") for text in (folder / "metrics.jsonl").read_text().splitlines()]
        assert each["training_loss"] == losses[15] and losses[16:] == [None]  # scored once, at the end
    first, second = (each["held_out_bits_per_byte"] for each in report["cells"]["each"])
    assert row["held_out_bits_per_byte"]["change"] == first - second
    code, out, _ = call(capfd, line(whole, "--report"))
    assert code == 0 and "one seed" in out and "2 of 2 cells finished" in out


@pytest.mark.slow
def test_killed_and_gone_on_with_is_never_killed(line, whole, capfd, tmp_path):
    assert call(capfd, line(whole, "--no-cost"))[0] == 0  # there already, if the test above ran
    slow = line("cut", "--no-cost", "--jobs", "1")
    process = start(slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cells = tmp_path / "cut" / "cells"
    second = lambda: next(iter(cells.glob("without-spike-*/metrics.jsonl")), None)  # noqa: E731
    while not (second() and second().read_text().count("\n") >= 5):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (first,) = cells.glob("baseline-*/result.json")
    written = first.stat().st_mtime_ns
    assert result(second().parent) is None

    code, _, err = call(capfd, slow)
    assert code == 0, err
    assert "without-spike" in err and "baseline" not in err
    assert first.stat().st_mtime_ns == written
    reports = [json.loads((out / "report.json").read_text()) for out in (whole, tmp_path / "cut")]
    assert reports[0]["modules"] == reports[1]["modules"]


def test_a_signal_saves_and_says_how_to_go_on(line, tmp_path):
    process = start(line("out", "--no-cost"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = lambda: [p for p in (tmp_path / "out").glob("cells/*/metrics.jsonl") if "step" in p.read_text()]  # noqa: E731
    while not found():
        assert process.poll() is None
        time.sleep(0.002)
    begun = found()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    assert "Go on with the same command" in err and "not finished" in out
    for metrics in begun:
        last = json.loads(metrics.read_text().splitlines()[-1])["step"]
        assert (metrics.parent / "checkpoints" / f"step-{last}").is_dir() or result(metrics.parent)


def test_a_cell_is_never_run_twice_at_once(registry, setting, prepared, tmp_path):
    row = comparisons(read_yaml(SMALL), ["spike"], registry)[0]
    folder = cell(row.with_it, 0, setting).create(tmp_path, {}, prepared.tokenizer_path.read_text())

    def worker():
        with subprocess.Popen([sys.executable, "-m", "tryplicity.ablation.cell", str(folder)],
                              stdin=subprocess.PIPE) as process:
            return process.wait(60)

    with locked(Run(folder).lock) as other:
        assert other is None
        assert worker() == BUSY
    (folder / "result.json").write_text("{}")  # what finished meanwhile is left alone
    assert worker() == 0
    assert (folder / "result.json").read_text() == "{}" and not (folder / "metrics.jsonl").exists()


def test_a_cell_that_fails_says_why_and_the_others_go_on(registry, setting, prepared, tmp_path):
    row = comparisons(read_yaml(SMALL), ["spike"], registry)[0]
    tokenizer = prepared.tokenizer_path.read_text()
    good, bad = (cell(v, 0, setting).create(tmp_path, {}, tokenizer) for v in (row.with_it, row.without_it))
    (bad / "spec.yaml").write_text((bad / "spec.yaml").read_text().replace("hidden_size", "hiden_size"))
    (good / "result.json").write_text('{"seconds": 1.0}')
    told = SimpleNamespace(update=lambda *_: None, finished=lambda job, outcome: done.append((job.name, outcome)),
                           failed=lambda job: done.append((job.name, job.cause)))
    done: list = []
    failed = run_cells([Job(bad, "bad"), Job(good, "good")], 1, told, lambda: False)
    assert [job.name for job in failed] == ["bad"] and [name for name, _ in done] == ["bad", "good"]
    assert "did you mean hidden_size" in done[0][1] and "\n" not in done[0][1]
    assert done[1][1] == {"seconds": 1.0} and result(bad) is None


def test_scored_are_so_many_rows_spread_evenly(prepared):
    every = list(prepared.held_out().batches(1, 48))
    few = list(sampled(prepared, 4).held_out().batches(1, 48))
    at = [number * len(every) // 4 for number in range(4)]
    assert len(few) == 4 and all((few[i].ids_BT == every[n].ids_BT).all() for i, n in enumerate(at))
    assert sampled(prepared, 0) is prepared and sampled(prepared, 4).identity == prepared.identity


@pytest.mark.parametrize("options, message", [
    (["--report", "--no-cost"], "one of --report, --no-cost and --cost-only"),
    (["--without", "spik"], "did you mean spike"),
    (["--without", "mamba2,moe", "--alone"], "a block needs a mixer"),
])
def test_wrong_input_is_said_before_anything_runs(line, capfd, tmp_path, options, message):
    code, _, err = call(capfd, line("out", *options))
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_a_report_says_nothing_of_this_machines_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = Request(spec=str(tmp_path / "my.yaml"), hardware="cpu", settings=("name=a/b",),
                      data="{type: files, path: /somewhere/else/texts}", modules=("spike",), alone=False, seeds=1,
                      tokens=10, rows=0, out=Path("/elsewhere/deep/out"), jobs=None, plugin_files=("/x/y/plug.py",))
    assert request.command() == (
        "tryplicity ablate my.yaml --hw cpu --data '{type: files, path: texts}' --without spike --set name=a/b "
        "--plugin plug.py --seeds 1 --tokens 10 --rows 0 --out out")
    assert [portable(text) for text in ("huggingface:a/b", "python-docs", "../texts", str(tmp_path / "a" / "b"))] == [
        "huggingface:a/b", "python-docs", "../texts", "a/b"]


# --- cost ---

def test_the_peak_is_what_was_in_use_since_the_reset():
    """In a process of its own: what other tests have left running takes memory too."""
    program = ("import os; from tryplicity.ablation import cost; before = cost.reset_peak(); "
               "block = bytearray(os.urandom(1000) * 80_000); held = cost.peak() - before; del block; "
               "print(held, cost.peak() - before, cost.reset_peak() - before)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held, stays, after = map(int, done.stdout.split())
    assert 75e6 < held < 200e6
    assert stays > 75e6  # it stays the peak
    assert after < 40e6


def test_cost_is_measured_in_pairs_and_kept(registry, setting, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "PAIRS", 4)
    monkeypatch.setattr(cost, "ROUNDS", 2)
    row = comparisons(read_yaml(SMALL), ["hyper_connections"], registry)[0]
    told, tokenizer = [], prepared.tokenizer_path.read_text()
    plans = {"baseline": {}, "without-hyper_connections": {}}
    found = cost.measure(row, setting, tmp_path, plans, tokenizer, told.append, lambda: False)
    low, high = found["quartiles"]
    assert 0 < low <= found["step_time_ratio"] <= high
    for samples in (found["memory_with"], found["memory_without"]):  # each of another process
        assert len(samples) == 2 and min(samples) > 1e6
    assert told == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert cost.known(tmp_path) == {cost.key(row, setting): found}
    assert [p.name for p in tmp_path.iterdir()] == ["cost.json"]  # no trace of the two trainings

def test_a_cost_that_cannot_be_measured_says_why(registry, setting, prepared, tmp_path):
    row = comparisons(read_yaml(SMALL), ["spike"], registry)[0]
    tokenizer = prepared.tokenizer_path.read_text()
    wrong = Setting(setting.tokens, 4, setting.data, "other data", setting.hardware)
    with pytest.raises(Refused, match="the data is not what this cell was begun with"):
        cost.measure(row, wrong, tmp_path, {"baseline": {}, "without-spike": {}}, tokenizer, lambda share: None,
                     lambda: False)


def test_what_is_no_ablation_is_not_written_into(capfd, line, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.md").write_text("mine")
    code, _, err = call(capfd, line("notes"))
    assert code == 2 and err.count("\n") == 1 and "is not an ablation's folder; it is not written over" in err
    code, _, err = call(capfd, line("notes/a.md"))
    assert code == 2 and err.count("\n") == 1 and "this is a file; give the folder" in err
    assert [path.name for path in notes.iterdir()] == ["a.md"] and (notes / "a.md").read_text() == "mine"
