"""What a rented machine needs to train a spec, as one file: for a shell, for Slurm, for SkyPilot. Loads no torch.

The file holds the resolved spec, the profile and the plugins themselves, so that it alone has to go there. It sets up,
trains under a budget with `--resume`, so that the same file started again goes on, and has every checkpoint copied
home.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tryplicity import __version__
from tryplicity.builder import Build
from tryplicity.errors import UserError
from tryplicity.spec import dump_yaml

#: words of a device's market name that are not in the name by which clouds rent it out
VENDORS = re.compile(r"\b(NVIDIA|GeForce|AMD|Instinct|SXM|PCIe)\b")
CORES_PER_DEVICE = 8
NOTICE = 120  # seconds before its end that a job is told
SLACK = 1.25  # of a job's time over what is planned, and half an hour
END = "end-of-file-of-tryplicity"


@dataclass(frozen=True)
class Job:
    """A training for another machine."""

    build: Build
    folder: str  # of the run, there
    options: tuple[str, ...]  # of `train`, but for spec, profile and plugins
    install: str  # what pip is told to install
    hours: float  # planned
    plugins: tuple[Path, ...] = ()
    data: Mapping[str, Path] = field(default_factory=dict)  # option -> what it names on this machine
    spot: bool = False

    @property
    def name(self) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", self.build.spec.name.lower()).strip("-")
        return name if name.startswith("tryplicity") else f"tryplicity-{name}"

    def told(self) -> list[str]:
        """What it is, for who reads the file."""
        hardware = self.build.hardware
        cost = self.hours * hardware.machine_price_per_hour
        price = f", ${cost:,.2f} at ${hardware.machine_price_per_hour:,.2f} an hour" if cost else ""
        return [f"{self.build.spec.name} on {hardware.described}, by tryplicity {__version__}",
                f"planned, not measured: {self.hours:,.1f} h of training{price}"]


def planned_hours(build: Build, *, steps: int | None, tokens: int | None, minutes: float | None,
                  dollars: float | None) -> float:
    """Of the training, by its budget and the plan's speed."""
    if minutes is not None:
        return minutes / 60
    if dollars is not None:
        return dollars / build.hardware.machine_price_per_hour
    if tokens is None:
        tokens = steps * build.hardware.sequences_per_step() * build.spec.context_length
    return tokens / build.plan.as_dict()["throughput"]["tokens_per_second"] / 3600


def shell(job: Job) -> str:
    """A script for any machine with Python: `bash FILE`; on each of several, which is told its number and where the
    first one is."""
    several = [] if job.build.hardware.nodes == 1 else [
        f"# on each of the {job.build.hardware.nodes} machines, which share the disk of the run: NODE_RANK=0 (then 1, "
        "...) MASTER_ADDR=ADDRESS-OF-THE-FIRST bash ...",
        ': "${NODE_RANK:?which of the machines this is, from 0 on}" "${MASTER_ADDR:?the address of the first machine}"']
    return "\n".join(["#!/usr/bin/env bash", *(f"# {line}" for line in job.told()), "set -euo pipefail", *several, "",
                      *_set_up(job), *_files(job, _own(job)), *_train(job, _start(job), job.data)]) + "\n"


def _own(job: Job) -> str:
    """What tells the files of one machine from those of another on the disk that they share."""
    return '-"$NODE_RANK"' if job.build.hardware.nodes > 1 else ""


def _start(job: Job) -> str:
    """What begins the line that trains: on several machines torch's own launcher, with who is who from the
    environment."""
    hardware = job.build.hardware
    if hardware.nodes == 1:
        return "exec tryplicity"
    return (f"exec python3 -m torch.distributed.run --nnodes={hardware.nodes} --nproc-per-node={hardware.count} "
            '--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" '
            "--no-python -- tryplicity")


def slurm(job: Job) -> str:
    """A batch script: `sbatch FILE`. The folder that it is submitted from is taken to be there on the node too."""
    hardware, minutes = job.build.hardware, math.ceil(60 * (job.hours * SLACK + 0.5))
    gpus = [] if hardware.device == "cpu" else [f"gpus-per-node={hardware.count}"]
    # on one machine `train` starts its ranks itself; on several each is a task of srun's
    tasks, devices = ("ntasks=1", hardware.count) if hardware.nodes == 1 else (f"ntasks-per-node={hardware.count}", 1)
    srun = "exec srun --ntasks=1 --kill-on-bad-exit=1 tryplicity" if hardware.nodes == 1 else (
        "exec srun --kill-on-bad-exit=1 tryplicity")
    options = [f"job-name={job.name}", f"nodes={hardware.nodes}", tasks, *gpus,
               f"cpus-per-task={devices * CORES_PER_DEVICE if gpus else devices}",
               f"time={minutes // 60:02}:{minutes % 60:02}:00", f"signal=TERM@{NOTICE}", "requeue",
               "open-mode=append", f"output={job.name}.%j.log"]
    return "\n".join(["#!/usr/bin/env bash", *(f"#SBATCH --{option}" for option in options),
                      *(f"# {line}" for line in job.told()),
                      f"# {NOTICE} s before its time is up the training is told (SIGTERM), saves, and ends; this file "
                      "goes on when it is",
                      "# submitted again. Add what your site asks for: --partition, --account.",
                      "set -euo pipefail", "", *_set_up(job), *_files(job),
                      *_train(job, srun, job.data)]) + "\n"


