"""A training written out: no loop, step, optimizer or schedule of the package. What it shares with it is the model's
forward pass and the rows of the data; all else is here, from the papers and the documentation of the options."""

from __future__ import annotations

import math

import torch

#: parameters of two or more dimensions that are not matrices: gains, thresholds, how streams are mixed
NOT_MATRICES = ("residual.static", "activation.threshold")


def rate(step: int, steps: int, *, peak: float, warmup: int, decay: float, floor: float) -> float:
    """The learning rate of a step, counted from 0, of a training of `steps`: a linear rise, a plateau, then over the
    last `decay` of the budget down to floor * peak as 1 - sqrt (arXiv:2405.18392)."""
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    spent = step / steps
    fallen = 0.0 if spent <= 1 - decay else (spent - (1 - decay)) / decay
    return peak * rising * (floor + (1 - floor) * (1 - math.sqrt(fallen)))


def adamw(p, g, state, *, lr, beta1, beta2, eps, decay):
    """One update as in arXiv:1711.05101, algorithm 2, with lr times the decay as torch documents it."""
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = m = beta1 * state.get("m", torch.zeros_like(p)) + (1 - beta1) * g
    state["v"] = v = beta2 * state.get("v", torch.zeros_like(p)) + (1 - beta2) * g * g
    p -= lr * decay * p
    p -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)


def plain_step(model, batch, states, *, step, parts, clip, head_weight, lr, decay, **betas):
    """One step; the batch in `parts` equal parts, whose gradients add up. Gives the losses' means."""
    for module in model.modules():
        if hasattr(module, "before_step"):
            module.before_step(step)
    targets = model.targets(batch.ids_BT, batch.targets_BT, batch.doc_ids_BT)
    rows, stats, said = len(batch.ids_BT) // parts, {}, {}
    for part in range(parts):
        own = slice(part * rows, (part + 1) * rows)
        out = model(batch.ids_BT[own], targets={name: t[own] for name, t in targets.items()},
                    doc_ids_BT=batch.doc_ids_BT[own])
        loss = 0.0
        for name, mean in out.objectives.items():
            value = mean.total / (targets[name] != -100).sum()
            said[name] = said.get(name, 0.0) + value.item()
            loss = loss + value * (head_weight if name != "next_token" else 1.0)
        for path, value in out.report.losses.items():
            name = f"{path.rpartition('.')[2]}_loss"
            said[name] = said.get(name, 0.0) + value.item() / parts
            loss = loss + value / parts
        for path, mean in out.report.stats.items():
            total, count = stats.get(path, (0.0, 0.0))
            stats[path] = (total + mean.total, count + mean.count)
        loss.backward()
    named = dict(model.named_parameters())
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in named.values()))
    with torch.no_grad():
        for name, p in named.items():
            matrix = p.ndim >= 2 and not name.endswith(NOT_MATRICES)
            adamw(p, p.grad * min(1.0, clip / (norm + 1e-6)), states.setdefault(name, {}), lr=lr,
                  decay=decay if matrix else 0.0, **betas)
    from tryplicity.components import Mean

    of_module: dict = {}
    for path, mean in stats.items():
        module, _, name = path.rpartition(".")
        of_module.setdefault(module, {})[name] = Mean(*mean)
    with torch.no_grad():
        for path, own in of_module.items():
            model.get_submodule(path).after_step(step, own)
    model.zero_grad()
    return {"gradient_norm": norm, **said}


def steps_of(run):
    """The lines of a run's metrics that are of steps."""
    from tryplicity.training.metrics import read_lines

    return [line for line in read_lines(run.metrics) if "loss" in line]
