"""Checkpoints off the machine: to a folder, to memory, to a server that speaks S3; and back."""

import contextlib
import hashlib
import json
import threading
import time

import fsspec
import pytest
from safetensors.torch import load_file

from tryplicity.cli import main
from tryplicity.errors import UserError
from tryplicity.run import Run
from tryplicity.training import copying
from tryplicity.training.checkpoint import damage, steps
from tryplicity.training.copying import Copier, Target, begin, fetch


@pytest.fixture(scope="module")
def s3():
    """A server of moto's; s3fs finds it by the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "no", "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        Target("s3://bucket").system.mkdir("bucket")
        yield "s3://bucket/runs/first"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request, tmp_path):
    if request.param == "s3":
        address = request.getfixturevalue("s3")
        with contextlib.suppress(FileNotFoundError):
            Target(address).system.rm("bucket/runs", recursive=True)
        return address
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]
        return "memory://runs/first"
    return f"file://{tmp_path}/far/away"


@pytest.fixture
def run(tmp_path):
    """A run folder with files that are no model's: what is in them is not looked at."""
    run = Run(tmp_path / "run")
    run.create(spec="spec", hardware="hardware", build={}, tokenizer="tokenizer", data={})
    run.metrics.write_text("{}\n")
    return run


def saved(run, step, text="weights"):
    folder = run.checkpoints / f"step-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "state.pt"):
        (folder / name).write_text(f"{text} {name} {step}")
    marks = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "complete.json").write_text(json.dumps(marks))
    assert damage(folder) is None
    return folder


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_complete_is_copied_and_comes_back(url, run, tmp_path):
    copier = Copier(url, run, keep=2, every=2)
    for step in (2, 4, 6, 7):
        copier.add(saved(run, step))
        until(lambda step=step: copier.copied == step)
    run.weights.write_text("the end")
    assert copier.finish(run.weights)
    assert Target(url).steps() == [4, 6, 7]  # as in the run folder
    assert Target(url).system.cat_file(Target(url).path("model.safetensors")) == b"the end"
    other = Run(tmp_path / "other")
    assert fetch(url, other) == 7 and steps(other.checkpoints) == [7]
    for path in (run.checkpoints / "step-7").iterdir():
        assert (other.checkpoints / "step-7" / path.name).read_bytes() == path.read_bytes()
    for name in ("spec.yaml", "hardware.yaml", "build.json", "tokenizer.json", "data.json", "metrics.jsonl"):
        assert (other.folder / name).read_bytes() == (run.folder / name).read_bytes()


def test_what_is_half_there_or_damaged_is_passed_over(url, run, tmp_path, capsys):
    target = Target(url)
    for step in (2, 4, 6):
        target.put_checkpoint(saved(run, step))
    target.system.rm_file(target.path("checkpoints", "step-6", "complete.json"))
    target.system.pipe_file(target.path("checkpoints", "step-4", "state.pt"), b"else")
    assert target.steps() == [2, 4] and target.begun() == [2, 4, 6]
    other = Run(tmp_path / "other")
    assert fetch(url, other) == 2 and steps(other.checkpoints) == [2]
    assert "step-4 is damaged (state.pt is not as it was written); going back" in capsys.readouterr().err
    target.system.pipe_file(target.path("checkpoints", "step-2", "state.pt"), b"else")
    with pytest.raises(UserError, match="no checkpoint can be gone on from: step-4 is damaged"):
        fetch(url, Run(tmp_path / "third"))
    assert not (tmp_path / "third" / "checkpoints").exists()
    copier = Copier(url, run, keep=2, every=2)
    copier.add(saved(run, 8))
    assert copier.finish() and target.begun() == [4, 8]  # what was cut short is gone, and the oldest


