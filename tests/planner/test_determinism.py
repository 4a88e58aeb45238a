"""The same plan to the byte, every time: whatever the order of sets, the addresses that malloc gives, and what the
process has done before."""

import json
import os
import subprocess
import sys

import pytest

from tryplicity.builder import build

PLAN = """
import json, sys
from tryplicity import load_plugins
from tryplicity.builder import build

held = [bytearray(n) for n in range(1, int(sys.argv[1]), 41)]  # a heap with holes
del held[::2]
print(json.dumps(build("full", "h200", load_plugins().registry).plan.as_dict()))
"""
CONDITIONS = [({"PYTHONHASHSEED": "1"}, 2),
              ({"PYTHONHASHSEED": "2", "MALLOC_PERTURB_": "85", "MALLOC_TOP_PAD_": "0"}, 50_000)]


@pytest.fixture(scope="module")
def here(registry):
    return build("full", "h200", registry).plan.as_dict()


def test_again_in_one_process(registry, here):
    for _ in range(3):
        junk = [object() for _ in range(1000)]
        assert build("full", "h200", registry).plan.as_dict() == here
        del junk


@pytest.mark.parametrize(("environment", "junk"), CONDITIONS, ids=["seed 1", "seed 2, another heap"])
def test_in_another_process(here, environment, junk):
    ran = subprocess.run([sys.executable, "-c", PLAN, str(junk)], env={**os.environ, **environment}, check=True,
                         capture_output=True, text=True, timeout=120)
    assert json.loads(ran.stdout) == json.loads(json.dumps(here))
