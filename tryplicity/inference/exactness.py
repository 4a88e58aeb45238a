"""Whether a token's numbers are the same to the bit however its text is cut into passes and whatever else is in a pass.

They are where every product and sum has an order of its own for each token: in our C++ (packed linears, fp32), but not
in general in torch, whose products round differently for other numbers of rows. So it is tried, on this machine and
with these weights: each kind of block reads the same few tokens whole, in parts, and one by one beside another
sequence. Shapes: T time, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tryplicity.components import Rows
from tryplicity.model import Block, Model

READ, CUT, WRITTEN = 66, 37, 5  # tokens read, where in two parts; and written after them: a page of attention is 64


def why_inexact(model: Model, read_threads: int, decode_threads: int) -> str | None:
    """None where all is the same to the bit; else the first part that is not, in a line. Threads: as many as prompts
    are read and tokens written with."""
    threads, kinds = torch.get_num_threads(), {}
    for number, layer in enumerate(model.spec.layers):
        kinds.setdefault(repr(layer), number)
    try:
        with torch.inference_mode():
            for number in kinds.values():
                x_TD = _tokens(model, seed=1)
                whole, pieces = _read(model, model.layers[number], x_TD, read_threads, decode_threads)
                if not torch.equal(whole, pieces):
                    layer = model.spec.layers[number]
                    parts = " + ".join(part.name for part in (layer.mixer, layer.feed_forward) if part)
                    return f"layer {number} ({parts}) rounds a token differently in other company"
            h_TD = model.norm(_tokens(model, seed=2))
            torch.set_num_threads(read_threads)
            whole = model.logits(h_TD[None])[0]
            torch.set_num_threads(decode_threads)
            alone = torch.cat([model.logits(h_TD[None, t:t + 1])[0] for t in range(WRITTEN)])
            three = model.logits(h_TD[:3, None])[:, 0]
            if not (torch.equal(whole[:WRITTEN], alone) and torch.equal(whole[:3], three)):
                return "the output table rounds a token differently in other company"
    except Exception as error:  # whatever it is, it will be told when it is met in an answer
        return f"it could not be tried ({type(error).__name__}: {error})".partition("\n")[0]
    finally:
        torch.set_num_threads(threads)
    return None


def _tokens(model: Model, seed: int) -> Tensor:
    weight = model.embedding.weight
    x_TD = torch.randn(READ + WRITTEN, model.spec.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x_TD.to(weight.device, model.embedding.dtype or weight.dtype)


def _read(model: Model, block: Block, x_TD: Tensor, read_threads: int, decode_threads: int) -> tuple[Tensor, Tensor]:
    """What a block makes of the tokens read at once, and cut up and beside others."""
    residual = block.residual
    like = {"device": x_TD.device, "dtype": x_TD.dtype}

    def step(x_BTD: Tensor, state: list) -> Tensor:
        return residual.reduce(block(residual.expand(x_BTD), state)[0])

    torch.set_num_threads(read_threads)
    whole = step(x_TD[None], block.new_state(1, **like))[0]
    state, other = block.new_state(1, **like), block.new_state(1, **like)
    pieces = [step(x_TD[None, :CUT], state)[0], step(x_TD[None, CUT:READ], state)[0]]
    step(x_TD[None, :3].flip(1), other)  # of another length
    rows = [None if a is None else Rows((a, b)) for a, b in zip(state, other, strict=True)]
    torch.set_num_threads(decode_threads)
    for t in range(READ, READ + WRITTEN):
        together = step(torch.stack([x_TD[t:t + 1], x_TD[t - READ:t - READ + 1]]), rows)
        pieces.append(together[0])
    return whole, torch.cat(pieces)
