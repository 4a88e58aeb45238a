"""What `tryplicity launch` writes: read by bash, by Slurm's and SkyPilot's own rules, and run here as it stands.

Slurm is not there: what stands for `srun` runs the command, as a step of one task does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.command_line import call
from tryplicity.hardware import load_hardware
from tryplicity.spec import load_spec

SMALL = str(Path(__file__).parent / "small.yaml")
MACHINES = {"5090": ("5090", 1, "RTX5090:1"), "b200": ("full", 4, "B200:4"), "mi300x": ("full", 8, "MI300X:8"),
            "h200": ("full", 8, "H200:8")}
SKY = Path(__file__).parents[1] / ".venv-clients" / "skypilot" / "bin" / "python"


@pytest.fixture
def write(capfd, tmp_path, monkeypatch):
    """`write("full", "h200", "slurm", ...)`: the file that is written."""
    monkeypatch.chdir(tmp_path)

    def go(spec, hardware, form, *options):
        code, out, err = call(capfd, "launch", spec, "--hw", hardware, "--to", form, "--out", "job", *options)
        assert code == 0, err
        assert "planned, not measured" in out
        return tmp_path / "job"

    return go


def stub(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_slurm_script_asks_for_the_machine_and_brings_all_it_needs(registry, write, tmp_path, machine):
    spec, count, _ = MACHINES[machine]
    plugin = tmp_path / "mine.py"
    plugin.write_text("'''Mine: $HOME `ls` \\\\'''\n")
    job = write(spec, machine, "slurm", "--minutes", "600", "--copy-to", "s3://mine/it's", "--plugin", str(plugin))
    text = job.read_text()
    assert subprocess.run(["bash", "-n", str(job)]).returncode == 0
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines()
                 if line.startswith("#SBATCH"))
    assert asked["gpus-per-node"] == str(count) and asked["nodes"] == asked["ntasks"] == "1"
    assert asked["signal"] == "TERM@120" and asked["time"] == "13:00:00"  # ten hours, a quarter more, half an hour
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "srun", 'while [ "$1" != tryplicity ]; do shift; done; exec "$@"')
    stub(tmp_path / "bin", "tryplicity", 'printf "%s\\n" "$@" > "$PWD/called"')
    done = subprocess.run(["bash", str(job)], env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = tmp_path / "runs" / f"{load_spec(spec, registry).name}.given"
    assert (tmp_path / "called").read_text().splitlines() == [
        "train", f"runs/{given.name}/spec.yaml", "--hw", f"runs/{given.name}/hardware.yaml", "--plugin",
        f"runs/{given.name}/mine.py", "--copy-to", "s3://mine/it's", "--minutes", "600", "--run",
        f"runs/{given.stem}", "--resume"]
    assert (given / "mine.py").read_text() == plugin.read_text()
    assert load_spec(str(given / "spec.yaml"), registry).identity() == load_spec(spec, registry).identity()
    assert load_hardware(given / "hardware.yaml", registry) == load_hardware(machine, registry)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_skypilot_task_is_yaml_whose_scripts_are_bash(write, machine):
    spec, _, accelerators = MACHINES[machine]
    for options, down in ((["--copy-to", "s3://a/b"], True), ([], False)):  # nothing that is nowhere else is taken down
        task = yaml.safe_load(write(spec, machine, "skypilot", "--tokens", "1e9", *options).read_text())
        assert task["resources"] == {"accelerators": accelerators, "autostop": {"idle_minutes": 10, "down": down}}
        for script in (task["setup"], task["run"]):
            assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert "--tokens 1000000000 --run" in task["run"]


TWO = ["--set", "hardware.nodes=2", "--minutes", "60"]


def ran(job, tmp_path, environment, **programs):
    """The script, where these programs are stubs."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, text in programs.items():
        stub(tmp_path / "bin", name, text)
    return subprocess.run(["bash", str(job)], cwd=tmp_path, capture_output=True, text=True, env={
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **environment})


def test_on_several_machines_slurm_starts_every_rank(write, tmp_path):
    job = write("full", "h200", "slurm", *TWO)
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in job.read_text().splitlines()
                 if line.startswith("#SBATCH"))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "8", "8")
    assert "ntasks" not in asked and asked["cpus-per-task"] == "8"
    done = ran(job, tmp_path, {}, srun='printf "%s " "$@"', tryplicity="exit 9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--kill-on-bad-exit=1 tryplicity train runs/tryplicity-full.given/spec.yaml --hw ")
    assert "hardware.yaml --minutes 60 --run runs/tryplicity-full --resume" in done.stdout


LAUNCHER = 'printf "%s " "$@"'


