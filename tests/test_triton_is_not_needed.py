"""Triton is for cards: without one nothing of ours imports it, whatever is installed."""

import subprocess
import sys

from tests.test_architecture import CORE, PLUGINS, imports

PROGRAM = """
import sys
import torch
from tests.plugins.layers.test_mamba2 import make
from tryplicity import load_plugins
from tryplicity.cli import main
from tryplicity.kernels import TernaryMatrix, packed_experts, packed_linear
assert load_plugins().registry
mixer = make()
mixer(torch.randn(1, 5, 32)).sum().backward()
with torch.no_grad():
    mixer(torch.randn(1, 1, 32), state=mixer.new_state(1))
for device in ("cpu", "meta"):
    packed_linear(torch.ones(1, 8, device=device), TernaryMatrix.from_digits(torch.ones(4, 8), 1.0).to(device))
matrix = TernaryMatrix.from_digits(torch.ones(2, 4, 8), torch.ones(2))
packed_experts(torch.ones(1, 8), matrix, None, torch.tensor([1]))
print([name for name in sys.modules if name.startswith("tryplicity") and "triton" in name])
"""


def test_it_is_imported_in_files_that_say_so():
    named = {module for modules in (CORE, PLUGINS) for module, path in modules.items()
             if any(target.partition(".")[0] == "triton" for _, target, _ in imports(path))}
    assert named and all(module.rpartition(".")[2].startswith("triton_") for module in named), named


def test_they_are_not_loaded_without_a_card():
    """Of whatever torch loads for reasons of its own, this says nothing."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
