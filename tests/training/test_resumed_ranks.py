"""A run that was stopped is gone on with by another number of ranks, under another strategy, as if it had not been."""

import pytest
from safetensors.torch import load_file

from tests.ranks import together
from tests.training.test_ranks import BRAIN, compare
from tests.training.whole_runs import train_there
from tryplicity.run import Run
from tryplicity.training.checkpoint import steps
from tryplicity.training.metrics import read_lines

SETTINGS = [BRAIN.format(every=4).replace("{{", "{").replace("}}", "}"), "phases=[]",
            "layers=[memory, attention]", "linear=bitlinear"]
SINGLE, DDP, FSDP, HYBRID = ((size, "{" + f"type: {kind}, exact: true{more}" + "}") for size, kind, more in (
    (1, "single", ""), (2, "ddp", ""), (2, "fsdp", ""), (4, "fsdp", ", shards: 2")))


@pytest.fixture(scope="module")
def go(corpus, cache, prepared):
    def train(folder, layout, stop_after=0):
        size, strategy = layout
        rows = "hardware.accumulation=4" if size == 1 else "hardware.count=4"
        ended = together(size, train_there, str(corpus), str(cache), str(folder),
                         [*SETTINGS, rows, f"hardware.strategy={strategy}"], 7, stop_after, limit=600)
        return ended[0][0]

    return train


@pytest.fixture(scope="module")
def uninterrupted(go, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert go(folder, SINGLE) == "budget"
    return said(folder)


def said(folder):
    lines = [line for line in read_lines(Run(folder).metrics) if "resumed" not in line]
    return lines, load_file(Run(folder).weights)


@pytest.mark.parametrize("layouts", [
    pytest.param((DDP, SINGLE), id="two copies to one"),
    pytest.param((SINGLE, FSDP), id="one to two shares"),
    pytest.param((DDP, FSDP), marks=pytest.mark.slow, id="copies to shares"),
    pytest.param((FSDP, HYBRID, SINGLE, DDP), marks=pytest.mark.slow, id="shares, shares of two copies, one, copies"),
    pytest.param(((4, FSDP[1]), DDP, (8, FSDP[1]), SINGLE), marks=pytest.mark.slow, id="four, two, eight, one"),
])
def test_losses_are_those_of_a_run_that_was_never_stopped(go, uninterrupted, tmp_path, layouts):
    folder = tmp_path / "run"
    for number, layout in enumerate(layouts[:-1]):
        stop_after = 1 + 2 * number
        assert go(folder, layout, stop_after) == "interrupted"
        assert steps(folder / "checkpoints")[-1] == stop_after
    assert go(folder, layouts[-1]) == "budget"
    compare(said(folder), uninterrupted)