def test_on_several_machines_the_shell_and_skypilot_start_torch_s_launcher_on_each(registry, write, tmp_path):
    wanted = ("-m torch.distributed.run --nnodes=2 --nproc-per-node=8 --node-rank=1 --master-addr=10.0.0.7 "
              "--master-port=29500 --no-python -- tryplicity train {}.given-1/spec.yaml --hw {}.given-1/hardware.yaml "
              "--minutes 60 --run {} --resume ")
    programs = {"python3": LAUNCHER, "tryplicity": "exit 9"}
    job = write("full", "h200", "shell", *TWO)
    done = ran(job, tmp_path, {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.7"}, **programs)
    assert done.returncode == 0 and done.stdout == wanted.replace("{}", "runs/tryplicity-full"), done.stderr
    assert load_hardware(tmp_path / "runs" / "tryplicity-full.given-1" / "hardware.yaml", registry).nodes == 2
    done = ran(job, tmp_path, {}, **programs)
    assert done.returncode != 0 and "NODE_RANK: which of the machines this is" in done.stderr

    shared = tmp_path / "shared" / "full"
    task = yaml.safe_load(write("full", "h200", "skypilot", *TWO, "--folder", str(shared)).read_text())
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H200:8"
    (tmp_path / "task.sh").write_text(task["run"])
    done = ran(tmp_path / "task.sh", tmp_path, {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"},
               **programs)
    assert done.returncode == 0 and done.stdout == wanted.replace("{}", str(shared)), done.stderr


def test_data_of_this_machine_goes_along_to_a_cloud(write, tmp_path):
    (tmp_path / "my texts").mkdir()
    task = yaml.safe_load(write(SMALL, "cpu", "skypilot", "--steps", "3", "--data", "my texts").read_text())
    assert task["file_mounts"] == {"~/tryplicity-data/my texts": str(tmp_path / "my texts")}
    assert "--data ~/'tryplicity-data/my texts'" in task["run"]  # the shell there opens the ~
    assert task["resources"]["cpus"] == "2+"


@pytest.mark.clients
@pytest.mark.parametrize("machine", MACHINES)
def test_skypilot_s_own_parser_takes_the_task(write, tmp_path, machine):
    spec, _, accelerators = MACHINES[machine]
    assert SKY.exists(), f"{SKY} is missing; `make clients` installs it"
    job = write(spec, machine, "skypilot", "--dollars", "20", "--copy-to", "s3://a/b", "--spot")
    program = ("import json, sys, sky; task = sky.Task.from_yaml(sys.argv[1]); one, = task.resources; "
               "print(json.dumps([task.name, one.accelerators, one.use_spot, one.autostop_config.down, "
               "one.autostop_config.idle_minutes, task.workdir]))")
    done = subprocess.run([SKY, "-c", program, str(job)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    kind, count = accelerators.split(":")
    name, found, spot, down, idle, workdir = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("tryplicity-") and found == {kind: int(count)} and spot and down and idle == 10
    assert (Path(workdir) / "setup.cfg").is_file()


def test_the_shell_form_trains_here_brings_the_checkpoint_home_and_goes_on(corpus, cache, prepared, tmp_path):
    """As typed, in a process of its own; the same file started again goes on, on a machine that has nothing yet too."""
    environment = {**os.environ, "TRYPLICITY_CACHE": str(cache),
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    home = tmp_path / "home"
    line = [sys.executable, "-m", "tryplicity.cli", "launch", SMALL, "--hw", "cpu", "--to", "shell", "--data",
            str(corpus), "--steps", "5", "--copy-to", f"file://{home}", "--out", "job.sh", "--run"]
    (tmp_path / "one").mkdir()
    done = subprocess.run(line, cwd=tmp_path / "one", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "one" / "runs" / "small"
    assert (run / "model.safetensors").is_file() and "5 steps" in done.stdout
    assert (home / "checkpoints" / "step-5").is_dir()
    (tmp_path / "two").mkdir()
    script = (tmp_path / "one" / "job.sh").read_text().replace("--steps 5", "--steps 6")
    again = subprocess.run(["bash", "-c", script], cwd=tmp_path / "two", env=environment, capture_output=True,
                           text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    lines = (tmp_path / "two" / "runs" / "small" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line][-1] == 6
    assert (home / "checkpoints" / "step-6").is_dir()


@pytest.mark.parametrize(("options", "code", "words"), [
    (["--steps", "1", "--minutes", "2"], 2, "exactly one of"),
    ([], 2, "exactly one of"),
    (["--dollars", "5"], 2, "has no price"),
    (["--steps", "1", "--set", "hardware.memory_gb=1e-3"], 1, "does not fit"),
    (["--steps", "1", "--out", "kept"], 2, "is not written over"),
    (["--steps", "1", "--to", "skypilot", "--set", "hardware.nodes=2", "--set", "hardware.strategy=ddp"], 2,
     "a disk that they share"),
    (["--steps", "1", "--to", "skypilot", "--set",
      "phases=[{kind: pretrain, data: /nowhere}]"], 2, "no such file or folder"),
])
def test_what_cannot_be_launched_is_said_and_nothing_written(capfd, tmp_path, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    Path("kept").write_text("mine\n")
    ended, _, err = call(capfd, "launch", SMALL, "--hw", "cpu", "--to", "shell", *options)
    assert ended == code and words in err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and Path("kept").read_text() == "mine\n"


def test_what_should_start_it_and_is_not_there_is_named(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call(capfd, "launch", SMALL, "--hw", "cpu", "--to", "slurm", "--steps", "1", "--run")
    assert code == 2 and "sbatch: not found on this machine; take launch-small.sbatch" in err
    assert Path("launch-small.sbatch").is_file()
