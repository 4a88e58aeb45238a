import pytest
import torch


@pytest.fixture(autouse=True)
def eager():
    """transformers compiles the rounding of BitNet's linears, which takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield
