"""What a mixer or a feed-forward owes, and whatever is a part of one, tried promise by promise.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

import torch

from tryplicity.components import Rows, State
from tryplicity.testing.promises import IN_A_LAYER, LAYERS, Broken, NotAsked, promised
from tryplicity.testing.trial import (
    BORDERS,
    CUTS,
    ROWS,
    TIME,
    Trial,
    cases,
    filled,
    ids,
    in_chunks,
    made,
    run,
    same,
    tokens,
)

BOTH = (*LAYERS, *IN_A_LAYER)


@promised(*BOTH, "head", "objective", read="initialisation")
def initialised(trial: Trial) -> None:
    """Everything is initialised in reset_parameters."""
    filled(trial.build)


@promised(*BOTH, read="one-forward-for-any-length")
@torch.no_grad()
def shapes(trial: Trial) -> None:
    """[B, T, D] becomes [B, T, D]."""
    layer, x_BTD = made(trial.build), tokens(trial.hidden_size)
    y_BTD = run(layer, x_BTD)
    if y_BTD.shape != x_BTD.shape or y_BTD.dtype != x_BTD.dtype:
        raise Broken(f"{list(x_BTD.shape)} in {x_BTD.dtype} became {list(y_BTD.shape)} in {y_BTD.dtype}")


@promised(*BOTH, read="one-forward-for-any-length")
@torch.no_grad()
def causal(trial: Trial) -> None:
    """No token sees a later one."""
    layer, x_BTD = made(trial.build), tokens(trial.hidden_size)
    for case, ids_BT in cases():
        whole_BTD = run(layer, x_BTD, doc_ids=ids_BT)
        for seen in (1, 4, TIME - 1):
            later_BTD = torch.cat([x_BTD[:, :seen], 30 * tokens(trial.hidden_size, seed=2)[:, seen:]], 1)
            same(run(layer, later_BTD, doc_ids=ids_BT)[:, :seen], whole_BTD[:, :seen],
                 f"it leaks the future: the first {seen} outputs change with the tokens behind them, {case}")


@promised(*BOTH, read="one-forward-for-any-length")
@torch.no_grad()
def any_length(trial: Trial) -> None:
    """One forward for any length, whatever the documents and wherever the chunks meet."""
    layer, x_BTD = made(trial.build), tokens(trial.hidden_size)
    for case, ids_BT in cases():
        whole_BTD = run(layer, x_BTD, doc_ids=ids_BT)
        for cuts in CUTS:
            same(in_chunks(layer, x_BTD, cuts, ids_BT), whole_BTD, f"in chunks of {cuts} {case}")
    ids_BT = ids(BORDERS[0])  # which goes on to the end
    whole_BTD = run(layer, x_BTD, doc_ids=ids_BT)
    for cuts in ([6, 3], [6, 1, 1, 1]):
        same(in_chunks(layer, x_BTD, cuts, ids_BT, given=1), whole_BTD,
             f"a chunk without ids, after {cuts[0]} tokens with them, does not go on with the last document")


@promised(*BOTH, read="one-forward-for-any-length")
@torch.no_grad()
def rows(trial: Trial) -> None:
    """A row is as if alone, in a batch and in Rows of different lengths."""
    layer, x_BTD = made(trial.build), tokens(trial.hidden_size)
    for case, ids_BT in cases():
        alone = [run(layer, x_BTD[i:i + 1], doc_ids=None if ids_BT is None else ids_BT[i:i + 1]) for i in range(ROWS)]
        same(run(layer, x_BTD, doc_ids=ids_BT), torch.cat(alone), case)
    if not layer.takes_rows:
        return
    seen = [2, 5]
    together, apart = ([layer.new_state(1, dtype=x_BTD.dtype) for _ in seen] for _ in range(2))
    for states in (together, apart):
        for i, length in enumerate(seen):
            run(layer, x_BTD[i:i + 1, :length].contiguous(), states[i])
    for new in (1, 3):
        step_BTD = torch.stack([x_BTD[i, length:length + new] for i, length in enumerate(seen)])
        wanted = [run(layer, step_BTD[i:i + 1], state) for i, state in enumerate(apart)]
        same(run(layer, step_BTD, Rows(together)), torch.cat(wanted), "as Rows")
        seen = [length + new for length in seen]


@promised(*BOTH, read="documents")
def documents(trial: Trial) -> None:
    """Tokens with different ids never reach one another."""
    _apart(trial, [TIME], "in one chunk")


@promised(*BOTH, read="documents")
def documents_at_the_edge(trial: Trial) -> None:
    """Tokens with different ids never reach one another across the edge of two chunks."""
    for cuts in CUTS:
        _apart(trial, cuts, f"in chunks of {cuts}")


def _apart(trial: Trial, cuts: list[int], how: str) -> None:
    layer, x_BTD = made(trial.build), tokens(trial.hidden_size)
    for borders in BORDERS:
        ids_BT = ids(borders)
        for document in (0, 1):
            mine_BT = ids_BT == document
            which = f"document {document} of those that begin at {borders[0]} and {borders[1]}"
            other_BTD = torch.where(mine_BT[..., None], x_BTD, 30 * tokens(trial.hidden_size, seed=2))
            outputs = [in_chunks(layer, own_BTD, cuts, ids_BT)[mine_BT] for own_BTD in (x_BTD, other_BTD)]
            same(*outputs, f"{how}, {which} changes when others change")
            if len(cuts) == 1:
                whole = x_BTD.clone().requires_grad_()
                run(layer, whole, doc_ids=ids_BT)[mine_BT].square().sum().backward()
                if whole.grad[~mine_BT].abs().sum() != 0:
                    raise Broken(f"a gradient from {which} reaches others")


@promised(*BOTH, read="the-decoding-state")
@torch.no_grad()
def states(trial: Trial) -> None:
    """A state is a State of its own, and so is its clone."""
    layer, x_BTD = made(trial.build), tokens(trial.hidden_size)
    wanted_BTD, other_BTD = run(layer, x_BTD), 30 * tokens(trial.hidden_size, seed=2)
    state, foreign = (layer.new_state(ROWS, dtype=x_BTD.dtype) for _ in range(2))
    if state is None:
        raise NotAsked("it looks at each token alone")
    if not isinstance(state, State):
        raise Broken(f"new_state gives a {type(state).__name__}")
    given = x_BTD.clone()
    run(layer, other_BTD[:, :4], foreign)
    run(layer, given[:, :4], state)
    given.fill_(torch.nan)  # what a model lays its tokens in is used again
    twin = state.clone()
    run(layer, other_BTD[:, 4:7], twin)
    run(layer, other_BTD[:, 4:7], foreign)
    same(run(layer, x_BTD[:, 4:], state), wanted_BTD[:, 4:], "other text in another state or in a clone changed it")
    once_more, expected = state.clone(), state.clone()
    same(run(layer, other_BTD, once_more), run(layer, other_BTD, expected), "two clones go on differently")