def test_a_checkpoint_is_copied_again_only_if_it_is_another(url, run):
    target, folder = Target(url), saved(run, 2)
    target.put_checkpoint(folder)
    assert target.has(folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder = saved(run, 2, "after the sleep")
    assert not target.has(folder)
    copier = Copier(url, run, keep=2, every=2)
    copier.add(folder)
    assert copier.finish() and target.has(folder)
    assert target.system.cat_file(target.path("checkpoints", "step-2", "state.pt")).startswith(b"after the sleep")


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_copy_that_is_cut_short_is_none_even_where_one_was(run, tmp_path, monkeypatch, files):
    target, folder, put = Target(f"file://{tmp_path}/far"), saved(run, 2), Target.put

    def cut_short(self, file, *place):
        if len(done) == files:
            raise ConnectionError("gone")
        done.append(file)
        put(self, file, *place)

    target.put_checkpoint(folder)
    assert target.steps() == [2]
    done = []
    monkeypatch.setattr(Target, "put", cut_short)
    with pytest.raises(ConnectionError):
        target.put_checkpoint(folder)
    assert target.steps() == []


def test_a_target_that_is_not_there_is_said_once_and_tried_again(run, tmp_path, capsys):
    (tmp_path / "far").write_text("a file where the folder should be")
    copier = Copier(f"file://{tmp_path}/far/away", run, keep=2, every=2, waits=(0.05,) * 100)
    copier.add(saved(run, 2))
    until(lambda: copier._fault)
    (tmp_path / "far").unlink()
    assert copier.finish() and capsys.readouterr().err.count("cannot be written now") == 1
    assert steps(tmp_path / "far" / "away" / "checkpoints") == [2]


def test_a_target_that_stays_away_costs_the_copies_alone(run, capsys):
    copier = Copier("file:///proc/nowhere", run, keep=2, every=2, waits=(0.0, 0.0))
    for step in (2, 4):
        copier.add(saved(run, step))
    assert not copier.finish()
    said = capsys.readouterr().err
    assert "step-2 could not be copied to file:///proc/nowhere (" in said and "step-4 could not be copied" in said
    assert said.count("no checkpoint is there, and the run folder has all") == 1


def test_what_is_being_copied_stays_and_what_waits_may_go(run, tmp_path, monkeypatch, capsys):
    begun, go_on = threading.Event(), threading.Event()

    def slowly(self, folder):
        begun.set()
        assert go_on.wait(20)

    monkeypatch.setattr(Target, "put_checkpoint", slowly)
    copier = Copier(f"file://{tmp_path}/far", run, keep=1, every=2)
    first, second, third = (saved(run, step) for step in (2, 4, 6))
    copier.add(first)
    assert begun.wait(20)
    copier.add(second)
    copier.add(third)
    assert not copier.lets_go(first) and copier.lets_go(second)
    go_on.set()
    assert copier.finish() and copier.copied == 6
    assert "note: step-4 was not copied" in capsys.readouterr().err and copier.lets_go(first)


def test_wrong_urls_and_other_runs_are_refused_before_anything_is_done(url, run, tmp_path, capsys):
    begin(run, False, url, None)
    begin(Run(tmp_path / "new"), True, url, None)  # a command that is started again and again: for the first time
    Target(url).put_checkpoint(saved(run, 2))
    with pytest.raises(UserError, match="checkpoints of a run already, the newest of step 2"):
        begin(Run(tmp_path / "new"), False, url, None)
    begin(Run(tmp_path / "new"), True, url, None)
    assert steps(tmp_path / "new" / "checkpoints") == [2]
    for wrong in ("nonsense://here", "s4://bucket"):
        with pytest.raises(UserError, match=f"{wrong}: not a place to copy to"):
            begin(run, False, wrong, None)
    with pytest.raises(UserError, match="there is no complete checkpoint of a run"):
        begin(Run(tmp_path / "other"), True, None, f"file://{tmp_path}/empty")
    assert capsys.readouterr().err == ""


def test_a_server_that_does_not_answer(tmp_path, run, capsys, monkeypatch):
    """Nobody listens there: a training begins and says so; one that would have to fetch from it does not."""
    for name, value in (("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_ACCESS_KEY_ID", "no"),
                        ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_MAX_ATTEMPTS", "1")):
        monkeypatch.setenv(name, value)
    system = fsspec.get_filesystem_class("s3")
    system.clear_instance_cache()
    monkeypatch.setattr(system, "retries", 1)
    begin(run, False, "s3://bucket/run", None)
    assert "s3://bucket/run cannot be reached now" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing is begun anew over what may be there"):
        begin(Run(tmp_path / "new"), True, "s3://bucket/run", None)
    with pytest.raises(UserError, match="s3://bucket/run: cannot be read"):
        begin(Run(tmp_path / "new"), True, None, "s3://bucket/run")
    system.clear_instance_cache()


def train(line):
    """A command line in this process: its exit code."""
    with pytest.raises(SystemExit) as end:
        main(line[3:], prog_name="tryplicity")
    return end.value.code


def test_a_run_is_gone_on_with_on_another_machine(command, tmp_path, capfd, monkeypatch):
    """As one line that is started again wherever there is a machine; the copy alone is left of the first."""
    far, few = f"file://{tmp_path}/far", ["--steps", "8", "--set", "training.checkpoint_every=3"]
    assert train(command("whole", *few)) == 0
    assert train(command("first", *few, "--resume", "--copy-to", far)) == 0
    for name in ("model.safetensors", "spec.yaml", "tokenizer.json"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    for gone in ("step-8", "step-6"):  # it was cut off before these
        for file in (tmp_path / "far" / "checkpoints" / gone).iterdir():
            file.unlink()
    assert train(command("second", *few, "--resume", "--copy-to", far)) == 0
    assert steps(tmp_path / "far" / "checkpoints") == steps(tmp_path / "second" / "checkpoints") == [3, 6, 8]
    whole, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "second"))
    assert all(bool((second[name] == tensor).all()) for name, tensor in whole.items())
    # a copy that cannot be written is said, and the run ends well
    monkeypatch.setattr(copying, "WAITS", (0.0,))
    capfd.readouterr()
    assert train(command("third", *few, "--resume-from", far, "--copy-to", "file:///proc/far")) == 0
    said = capfd.readouterr().err
    assert "file:///proc/far could not be written" in said and "Traceback" not in said
