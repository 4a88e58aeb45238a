"""Text from a trained model, token by token from caches. Shapes: T prompt tokens, V vocabulary."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tryplicity.data.tokenizer import BOS, EOS, SPECIAL_TOKENS, load_tokenizer
from tryplicity.errors import UserError
from tryplicity.inference.sampler import Sampler, Sampling
from tryplicity.inference.text import TextStream, token_bytes
from tryplicity.model import Model, assemble
from tryplicity.run import Run
from tryplicity.spec import load_spec
from tryplicity.training import checkpoint


def decode(model: Model, prompt: Sequence[int], sampler: Sampler) -> Iterator[int]:
    """Token after token, without end: the prompt is read in one pass, then each step reads one token from caches."""
    device = model.embedding.weight.device
    state = model.new_state(1)
    ids_BT = torch.tensor([list(prompt)], device=device)
    threads = torch.get_num_threads()
    try:
        while True:
            with torch.inference_mode():
                logits_V = model(ids_BT, state=state, last_only=True)[0, -1]
                token = sampler(logits_V)
            if fits_caches(model):
                torch.set_num_threads(1)
            yield token
            ids_BT = torch.tensor([[token]], device=device)
    finally:
        torch.set_num_threads(threads)


def ready_for_decoding(model: Model) -> Model:
    """Put a loaded model in evaluation mode, and on a CPU make decoding fast; shapes and values stay.

    Every matrix that has more rows than columns is stored column by column: its product with one token then runs
    up to twice as fast. What Python holds by now is taken out of the garbage collector's rounds, which otherwise
    walk through all of torch again and again.
    """
    model.eval()
    gc.freeze()
    if model.embedding.weight.device.type == "cpu":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and parameter.shape[-2] > parameter.shape[-1]:
                    parameter.data = parameter.data.mT.contiguous().mT
    return model


@functools.lru_cache(maxsize=1)
def fits_caches(model: Model) -> bool:
    """Whether the weights are so few that a product for one token ends before a second thread has begun: then one
    thread decodes up to 1.5 times as fast as two."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return model.embedding.weight.device.type == "cpu" and size < 128e6


@dataclass
class Engine:
    """A model with its tokenizer, ready to write."""

    model: Model
    tokenizer: object

    @classmethod
    def load(cls, folder: str | Path, registry, device: str = "cpu") -> Engine:
        """From a run folder: its model.safetensors, or while it trains its newest checkpoint."""
        run = Run.open(folder)
        spec = load_spec(str(run.spec), registry)
        weights = run.weights
        if not weights.is_file():
            newest = checkpoint.newest(run.checkpoints)
            if newest is None:
                raise UserError(f"{folder}: no weights yet; train it first, or wait for its first checkpoint")
            weights = newest / "model.safetensors"
        model = assemble(spec).to_empty(device=device)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # fills the buffers that are computed rather than saved
        checkpoint.load_weights(model, weights)
        return cls(ready_for_decoding(model), load_tokenizer(run.tokenizer, spec.vocab_size))

    def tokens(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> Iterator[int]:
        """At most `max_tokens` tokens after `prompt`, up to and without the end-of-text token."""
        words = [token for token in prompt if token >= len(SPECIAL_TOKENS)]  # <|im_end|> must not be penalised
        sampler = Sampler(sampling, words, self.model.embedding.weight.device)
        for token in itertools.islice(decode(self.model, prompt, sampler), max_tokens):
            if token == EOS:
                return
            yield token

    def stream(self, prompt: str, sampling: Sampling, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Text after `prompt`, in whole characters, until the text ends, a stop string or `max_tokens`."""
        ids = [BOS, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        text = TextStream(token_bytes(self.tokenizer), stop)
        for token in self.tokens(ids, sampling, max_tokens):
            piece = text.feed(token)
            if piece:
                yield piece
            if text.stopped:
                return
        rest = text.finish()
        if rest:
            yield rest
