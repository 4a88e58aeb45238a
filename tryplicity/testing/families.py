"""What is owed beside that by routers, linears, activations, inhibitions, heads, objectives, brain modules, optimizers,
schedules, strategies, sources, judges and retrievers.

Shapes: B batch, T time, D hidden, N tokens (B*T), E experts, K chosen experts, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import torch
from torch import nn

from tryplicity.components import IGNORE, Document, Passage, Source, Stage, Verdict, output_and_report
from tryplicity.errors import UserError
from tryplicity.promises import check_factor, check_mean, check_optimizer, check_routing, check_stage, check_state
from tryplicity.testing.hosts import Routed
from tryplicity.testing.promises import Broken, NotAsked, promised
from tryplicity.testing.trial import (
    BORDERS,
    CONTEXT,
    HIDDEN,
    ROWS,
    TIME,
    VOCABULARY,
    Trial,
    ids,
    made,
    needs,
    objective_losses,
    same,
    tokens,
)

FEW = 40  # documents of a source that are looked at


# --- parts of a layer ---

@promised("router", read="routers")
@torch.no_grad()
def routing(trial: Trial) -> None:
    """It chooses at most max_k experts for each token, on the host as on the device."""
    router, x_BTD = made(trial.build).router, tokens(HIDDEN)
    found = router(x_BTD)
    check_routing(router, found, ROWS * TIME, Routed.EXPERTS)
    if found.experts_NK.shape[1] != router.max_k:
        raise Broken(f"max_k is {router.max_k}, and forward gives {found.experts_NK.shape[1]} slots")
    if not 0 < router.mean_k <= router.max_k:
        raise Broken(f"mean_k is {router.mean_k}; it is what a budget is planned with, above 0 and at most max_k")
    unused_NK = found.experts_NK == Routed.EXPERTS
    if found.weights_NK[unused_NK].any():
        raise Broken("a slot without an expert has a weight; it must be zero")
    if found.weights_NK.dtype != x_BTD.dtype:
        raise Broken(f"weights of {found.weights_NK.dtype} for tokens of {x_BTD.dtype}")
    for n, (own, weights) in enumerate(zip(found.experts_NK, found.weights_NK, strict=True)):
        chosen = own[own < Routed.EXPERTS].tolist()
        if len(set(chosen)) < len(chosen) or not chosen:
            raise Broken(f"token {n} gets the experts {chosen}: one at least, and none twice")
        if (own[:len(chosen)] == Routed.EXPERTS).any():
            raise Broken("unused slots must come last")
        host = [(e, w) for e, w in router.choose(x_BTD.flatten(0, 1)[n]) if e < Routed.EXPERTS]
        if sorted(e for e, _ in host) != sorted(chosen) or not all(
                math.isclose(w, weights[own.tolist().index(e)], rel_tol=1e-3, abs_tol=1e-5) for e, w in host):
            raise Broken(f"choose gives {host} for a token for which forward chooses {chosen}")


@promised("linear", read="linears")
@torch.no_grad()
def stacks(trial: Trial) -> None:
    """Dense, stacked and packed it multiplies by the same weights."""
    part, x = trial.part, tokens(HIDDEN).flatten(0, 1)
    stack = made(lambda: part.build(HIDDEN, 16, experts=3))
    dense = made(lambda: part.build(HIDDEN, 16))
    ends_E = torch.tensor([4, 4, len(x)], dtype=torch.int32)
    product = stack(x, ends_E)
    for expert, (begin, end) in enumerate(((0, 4), (4, 4), (4, len(x)))):
        dense.weight.copy_(stack.weight[expert])
        same(product[begin:end], dense(x[begin:end]), f"expert {expert} of a stack is not the dense product", 1e-3)
        same(stack.expert_weight(expert), stack.effective_weight(stack.weight)[expert], "expert_weight", 1e-3)
    like = dense.packed_like()
    if not like:
        return
    packed = dense.pack()
    for name, tensor in like.items():
        if name not in packed or packed[name].shape != tensor.shape or packed[name].dtype != tensor.dtype:
            raise Broken(f"packed_like promises {name} as {list(tensor.shape)} of {tensor.dtype}, pack gives "
                         f"{list(packed[name].shape) if name in packed else 'none'}")
    bits = 8 * sum(tensor.nbytes for tensor in packed.values()) / dense.weight.numel()
    wanted, twin = dense.effective_weight(dense.weight), made(lambda: part.build(HIDDEN, 16))
    twin.adopt(packed)
    same(twin.unpack(), wanted, "unpack gives other weights than effective_weight", 1e-2)
    if not bits <= 4 * part.component.packed_bits + 16:
        raise Broken(f"packed_bits says {part.component.packed_bits}, and pack takes {bits:.1f} for each weight")


@promised("activation", read="activations")
@torch.no_grad()
def groups(trial: Trial) -> None:
    """In groups, each row is as in a group of its own."""
    many, one = made(lambda: trial.part.build(HIDDEN, groups=3)), made(lambda: trial.part.build(HIDDEN))
    x_SF, group_S = tokens(HIDDEN).flatten(0, 1), torch.arange(ROWS * TIME) % 4  # 3 stands for an unused row
    y_SF = output_and_report(many(x_SF, group_S))[0]
    same(torch.tensor(y_SF.shape), torch.tensor(x_SF.shape), "the shape")
    for group in range(3):
        own = {name: tensor[group] for name, tensor in many.state_dict().items()}
        one.load_state_dict({name: own[name].view_as(tensor) for name, tensor in one.state_dict().items()})
        here = group_S == group
        same(y_SF[here], output_and_report(one(x_SF[here]))[0], f"group {group}")


@promised("inhibition", read="routers")
@torch.no_grad()
def choosing(trial: Trial) -> None:
    """It chooses different experts for a token."""
    module = made(lambda: trial.part.build(Routed.EXPERTS)) if issubclass(trial.component, nn.Module) else None
    needs(module is not None, "it is no module")
    scores_NE = torch.rand(20, Routed.EXPERTS, generator=torch.Generator().manual_seed(0))
    experts_NK, _ = module.choose(scores_NE, scores_NE, 3)
    if experts_NK.shape != (20, 3) or experts_NK.dtype != torch.int64:
        raise Broken(f"choose gives {list(experts_NK.shape)} of {experts_NK.dtype} for 20 tokens and 3 experts each")
    if any(len(set(own)) < 3 or not all(0 <= e < Routed.EXPERTS for e in own) for own in experts_NK.tolist()):
        raise Broken("choose gives an expert twice, or one that is not there")
    experts_NK, _ = module.choose(scores_NE, scores_NE, 3, torch.ones(20, dtype=torch.int64))
    if (experts_NK[:, 0] != scores_NE.argmax(-1)).any():
        raise Broken("the first choice is not the highest standing")


# --- what is learned from ---

@promised("head", read="heads")
def head(trial: Trial) -> None:
    """Its targets come from data alone, and its loss is a sum that parts of a batch add up to."""
    module, h_BTD = made(trial.build), tokens(HIDDEN)
    table_VD = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))
    tokens_BT = torch.arange(ROWS * TIME).view(ROWS, TIME)
    next_BT = tokens_BT.roll(-1, 1)
    next_BT[:, -1] = IGNORE
    targets = module.targets(tokens_BT, next_BT, ids(BORDERS[0]))
    if targets.shape[:2] != (ROWS, TIME):
        raise Broken(f"targets of {list(targets.shape)}; the first axes are those of the tokens, {[ROWS, TIME]}")
    whole = check_mean(module, module(h_BTD, targets, table_VD))
    if float(whole.count) != float((targets != IGNORE).sum()):
        raise Broken(f"it counts {float(whole.count):g} targets, and {int((targets != IGNORE).sum())} are not IGNORE")
    parts = [module(h_BTD[i:i + 1], targets[i:i + 1], table_VD).total for i in range(ROWS)]
    same(sum(parts).detach(), whole.total.detach(), "row by row it gives another sum")
    if not isinstance(module.weight, float | int) or module.weight < 0:
        raise Broken(f"weight is {module.weight!r}, not a number of at least 0")
    drafted = module.draft(h_BTD)
    if drafted is not None and (drafted.ndim != 4 or drafted.shape[:2] != (ROWS, TIME) or drafted.shape[3] != HIDDEN):
        raise Broken(f"draft gives {list(drafted.shape)} instead of [B, T, K, D]")


@promised("objective", read="objectives")
def objective(trial: Trial) -> None:
    """What it says of a batch is the mean of what it says of the rows."""
    module, x_BTD, ids_BT = made(trial.build).train(), tokens(HIDDEN), ids(BORDERS[0])
    needs(trial.component.reads_blocks() or trial.component.weighs_tokens(),
          "it overrides neither block_loss nor token_weights")
    if trial.component.reads_blocks():
        for inner in module.modules():
            if hasattr(inner, "before_step"):
                inner.before_step(0)
        whole = objective_losses(module, x_BTD, ids_BT)
        rows = [objective_losses(module, x_BTD[i:i + 1], ids_BT[i:i + 1]) for i in range(ROWS)]
        for number, loss in enumerate(whole):
            same(sum(row[number] for row in rows).detach() / ROWS, loss.detach(), "a loss is no mean over rows", 1e-3)
            if loss.ndim:
                raise Broken(f"a loss has the shape {list(loss.shape)}; it is a number")
        module.factor = 2.0
        for twice, once in zip(objective_losses(module, x_BTD, ids_BT), whole, strict=True):
            same(twice.detach(), 2 * once.detach(), "factor does not multiply its loss", 1e-3)
    if trial.component.weighs_tokens():
        nll_BT = x_BTD.square().mean(-1)
        valid_BT = torch.arange(TIME) < torch.tensor([[5], [TIME]])
        weights_BT = output_and_report(module.token_weights(nll_BT * valid_BT, valid_BT))[0]
        if weights_BT[~valid_BT].any():
            raise Broken("tokens that are not valid have weights")
        mean_B = weights_BT.sum(1) / valid_BT.sum(1)
        same(mean_B, torch.ones(ROWS), "the weights of a row's valid tokens do not have a mean of one", 1e-3)
        for i in range(ROWS):
            alone = output_and_report(module.token_weights((nll_BT * valid_BT)[i:i + 1], valid_BT[i:i + 1]))[0]
            same(alone[0], weights_BT[i], "a row's weights depend on other rows", 1e-3)


# --- what acts on a run ---

@promised("brain", read="brain-modules")
def brain(trial: Trial) -> None:
    """Its stages are possible, and another instance goes on from its state."""
    one, other = trial.part.build(), trial.part.build()
    for moment in range(51):
        check_stage(one, one.stage(moment / 50, CONTEXT), CONTEXT)
    documents = numpy.arange(6)
    for step in range(1, 6):
        one.observe(documents, numpy.linspace(1, 3, 6), step)
        if not isinstance(one.wants_sleep(step), bool | numpy.bool_):
            raise Broken(f"wants_sleep gave {one.wants_sleep(step)!r}, not True or False")
    state = check_state(one, one.state())
    other.load_state(json.loads(json.dumps(state)))
    if check_state(other, other.state()) != state:
        raise Broken("another instance that loads its state has another one")
    for moment in range(51):
        first, second = (each.stage(moment / 50, CONTEXT) for each in (one, other))
        if isinstance(first, Stage) and first != second:
            raise Broken(f"after a resume the stage at {moment / 50:.0%} is another")


@promised("optimizer", read="optimizers-and-schedules")
def optimizer(trial: Trial) -> None:
    """It steps every parameter once, downhill, and goes on from what its state_dict holds."""
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]

    def begun() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        own = [nn.Parameter(tensor.clone()) for tensor in start]
        made_one = trial.part.build().build(own[:1], own[1:])
        check_optimizer(trial.part, made_one, {"matrix": own[0], "vector": own[1]})
        return own, made_one

    def stepped(own: list[nn.Parameter], stepping: torch.optim.Optimizer) -> float:
        stepping.zero_grad()
        loss = sum(parameter.square().sum() for parameter in own)
        loss.backward()
        stepping.step()
        return loss.item()

    own, stepping = begun()
    losses = [stepped(own, stepping) for _ in range(5)]
    if not losses[-1] < losses[0]:
        raise Broken(f"five steps on a sum of squares lead from {losses[0]:.3f} to {losses[-1]:.3f}")
    if any(torch.equal(parameter, before) for parameter, before in zip(own, start, strict=True)):
        raise Broken("a parameter with a gradient stays as it was")
    held = sum(value.nbytes for state in stepping.state.values() for value in state.values()
               if isinstance(value, torch.Tensor) and value.ndim)
    size = sum(parameter.numel() for parameter in own)
    if held > trial.component.state_bytes * size:
        raise Broken(f"it holds {held / size:.1f} bytes for each parameter, and state_bytes, by which memory is "
                     f"planned, says {trial.component.state_bytes}")
    twins, other = begun()
    for twin, parameter in zip(twins, own, strict=True):
        twin.data.copy_(parameter.data)
    other.load_state_dict(copy.deepcopy(stepping.state_dict()))  # torch takes the tensors themselves
    stepped(own, stepping), stepped(twins, other)
    for twin, parameter in zip(twins, own, strict=True):
        same(twin.data, parameter.data, "after a resume it takes another step", 1e-6)


@promised("schedule", read="optimizers-and-schedules")
def schedule(trial: Trial) -> None:
    """Its factor is a number of at least 0, the same whenever it is asked."""
    one, other = trial.part.build(), trial.part.build()
    factors = [check_factor(one, one.factor(i / 100, 10 * i)) for i in range(101)]
    for i in reversed(range(101)):
        if not math.isclose(check_factor(other, other.factor(i / 100, 10 * i)), factors[i], abs_tol=1e-9):
            raise Broken(f"asked in another order, it gives another factor at {i}% of the budget: a run that resumes "
                         "asks where it stands")
    if not any(factors):
        raise Broken("it is 0 all along: nothing is learned")


# --- text ---

@promised("source", read="sources")
def source(trial: Trial) -> None:
    """It gives the same documents again, each with an id of its own, and goes on where it stood."""
    gives = [name for name in ("documents", "conversations")
             if getattr(trial.component, name) is not getattr(Source, name)]
    needs(gives, "it gives neither documents nor conversations")
    made_one = _unless_unusable(trial.part.build)
    if not isinstance(made_one.fingerprint(), str):
        raise Broken(f"fingerprint gave {made_one.fingerprint()!r}, not a string")
    if made_one.fingerprint() != trial.part.build().fingerprint():
        raise Broken("fingerprint is another each time: nothing is ever found in the cache")
    for name in gives:
        first, second = (_unless_unusable(lambda name=name: list(itertools.islice(getattr(trial.part.build(), name)(),
                                                                                   FEW))) for _ in range(2))
        if first != second:
            raise Broken(f"{name} are others when they are read again")
        if len({one.id for one in first}) < len(first):
            raise Broken(f"two {name} have one id")
        for one in first:
            if not (isinstance(one.id, str) and one.id and isinstance(one.url, str)):
                raise Broken(f"one of the {name} has the id {one.id!r} and the URL {one.url!r}; both are strings")
            if isinstance(one, Document) and (not isinstance(one.text, str) or one.domain not in ("text", "code",
                                                                                                  "math")):
                raise Broken(f"{one.id}: the domain is {one.domain!r}; there are text, code and math")
    if "documents" in gives and len(first := list(itertools.islice(trial.part.build().documents(), FEW))) > 2:
        reading = trial.part.build().reading()
        for _ in range(2):
            next(reading)
        going_on = trial.part.build().reading(json.loads(json.dumps(reading.position())))
        if next(going_on) != first[2]:
            raise Broken("a reading that goes on from a position does not give the next document")


TEXTS = ("The list type keeps its items in order. Appending to it takes constant time on average.",
         "click here to win!!! click here to win!!! click here to win!!!",
         "def area(r):\n    return 3.14159 * r * r\n", "")


@promised("judge", read="judges")
def judge(trial: Trial) -> None:
    """A document gets the same verdict alone and in company."""
    one = trial.part.build()
    _unless_unusable(lambda: one.load(torch.device("cpu")))
    documents = [Document(f"kit:{i}", text, "text", f"kit:{i}") for i, text in enumerate(TEXTS)]
    together = one.judge(documents)
    if len(together) != len(documents):
        raise Broken(f"{len(together)} verdicts for {len(documents)} documents")
    for document, verdict in zip(documents, together, strict=True):
        if not isinstance(verdict, Verdict) or not math.isfinite(verdict.score) or verdict.keep not in (True, False,
                                                                                                       None):
            raise Broken(f"{document.text[:20]!r} got {verdict!r}; a Verdict has a finite score, and keep is True, "
                         "False or None")
        (alone,) = one.judge([document])
        if alone.keep != verdict.keep or not math.isclose(alone.score, verdict.score, rel_tol=1e-3, abs_tol=1e-4):
            raise Broken(f"{document.text[:20]!r} gets {alone} alone and {verdict} in company")
    if not trial.component.cost > 0:
        raise Broken(f"cost is {trial.component.cost!r}, not the seconds that a document takes")


@promised("retriever", read="retrievers")
def retriever(trial: Trial) -> None:
    """It finds at most as many passages as asked for, from several threads at once."""
    one, question = trial.part.build(), "What keeps its items in order?"

    def found(limit: int) -> list[Any]:
        return _unless_unusable(lambda: one.search(question, limit))

    passages = found(3)
    if len(passages) > 3 or not all(isinstance(passage, Passage) for passage in passages):
        raise Broken(f"search gave {len(passages)} results where at most 3 passages were asked for")
    if [p.score for p in passages] != sorted((p.score for p in passages), reverse=True):
        raise Broken("the best passage does not come first")
    if len({p.id for p in passages}) < len(passages):
        raise Broken("two passages have one id")
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(found, [3] * 8))
    if any([p.id for p in other] != [p.id for p in passages] for other in others):
        raise Broken("asked from several threads at once, it finds something else")
    if not all(isinstance(example, str) for example in one.examples(2)) or len(one.examples(2)) > 2:
        raise Broken("examples gives no more than so many questions, as strings")


def _unless_unusable(work: Any) -> Any:
    """What the component says it cannot do here (no index, no network, no model) is no broken promise."""
    try:
        return work()
    except UserError as error:
        raise NotAsked(str(error)) from None

