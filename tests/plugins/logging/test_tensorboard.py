"""Event files of real runs, read back by TensorBoard's own reader."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tryplicity import load_plugins
from tryplicity.run import Run
from tryplicity.training.loop import Budget, train
from tryplicity.training.metrics import read_lines
from tryplicity_plugins import logging as plugin
from tryplicity_plugins.logging.tensorboard import EventFiles, wanted

#: sys.modules[...] = None is Python's own way to make an import fail
HIDDEN = "import sys; sys.modules['tensorboard'] = None; "


@pytest.fixture
def run(tmp_path, make_build, prepared):
    run = Run(tmp_path / "run")
    run.create(spec=make_build().spec.as_yaml(), hardware="", build={}, data={},
               tokenizer=prepared.tokenizer_path.read_text())
    return run


@pytest.fixture
def go(run, make_build, prepared):
    def start(steps, resume=False):
        train(make_build(), prepared, run, Budget(steps=steps), load_plugins(), resume=resume)
        return run.folder / "tensorboard"

    return start


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0: keep everything
    return EventAccumulator(str(folder), {"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def texts(events, tag):
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")]


def test_a_run_leaves_what_its_metrics_say(go, run):
    events = read(go(12))
    lines = [line for line in read_lines(run.metrics) if "loss" in line]
    assert scalars(events, "run/loss") == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines]
    place = "layers.0.feed_forward.router"
    for tag, key in ((f"load_entropy/{place}", f"{place}.load_entropy"),
                     ("zero_rate/layers.2.feed_forward.activation", "layers.2.feed_forward.activation.zero_rate")):
        assert scalars(events, tag) == [(s, pytest.approx(lines[s - 1][key], rel=1e-6)) for s in (1, 11)]
    for expert in range(4):
        assert scalars(events, f"load/{place}/{expert}") == [
            (s, pytest.approx(lines[s - 1][f"{place}.load"][expert], rel=1e-6)) for s in (1, 11)]
    # and the score of the whole held-out part, which is of no step
    wanted = [(line["step"], pytest.approx(line["validation_bits_per_byte"], rel=1e-6))
              for line in read_lines(run.metrics) if "validation_bits_per_byte" in line]
    assert scalars(events, "run/validation_bits_per_byte") == wanted and wanted[-1][0] == 12
    # measured every 20 steps only: not missed by writing every 10th
    assert [step for step, _ in scalars(events, f"similarity/{place}.inhibition")] == [1]
    assert run.folder not in plugin._open


def test_a_resumed_run_has_every_step_once(go, run):
    events = read(go(6))
    assert [step for step, _ in scalars(events, "run/loss")] == [1, 2, 3, 4, 5, 6]
    # the checkpoint of step 4 is the newest: steps 5 and 6 are trained again
    shutil.rmtree(run.checkpoints / "step-6")
    events = read(go(12, resume=True))
    assert len(list((run.folder / "tensorboard").iterdir())) == 2
    lines = [line for line in read_lines(run.metrics) if "loss" in line]
    wanted = [(s, pytest.approx(lines[s - 1]["loss"], rel=1e-6)) for s in range(1, 13)]
    assert scalars(events, "run/loss") == wanted
    events = read(go(12, resume=True))  # nothing is left to do but the score
    assert scalars(events, "run/loss") == wanted and scalars(events, "run/validation_bits_per_byte")[-1][0] == 12


def test_names_are_text_when_they_change_long_lists_histograms_and_objects_scalars(tmp_path):
    files = EventFiles(tmp_path)
    for step in range(1, 12):
        files.write(step, {"step": step, "loss": 2.0, "stage": "infancy" if step < 7 else "childhood", "odd": None,
                           "layers.0.router.load": [float(i == 3) for i in range(64)],
                           "sleep": {"bits_per_byte": {"before": 2.5, "after": 2.25}}})
    files.close()
    events = read(tmp_path)
    assert texts(events, "run/stage") == [(1, "infancy"), (7, "childhood")]
    histograms = events.Histograms("load/layers.0.router")
    assert [h.step for h in histograms] == [1, 11]
    assert histograms[0].histogram_value.num == 64 and histograms[0].histogram_value.sum == 1
    assert scalars(events, "sleep/bits_per_byte/after")[0] == (1, 2.25)
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("run/")} == {"run/loss"}


def test_switched_off_it_writes_nothing(go, run, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_TENSORBOARD", "0")
    assert not wanted()
    assert not go(2).exists() and len(read_lines(run.metrics)) == 3


def test_a_folder_that_cannot_be_written_costs_a_line_not_the_run(go, run, capsys):
    (run.folder / "tensorboard").write_text("in the way")
    go(3)
    assert [line["step"] for line in read_lines(run.metrics)] == [1, 2, 3, 3]
    assert capsys.readouterr().err.count("warning: tensorboard failed") == 1


@pytest.mark.parametrize("hidden, loaded", [(False, []), (True, [])], ids=["installed", "not installed"])
def test_nothing_is_imported_before_the_first_step(hidden, loaded, tmp_path):
    program = (f"{HIDDEN if hidden else 'import sys; '}import json, pathlib; from tryplicity import load_plugins; "
               f"load_plugins().call('tryplicity_run_started', run=pathlib.Path({str(tmp_path)!r}), spec=None, "
               "model=None); import tryplicity_plugins.logging as p; "
               "print(json.dumps([[m for m in ('torch', 'tensorboard') if sys.modules.get(m)], len(p._open)]))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parents[3])
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout) == [loaded, 0 if hidden else 1]
    assert not list(tmp_path.iterdir())
