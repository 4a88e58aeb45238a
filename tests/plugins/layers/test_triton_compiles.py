"""The kernels for cards that are not here: they compile, and fit the shared memory that a program has there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tryplicity.kernels import triton_ternary
from tryplicity_plugins.layers import triton_ssd_backward, triton_ssd_forward

ROOT = Path(__file__).parents[3]
CARDS = {  # bytes of shared memory that a program may have
    "cuda:80": 166912,  # A100
    "cuda:90": 232448,  # H100, H200
    "cuda:100": 232448,  # B200
    "cuda:120": 101376,  # RTX 5090
    "hip:gfx942": 65536,  # MI300X
}


@pytest.mark.parametrize("card, kinds", [("cuda:120", ["usual"]), *(pytest.param(card, [], marks=pytest.mark.slow)
                                                                    for card in CARDS)])
def test_every_kernel_compiles_and_fits(card, kinds, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "tests/compiled_for_cards.py", card, *kinds], cwd=ROOT, text=True,
                          env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    shared = [json.loads(line) for line in done.stdout.splitlines()]
    assert max(size for _, size in shared) <= CARDS[card], shared
    kernels = {name for module in (triton_ssd_forward, triton_ssd_backward, triton_ternary)
               for name in vars(module) if name.endswith("_kernel")}
    assert {name for name, _ in shared} == kernels
