"""`check_layer` finds nothing wrong with our own layers and the example, and names each promise that a layer breaks."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from tryplicity import FeedForward, Mixer, Report, Site, State, load_plugins
from tryplicity.contract import check_layer

HERE = Path(__file__).parent / "plugins"
REGISTRY = load_plugins((str(HERE / "example_plugin.py"), str(HERE / "parallel_plugin.py"))).registry
D = 32
OPTIONS = {"mamba2": {"state_size": 8, "head_dim": 16, "chunk": 4}, "gqa": {"heads": 4, "kv_heads": 2, "qk_norm": True},
           "moe": {"experts": 4, "inner_size": 16}, "gated_mlp": {"inner_size": 16},
           "parallel": {"left": {"type": "mamba2", "head_dim": 16}, "right": {"type": "gqa", "heads": 4}}}
EXPERTS = {"dynamic_sparsity": {"max_experts": 3, "mean_experts": 2, "min_experts": 1}}
ROUTERS = [{"type": "moe", "experts": 4, "inner_size": 16, "router": {"type": name, **EXPERTS.get(name, {})}}
           for name in REGISTRY.names("router")]


def site(linear="linear"):
    return Site(hidden_size=D, vocab_size=300, context_length=64, layers=2, linear_part=REGISTRY.part("linear", linear),
                norm_part=REGISTRY.part("norm", "rmsnorm"))


@pytest.mark.parametrize("family, value", [
    *((family, {"type": name, **OPTIONS.get(name, {})})
      for family in ("mixer", "feed_forward") for name in REGISTRY.names(family)),
    *(("feed_forward", value) for value in ROUTERS),
], ids=lambda value: value if isinstance(value, str) else value.get("router", value)["type"])
def test_every_layer_keeps_every_promise(family, value):
    part = REGISTRY.part(family, value, site())
    assert check_layer(lambda: part.build(site()), D) == []


class Kept(Mixer):
    """Each token sees the mean of its document so far; every promise kept. Below, each breaks one."""

    name = "kept"

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self):
        super().__init__()
        self.weight_D = nn.Parameter(torch.empty(D))

    def reset_parameters(self):
        nn.init.ones_(self.weight_D)

    def new_state(self, batch, *, device=None, dtype=None):
        return State(sum=torch.zeros(batch, D, device=device, dtype=torch.float32),
                     doc=torch.full((batch,), -1, device=device))

    def first_doc(self, state, doc_ids):
        return doc_ids[:, :1] if state is None else state["doc"][:, None]

    def write(self, state, sum_BD, doc_ids):
        state["sum"].copy_(sum_BD.detach())
        if doc_ids is not None:
            state["doc"].copy_(doc_ids[:, -1])

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        sum_BD = torch.zeros_like(x_BTD[:, 0], dtype=torch.float32) if state is None else state["sum"]
        same_BT = None
        if doc_ids is not None:
            same_BT = doc_ids == torch.cat([self.first_doc(state, doc_ids), doc_ids[:, :-1]], 1)
        sums = []
        for t in range(x_BTD.shape[1]):
            if same_BT is not None:
                sum_BD = sum_BD.masked_fill(~same_BT[:, t, None], 0)
            sum_BD = 0.5 * sum_BD + x_BTD[:, t]
            sums.append(sum_BD)
        if state is not None:
            self.write(state, sum_BD, doc_ids)
        return (torch.stack(sums, 1) * self.weight_D).to(x_BTD.dtype)


class Uninitialised(Kept):
    def reset_parameters(self):
        pass


class Wider(Kept):
    def forward(self, x_BTD, **given):
        return super().forward(x_BTD, **given).repeat(1, 1, 2)


class ForgetsTheEdge(Kept):
    """As the example once was: it forgets which document the last chunk ended in."""

    def first_doc(self, state, doc_ids):
        return doc_ids[:, :1]


class StartsAnewWithoutIds(Kept):
    def forward(self, x_BTD, *, state=None, doc_ids=None):
        if state is not None and doc_ids is None and (state["doc"] >= 0).any():
            state["sum"].zero_()
        return super().forward(x_BTD, state=state, doc_ids=doc_ids)


class ForgetsItsState(Kept):
    def write(self, state, sum_BD, doc_ids):
        pass


class LooksAhead(Kept):
    def forward(self, x_BTD, **given):
        return super().forward(x_BTD, **given) + x_BTD.mean(1, keepdim=True)


class MixesRows(Kept):
    def forward(self, x_BTD, **given):
        return super().forward(x_BTD, **given) + x_BTD.mean(0, keepdim=True)


class WrongInRows(Kept):
    takes_rows = True

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        return super().forward(x_BTD, state=state[0] if isinstance(state, tuple) else state, doc_ids=doc_ids)


class IgnoresDocuments(Kept):
    def forward(self, x_BTD, *, state=None, doc_ids=None):
        return super().forward(x_BTD, state=state)


class KeepsAView(Kept):
    """The state is a piece of what the model computes in."""

    def new_state(self, batch, **given):
        return State(super().new_state(batch, **given), last=torch.zeros(batch, D))

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        y_BTD = super().forward(x_BTD, state=state, doc_ids=doc_ids)
        if state is None or doc_ids is not None:
            return y_BTD
        y_BTD = y_BTD + 0 * state["last"][:, None]
        state["last"] = x_BTD[:, -1]
        return y_BTD


class SharesItsState(Kept):
    class Kind(State):
        def clone(self):
            return self

    def new_state(self, batch, **given):
        return self.Kind(super().new_state(batch, **given))


class NoState(Kept):
    def new_state(self, batch, **given):
        return dict(super().new_state(batch, **given))


class LeavesOneOut(Kept):
    def __init__(self):
        super().__init__()
        self.unused_D = nn.Parameter(torch.empty(D))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.ones_(self.unused_D)


class Counts(FeedForward):
    """What it computes depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.weight_D, self.calls = nn.Parameter(torch.empty(D)), 0

    def reset_parameters(self):
        nn.init.ones_(self.weight_D)

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        self.calls += self.training
        return x_BTD * self.weight_D * (1 + self.calls), Report()


class Reads(Kept):
    def forward(self, x_BTD, **given):
        return super().forward(x_BTD, **given) * (2.0 if float(x_BTD.detach().abs().max()) > -1 else 1.0)


class OnlyFp32(Kept):
    def forward(self, x_BTD, **given):
        return super().forward(x_BTD, **given) + x_BTD @ torch.zeros(D, D)


@pytest.mark.parametrize("layer, promise", [
    (Uninitialised, "Everything is initialised in reset_parameters: weight_D"), (Wider, "[B, T, D] becomes [B, T, D]"),
    (ForgetsTheEdge, "One forward"), (ForgetsTheEdge, "Tokens with different ids"),
    (StartsAnewWithoutIds, "One forward for any length"), (ForgetsItsState, "One forward"), (LooksAhead, "One forward"),
    (MixesRows, "A row is as if alone"), (WrongInRows, "A row is as if alone"), (IgnoresDocuments, "Tokens with"),
    (KeepsAView, "A state is a State of its own"), (SharesItsState, "A state is a State of its own"),
    (NoState, "A state is a State of its own"), (LeavesOneOut, "Every parameter gets a finite gradient"),
    (Counts, "Every parameter gets a finite gradient, the same"), (Reads, "Nothing is read from the device"),
    (OnlyFp32, "It runs in bf16"),
])
def test_a_broken_promise_is_named(layer, promise):
    found = check_layer(layer, D)
    assert any(line.startswith(promise) for line in found), found


def test_a_layer_that_keeps_them_all_is_said_to():
    assert check_layer(Kept, D) == []
