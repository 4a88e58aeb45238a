"""Weights & Biases and trackio, both without a network: real runs, and what they left is read back."""

import json
import struct
import sys
import time

import pytest

from tryplicity import load_plugins
from tryplicity.run import Run
from tryplicity.training.loop import Budget, train
from tryplicity.training.metrics import read_lines
from tryplicity_plugins.logging import trackio, wandb
from tryplicity_plugins.logging.numbers import numbers
from tryplicity_plugins.logging.tensorboard import EventFiles

PLACE = "layers.0.feed_forward.router"


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    """Where trackio keeps what it is told, which it asks for when it is first imported."""
    assert "trackio" not in sys.modules
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))
        import trackio  # noqa: F401

        yield folder


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No account, no network, and no TensorBoard unless a test wants it."""
    for name in ("WANDB_API_KEY", "TRYPLICITY_WANDB", "TRYPLICITY_TRACKIO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRYPLICITY_TENSORBOARD", "0")


@pytest.fixture
def go(tmp_path, make_build, prepared):
    run = Run(tmp_path / "small")
    run.create(spec=make_build().spec.as_yaml(), hardware="", build={}, data={},
               tokenizer=prepared.tokenizer_path.read_text())

    def start(steps, resume=False):
        train(make_build(), prepared, run, Budget(steps=steps), load_plugins(), resume=resume)
        return run

    return start


def records(data):
    """Of a LevelDB log (github.com/google/leveldb/blob/main/doc/log_format.md), behind wandb's seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header in this block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            yield whole
            whole = b""


def written_by_wandb(folder):
    """{step: {name: value}} of the offline files, in the order of their writing, and the ids of their runs."""
    from wandb.proto import wandb_internal_pb2

    steps, ids = {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                found = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                         for item in record.history.item}
                steps.setdefault(found.pop("_step"), {}).update(found)
    return steps, ids


def soon(read, whole):
    """What is read, once it is whole: wandb's own process may write its last records after the run has ended."""
    until = time.monotonic() + 30
    while not whole(found := read()) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def check(steps, lines):
    """What a tracker has of steps is what metrics.jsonl says."""
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {step: found["run/loss"] for step, found in steps.items()} == pytest.approx(losses, rel=1e-6)
    assert [step for step, found in steps.items() if f"load/{PLACE}/3" in found] == [1, 11]
    assert steps[11][f"load/{PLACE}/3"] == pytest.approx(lines[10][f"{PLACE}.load"][3], rel=1e-6)
    scores = [line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line]
    assert steps[max(steps)]["run/validation_bits_per_byte"] == pytest.approx(scores[-1], rel=1e-6)


def test_wandb_has_what_the_metrics_say_and_a_resumed_run_is_the_same_one(go, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_WANDB", "1")
    run = go(12)
    steps, ids = soon(lambda: written_by_wandb(run.folder), lambda found: 12 in found[0])
    check(steps, read_lines(run.metrics))
    assert len(ids) == 1
    run = go(14, resume=True)
    more, again = soon(lambda: written_by_wandb(run.folder), lambda found: 14 in found[0])
    assert again == ids and sorted(more) == list(range(1, 15))
    check(more, read_lines(run.metrics))


def test_trackio_has_what_the_metrics_say(trackio_folder, go, monkeypatch):
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("TRYPLICITY_TRACKIO", "mine")
    run = go(12)
    steps = {}
    for line in SQLiteStorage.get_logs("mine", "small"):
        steps.setdefault(line["step"], {}).update(line)
    check(steps, read_lines(run.metrics))
    assert list(trackio_folder.glob("mine*.db"))


def test_the_names_and_numbers_are_those_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = {"step": 1, "tokens": 5, "loss": 2.0, "stage": "infancy", "odd": None, f"{PLACE}.load": [0.5, 0.25],
               f"{PLACE}.long": [0.0] * 20, "sleep": {"bits_per_byte": {"before": 2.5, "after": 2.25}}}
    files, wanted = EventFiles(tmp_path), {}
    for step in range(1, 12):
        files.write(step, metrics)
    files.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            wanted.setdefault(event.step, {})[tag] = event.value
    assert {step: numbers(step, metrics) for step in range(1, 12)} == wanted


def test_off_unless_named(go, monkeypatch):
    monkeypatch.setenv("TRYPLICITY_WANDB", "0")
    assert not wandb.wanted() and not trackio.wanted()
    assert not (go(2).folder / "wandb").exists()


@pytest.mark.parametrize("cause", ["no key", "not installed", "in the way"])
def test_what_fails_is_named_once_and_the_run_and_the_others_go_on(go, monkeypatch, tmp_path, capsys, cause):
    monkeypatch.setenv("TRYPLICITY_WANDB", "1")
    monkeypatch.setenv("TRYPLICITY_TENSORBOARD", "1")
    if cause == "no key":
        monkeypatch.setenv("WANDB_MODE", "online")
    elif cause == "not installed":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        (tmp_path / "small" / "wandb").write_text("in the way")
    run = go(3)
    assert [line["step"] for line in read_lines(run.metrics)] == [1, 2, 3, 3]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: wandb")]
    wanted = {"no key": "no API key", "not installed": 'pip install "tryplicity[wandb]"', "in the way": "File exists"}
    assert len(said) == 1 and wanted[cause] in said[0] and said[0].endswith("the run goes on without it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("run/loss")] == [1, 2, 3]
