"""The functions that the layers' C++ shares, and the layers where there is no C++."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_tools import assemble, part, site, without_native
from torch.nn import functional as F

from tryplicity import Report, kernels
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.hyper_connections import HyperConnections
from tryplicity_plugins.layers.mamba2 import Mamba2
from tryplicity_plugins.layers.norms import RMSNorm

SOURCE = """
#include "common.h"
#define EACH(name) extern "C" void each_##name(const float* x, float* y, int64_t n) { \\
    by_eights(n, [&](int64_t i, int64_t count) { store(y + i, name(load(x + i, count)), count); }); }
EACH(exp) EACH(silu) EACH(sigmoid) EACH(softplus) EACH(tanh)
extern "C" void dots(const float* a, const float* b, float* out, int64_t n) {
    out[0] = dot(a, b, n);
    out[1] = inverse_rms(a, n, 1e-6f);
}
"""


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """The shared functions, callable."""
    folder = tmp_path_factory.mktemp("common")
    shutil.copy(Path(native.__file__).with_name("common.h"), folder)
    (folder / "functions.cpp").write_text(SOURCE)
    library = kernels.compile_library(folder / "functions.cpp")
    assert library is not None, kernels.why_not()
    return library


def call(function, *tensors, size):
    function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), ctypes.c_int64(size))


def on(common, name, x):
    y = torch.empty_like(x)
    call(getattr(common, f"each_{name}"), x, y, size=len(x))
    return y


EDGES = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 88.7, 88.8, -87.4, -103.9, -104.1, 1e30, -1e30, 1e-38, 1e-45]
FORMULAS = {"exp": torch.exp, "silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
            "softplus": lambda x: F.softplus(x, threshold=40)}


@pytest.mark.parametrize("name", FORMULAS)
def test_functions_are_exact_to_a_few_roundings(common, name):
    small = torch.logspace(-30, 0, 2001)
    x = torch.cat([torch.linspace(-110, 95, 100_003), small, -small, torch.tensor(EDGES)])
    y, expected = on(common, name, x), FORMULAS[name](x.double())
    assert torch.equal(y.isnan(), expected.float().isnan())
    assert torch.equal(y.isinf(), expected.float().isinf())
    usual = expected.float().isfinite()
    # 4 units in the last place; below 2^-126 fp32 has fewer digits, and silu's exp(-x) is infinite there
    error = (y.double() - expected)[usual].abs()
    assert (error <= 4 * 2**-24 * expected[usual].abs() + 3e-37).all()
    if name == "exp":
        assert (error <= 4 * 2**-24 * expected[usual].abs() + 2**-149).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_an_element_has_the_same_bits_wherever_it_stands(common, name):
    """At every place of a vector, in a whole one and in the rest of a row."""
    x = torch.linspace(-20, 20, 37)
    together = on(common, name, x)
    for start in range(1, 9):
        assert torch.equal(on(common, name, x[start:].clone()), together[start:])
    assert torch.equal(torch.cat([on(common, name, one) for one in x.split(1)]), together)


@pytest.mark.parametrize("size", [1, 3, 8, 31, 32, 33, 77, 1000])
def test_sums_over_a_row(common, size):
    a, b, out = torch.randn(size), torch.randn(size), torch.empty(2)
    call(common.dots, a, b, out, size=size)
    scale = (a.double() * b.double()).abs().sum().item()
    assert abs(out[0].item() - a.double().dot(b.double()).item()) < 1e-6 * scale
    torch.testing.assert_close(out[1].double(), (a.double().square().mean() + 1e-6).rsqrt(), rtol=1e-6, atol=0)


LAYERS = """
import torch
from layer_tools import part, site, assemble
from test_native import outputs
from tryplicity import kernels
from tryplicity_plugins.layers import native
assert native.library() is None and kernels.why_not()
torch.save(outputs(), {path!r})
"""


def outputs():
    """Each layer with C++ of its own: a prompt, then a token."""
    here = site(hidden=24)
    mixer = assemble(lambda: part(Mamba2, state_size=5, head_dim=6).build(here), spread=0.3)
    hyper = assemble(lambda: part(HyperConnections).build(here), spread=0.3)
    norm = assemble(lambda: part(RMSNorm).build(24), spread=0.3)
    x, state = torch.randn(1, 9, 24), mixer.new_state(1)
    with torch.no_grad():
        y = torch.cat([mixer(x[:, :8], state=state), mixer(x[:, 8:], state=state)], 1)
        streams = hyper(torch.randn(1, 9, 4, 24), lambda x: (2 * x, Report()))[0]
        return {"mamba2": y, **state, "hyper_connections": streams, "rmsnorm": norm(x)}


def test_without_a_compiler_the_answers_are_the_same(tmp_path):
    assert native.library() is not None, kernels.why_not()
    here, path = os.path.dirname(__file__), str(tmp_path / "outputs.pt")
    subprocess.run([sys.executable, "-c", LAYERS.format(path=path)], check=True,
                   env={**os.environ, "TRYPLICITY_KERNELS": "0",
                        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])})
    expected, got = torch.load(path), outputs()
    with without_native():
        patched = outputs()
    assert any(not torch.equal(got[name], expected[name]) for name in got), "C++ did not run at all"
    for name, value in expected.items():
        assert torch.equal(patched[name], value), name
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def test_what_c_must_not_touch():
    x = torch.randn(2, 4)
    assert not native.for_inference(x)  # gradients are on
    with torch.no_grad():
        assert native.for_inference(x)
        for other in (x.double(), x.T, x.to("meta"), torch.nn.Parameter(x)):
            assert not native.for_inference(other)
        with torch.autocast("cpu", torch.bfloat16):
            assert not native.for_inference(x)


def test_moved_parameters_are_noticed():
    """Addresses are remembered; a conversion, a new tensor and a copy of the module each have their own."""
    from copy import deepcopy

    norm, x = assemble(lambda: part(RMSNorm).build(8), spread=0.3), torch.randn(3, 8)
    with torch.no_grad():
        first = norm(x)
        other = deepcopy(norm)
        other.weight.mul_(2)
        torch.testing.assert_close(other(x), 2 * first)
        assert torch.equal(norm(x), first)
        norm.weight = torch.nn.Parameter(3 * norm.weight)
        torch.testing.assert_close(norm(x), 3 * first)
        norm.weight.data = norm.weight.data.bfloat16()
        torch.testing.assert_close(norm(x), 3 * first, rtol=1e-2, atol=1e-2)
        wide = norm.double()
        torch.testing.assert_close(wide(x.double()).float(), 3 * first, rtol=1e-2, atol=1e-2)
