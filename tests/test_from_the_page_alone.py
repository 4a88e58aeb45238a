"""What docs/plugins.md tells a stranger to type, typed: from the wheel, in an environment and a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
METRICS = "runs/mine/metrics.jsonl"
(BLOCK,) = re.findall(r"^```sh\n(tryplicity plugins new .*?)^```", PAGE, re.M | re.S)


@pytest.fixture
def environment(tmp_path):
    """With the wheel installed, and what it depends on lent from here."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    here = [folder for folder in sys.path if folder.endswith("site-packages")] or site.getsitepackages()
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(here))
    source = tmp_path / "source"
    parts = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "tryplicity", "plugins", "specs", "hardware",
             "recipes", "static"]
    for name in parts:  # not what earlier builds have left there
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    # the source distribution, and the wheel out of that
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "built", source],
                   check=True, stdout=subprocess.DEVNULL)
    assert [path.suffix for path in sorted((tmp_path / "built").iterdir())] == [".whl", ".gz"]
    (wheel,) = (tmp_path / "built").glob("tryplicity-*.whl")
    own = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*own, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    tool = home / "bin" / "pip"
    tool.write_text(f"#!/bin/sh\nexec {sys.executable} -m pip -q --python {python} \"$@\" --no-deps "
                    "--no-build-isolation\n")
    pytest_ = home / "bin" / "pytest"
    pytest_.write_text(f"#!/bin/sh\nexec {python} -m pytest -q \"$@\"\n")
    for one in (tool, pytest_):
        one.chmod(0o755)
    return os.environ | {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "TRYPLICITY_CACHE": str(tmp_path / "cache"),
                         "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


@pytest.mark.slow
def test_every_line_of_the_page_works(environment, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    before, file, after = re.split(r"^(cat .*?^END)$\n", BLOCK, flags=re.M | re.S)
    *lines, serve = [*before.splitlines(), file, *after.splitlines()]
    said = {}
    for line in lines:
        if line.startswith("tryplicity train") and "--resume" not in line:
            _stopped(line, folder, environment)     # as by Ctrl-C, in the midst of it; then it goes on to its end
            line += " --resume"
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        said[line] = done.stdout
    assert "2 passed" in said["pytest my-mixer"]
    assert re.search(r"my-mixer: \d+ kept, 0 broken", said["tryplicity plugins check my-mixer"])
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    steps = [one for one in lines if "loss" in one]
    assert [one["step"] for one in steps] == list(range(1, 61))
    # four rows of 64 tokens on each of two ranks
    assert [one["tokens"] for one in steps] == [2 * 4 * 64 * one["step"] for one in steps]
    assert steps[59]["loss"] < steps[0]["loss"]
    assert "my-mixer: 0.1.0" in (folder / "runs/mine/spec.yaml").read_text()
    _answers(serve, folder, environment)
    # and without the package it is said what to install
    subprocess.run(["bash", "-c", "rm -rf my-mixer/my_mixer"], cwd=folder, check=True)
    done = subprocess.run(["bash", "-c", "tryplicity generate runs/mine x"], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "pip install my-mixer==0.1.0" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_quickstart_from_the_wheel(environment, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(["tryplicity", "quickstart", "--minutes", "0.05", "--no-page"], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (folder / "runs/quickstart/model.safetensors").is_file()
    where = subprocess.run(["python", "-c", "import tryplicity; print(tryplicity.__file__)"], cwd=folder,
                           env=environment, capture_output=True, text=True).stdout
    assert Path(where.strip()).is_relative_to(tmp_path / "environment")


def _stopped(line: str, folder: Path, environment: dict[str, str]) -> None:
    """Runs what trains 50 steps, and ends it once it has begun."""
    assert line.endswith("--steps 50")
    training = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    try:
        while not (folder / METRICS).is_file() or not (folder / METRICS).read_text():
            assert training.poll() is None, training.communicate()[0][-3000:]
            time.sleep(0.01)
    finally:
        training.send_signal(signal.SIGINT)
        said = training.communicate(timeout=120)[0]
    (saved,) = (folder / "runs/mine/checkpoints").iterdir()
    assert training.returncode == 130 and saved.name in {f"step-{n}" for n in range(1, 50)}, said[-3000:]


def _answers(line: str, folder: Path, environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(["bash", "-c", "exec " + line.replace("--port 5001", f"--port {port}")], cwd=folder,
                              env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        body = json.dumps({"model": "mine", "prompt": "The list", "max_tokens": 4}).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body,
                                       {"Content-Type": "application/json"})
        end = time.monotonic() + 120
        while True:
            try:
                answer = json.load(urllib.request.urlopen(asked, timeout=30))
                break
            except OSError as error:
                assert server.poll() is None and time.monotonic() < end, error
                time.sleep(0.5)
        assert answer["choices"][0]["text"] is not None and answer["usage"]["completion_tokens"] > 0
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
