import itertools
from pathlib import Path

import pytest
import torch


def run_of(spec, folder, tokenizer):
    """(run, model): a run folder with weights away from their initial values, and its model as training has it."""
    from tryplicity.model import assemble, initialise
    from tryplicity.run import Run
    from tryplicity.training.checkpoint import save_weights

    model = initialise(assemble(spec), "cpu", 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    run = Run(folder)
    run.create(spec=spec.as_yaml(), hardware="", build={}, data={}, tokenizer=tokenizer.read_text())
    save_weights(model, run.weights)
    return run, model


@pytest.fixture(scope="session")
def make_packed(registry):
    """`make_packed("heads=[]", ...)`: a small ternary model, packed, whose products have the same bits however tokens
    are batched; every parameter away from its initial value."""
    from tryplicity.components import Linear
    from tryplicity.model import assemble, initialise
    from tryplicity.spec import load_spec

    def make(*settings, linear="bitlinear", dtype=torch.float32):
        spec = load_spec(str(Path(__file__).parents[1] / "small.yaml"), registry,
                         [f"linear={linear}", "context_length=256", *settings])
        model = initialise(assemble(spec), "cpu", 0).to(dtype).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
        model.embedding.weight.mul_(2)
        for module in model.modules():
            if isinstance(module, Linear) and (packed := module.pack()) is not None:
                module.adopt(packed)
        return model

    return make


@pytest.fixture(scope="session")
def packed_model(make_packed):
    return make_packed()


@pytest.fixture(scope="session")
def tokenizer(prepared):
    from tryplicity.data import load_tokenizer

    return load_tokenizer(prepared.tokenizer_path)


@pytest.fixture(scope="session")
def plain():
    """`plain(model, request)`: the tokens of a request by decoding it alone, without an engine."""
    from tryplicity.inference.engine import decode
    from tryplicity.inference.sampler import Sampler

    def write(model, request):
        sampler = Sampler(request.sampling, [token for token in request.prompt if token >= 6])
        tokens = itertools.islice(decode(model, request.prompt, sampler), request.max_tokens)
        ends = {1} if request.end_tokens is None else request.end_tokens  # <|eos|>
        return list(itertools.takewhile(lambda token: token not in ends, tokens))

    return write
