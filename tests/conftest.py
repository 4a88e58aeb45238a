import os
import random
import signal
from pathlib import Path

# before torch loads OpenMP: threads that wait for work take nothing from the others that this machine runs
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

HERE = Path(__file__).parent
# processes that share the tests (pytest-xdist) share the cores
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
# who else is busy on this machine must not change a bit of what tests compare
os.environ.setdefault("TRYPLICITY_THREADS", str(torch.get_num_threads()))
# before anything imports triton: without a card its kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# nohup, and a shell in what it runs in the background, have signals ignored, and so would every process that is
# started here: what a user's terminal would send must be heard
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)
WORDS = [
    "the", "model", "reads", "a", "list", "of", "numbers", "and", "returns", "their", "sum", "if", "it", "is",
    "not", "empty", "otherwise", "it", "raises", "an", "error", "while", "another", "function", "opens",
    "file", "closes", "socket", "prints", "text", "for", "each", "line", "in", "order", "to", "learn", "what",
    "comes", "next",
]


@pytest.fixture(scope="session")
def registry():
    from tryplicity import load_plugins

    return load_plugins().registry


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of texts made of a few words, enough for a vocabulary of 300."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for i in range(40):
        sentences = (" ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 12))) + "." for _ in range(12))
        (folder / f"{i:02}.txt").write_text("\n".join(sentences) + "\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def prepared(registry, corpus, cache):
    """The corpus, tokenised with 300 tokens."""
    from tryplicity.data import parse_source, prepare

    return prepare(parse_source(registry, str(corpus)), 300, cache)


@pytest.fixture
def make_spec(registry):
    """`make_spec("linear=bitlinear", ...)`: tests/small.yaml with `--set`."""
    from tryplicity.spec import load_spec

    return lambda *settings: load_spec(str(HERE / "small.yaml"), registry, settings)


@pytest.fixture
def make_model(make_spec):
    """A small model with every parameter away from its initial value, so that nothing is trivially zero."""
    from tryplicity.model import assemble, initialise

    def make(*settings, seed=0, dtype=torch.float32):
        model = initialise(assemble(make_spec(*settings)), "cpu", seed).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
        return model

    return make


@pytest.fixture
def make_build(registry):
    from tryplicity.builder import build

    def make(*settings, spec=HERE / "small.yaml"):
        return build(str(spec), "cpu", registry, [*settings, "hardware.batch=4"])

    return make