def skypilot(job: Job) -> str:
    """A task: `sky launch FILE`. docs.skypilot.co/en/latest/reference/yaml-spec.html.

    Raises UserError for data of a phase that is a file of this machine: it would not be there; and for several
    machines without a folder on a disk that they share.
    """
    hardware = job.build.hardware
    if hardware.nodes > 1 and not job.folder.startswith("/"):
        raise UserError(f"--folder: the run folder of {hardware.nodes} machines lies on a disk that they share, and "
                        "SkyPilot's share none by themselves: mount one (`volumes:` in the task) and give the run's "
                        "path there, such as --folder /shared/first")
    for index, part in job.build.data.items():
        for value in part.as_dict().values():
            if isinstance(value, str) and value.startswith("/"):
                raise UserError(f"phases[{index}].data: {value} is on this machine alone; name a source that can be "
                                "read anywhere, or give it as --data or --chat-data")
    # without a copy elsewhere the machine's disk is all there is of the run
    resources: dict[str, Any] = {"autostop": {"idle_minutes": 10, "down": "--copy-to" in job.options}}
    if hardware.device == "cpu":
        resources["cpus"] = f"{max(2, hardware.count)}+"
    else:
        resources["accelerators"] = f"{_rented_as(hardware.accelerator)}:{hardware.count}"
    if job.spot:
        resources["use_spot"] = True
    there = {option: f"~/tryplicity-data/{path.name}" for option, path in job.data.items()}
    task: dict[str, Any] = {"name": job.name, "resources": resources}
    if hardware.nodes > 1:
        task["num_nodes"] = hardware.nodes
    if Path(job.install).is_dir():  # the sources go along
        task["workdir"] = job.install
    if there:
        task["file_mounts"] = {place: str(job.data[option]) for option, place in there.items()}
    set_up = ["set -euo pipefail", *_set_up(job, "." if "workdir" in task else job.install)]
    who = [] if hardware.nodes == 1 else [
        'export NODE_RANK="$SKYPILOT_NODE_RANK" MASTER_ADDR="$(head -n 1 <<< "$SKYPILOT_NODE_IPS")"']
    train = [*who, *_files(job, _own(job)),
             *_train(job, _start(job), {option: Path(place) for option, place in there.items()})]
    return "".join([*(f"# {line}\n" for line in job.told()), dump_yaml(task), _block("setup", set_up),
                    _block("run", [*set_up, *train])])


def _block(key: str, lines: list[str]) -> str:
    """A key of YAML whose value is these lines, as they stand."""
    text = "\n".join(lines)
    return f"{key}: |\n" + "".join(f"  {line}\n" if line else "\n" for line in text.split("\n"))


def _rented_as(accelerator: str) -> str:
    return re.sub(r"\s+", "", VENDORS.sub("", accelerator))


def _set_up(job: Job, install: str | None = None) -> list[str]:
    """An environment of its own where tryplicity is not there already; a torch that the machine brings is used."""
    index = "${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} "
    note = ["# AMD: TORCH_INDEX is the wheels for the machine's ROCm, see pytorch.org/get-started/locally"] if (
        job.build.hardware.device == "rocm") else []
    return ["# --- set up, once", *note,
            'place="${TRYPLICITY_VENV:-$HOME/.tryplicity-venv}"',
            'if ! command -v tryplicity > /dev/null; then',
            '    if [ ! -x "$place/bin/tryplicity" ]; then',
            '        python3 -m venv --system-site-packages "$place"',
            f'        "$place/bin/pip" install --quiet {index}{shlex.quote(install or job.install)}',
            "    fi",
            '    export PATH="$place/bin:$PATH"',
            "fi", ""]


def _files(job: Job, own: str = "") -> list[str]:
    """The spec, the profile and the plugins, as they are here."""
    lines = ["# --- what is trained, and on what", f"given={shlex.quote(job.folder)}.given{own}", 'mkdir -p "$given"']
    files = {"spec.yaml": job.build.spec.as_yaml(), "hardware.yaml": dump_yaml(asdict(job.build.hardware)),
             **{path.name: path.read_text(encoding="utf-8") for path in job.plugins}}
    if len(files) < 2 + len(job.plugins):
        raise UserError("--plugin: two of the files have the same name, or that of spec.yaml or hardware.yaml")
    for name, text in files.items():
        if END in text:
            raise UserError(f"{name}: a line {END!r} cannot be in it")
        lines += [f"cat > \"$given\"/{shlex.quote(name)} <<'{END}'", text.rstrip("\n"), END]
    return [*lines, ""]


def _train(job: Job, command: str, data: Mapping[str, Path]) -> list[str]:
    options = [*job.options, "--run", job.folder, "--resume"]
    shown = [shlex.quote(option) for option in options]
    for option, path in data.items():
        text = str(path)  # a shell opens the ~ of its own home alone, unquoted
        shown += [option, f"~/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)]
    plugins = [f'--plugin "$given"/{shlex.quote(path.name)}' for path in job.plugins]
    return ["# --- train; the same file started again goes on where the newest checkpoint stands",
            f'{command} train "$given"/spec.yaml --hw "$given"/hardware.yaml {" ".join([*plugins, *shown])}']
