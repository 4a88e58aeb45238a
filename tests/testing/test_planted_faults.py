"""A layer with a planted fault of each kind is caught by the conformance kit, with the line that says what is wrong."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tryplicity import Document, FeedForward, Mixer, Report, Source, State
from tryplicity.testing import check, check_layer, findings
from tryplicity_plugins.sources.huggingface import HuggingFace

D = 32


class Kept(Mixer):
    """Each token sees the mean of its document so far; every promise kept. Below, each breaks one."""

    name = "kept"

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config=None, site=None):
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
    def __init__(self, *given):
        super().__init__(*given)
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


class OwnWay(State):
    """Its copy has the same inner state."""

    def clone(self):
        return OwnWay({name: value.clone() if isinstance(value, torch.Tensor) else value
                       for name, value in self.items()})


class SharesNestedState(Kept):
    def new_state(self, batch, **given):
        return OwnWay(inner=super().new_state(batch, **given))

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        return super().forward(x_BTD, state=None if state is None else state["inner"], doc_ids=doc_ids)


class ForgetsABuffer(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.register_buffer("decay_D", torch.full((D,), 0.5))
        self.register_buffer("order_D", torch.arange(D))

    def forward(self, x_BTD, **given):
        return super().forward(x_BTD, **given) * self.decay_D[self.order_D]


class ForgetsANumberedBuffer(ForgetsABuffer):
    def reset_parameters(self):
        super().reset_parameters()
        nn.init.constant_(self.decay_D, 0.5)


class LearnsInFp32Alone(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.gain_D = nn.Parameter(torch.empty(D))

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.ones_(self.gain_D)

    def forward(self, x_BTD, **given):
        gain_D = self.gain_D if x_BTD.dtype == torch.float32 else self.gain_D.detach()
        return super().forward(x_BTD * gain_D, **given)


class DrawsAtMeta(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.signs = (torch.rand(D) - 0.5).sign()


class DrawsOnTheHost(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.sign = 1.0 if torch.randn(1, device="cpu").item() > 0 else 0.5


class TakesMemory(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.register_buffer("table_D", torch.zeros(D, device="cpu"))


class DrawsWhenInitialised(Kept):
    """As it should be: torch's own modules draw when they are made, and again in reset_parameters."""

    def __init__(self, *given):
        super().__init__(*given)
        self.inner = nn.Linear(D, D)

    def forward(self, x_BTD, **given):
        return super().forward(self.inner(x_BTD), **given)


class CopiesToTheHost(Kept):
    def forward(self, x_BTD, **given):
        x_BTD.detach().cpu()
        return super().forward(x_BTD, **given)


class KeepsATensor(Kept):
    def forward(self, x_BTD, **given):
        self.last_loss = x_BTD.square().mean()
        return super().forward(x_BTD, **given)


class ListsTensors(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.losses = []

    def forward(self, x_BTD, **given):
        self.losses.append(x_BTD.square().mean())
        return super().forward(x_BTD, **given)


class ChangesABuffer(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.register_buffer("seen", torch.zeros(()))

    def reset_parameters(self):
        super().reset_parameters()
        self.seen.zero_()

    def forward(self, x_BTD, **given):
        self.seen += 1
        return super().forward(x_BTD, **given)


class CompilesEachStep(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.calls = 0

    def forward(self, x_BTD, **given):
        self.calls += 1
        return super().forward(x_BTD, **given) + 0.0 * self.calls


class BreaksTheGraph(Kept):
    def forward(self, x_BTD, **given):
        torch._dynamo.graph_break()
        return super().forward(x_BTD, **given)


class ForgetsOnResume(Kept):
    def __init__(self, *given):
        super().__init__(*given)
        self.register_buffer("random_D", torch.empty(D), persistent=False)

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.normal_(self.random_D)

    def forward(self, x_BTD, **given):
        return super().forward(x_BTD, **given) * self.random_D


class Counting(Kept):
    """Parameters are there that nobody sees when the model is counted."""

    def reset_parameters(self):
        super().reset_parameters()
        if not self.weight_D.is_meta:
            self.late = nn.Parameter(torch.ones(3))


#: the fault, what its line begins with, and what else stands in it
FAULTS = [
    (Uninitialised, "Everything is initialised in reset_parameters", "weight_D is left as it was"),
    (ForgetsABuffer, "Everything is initialised in reset_parameters", "decay_D is left as it was"),
    (ForgetsANumberedBuffer, "Everything is initialised in reset_parameters", "order_D is left as it was"),
    (Wider, "[B, T, D] becomes [B, T, D]", "[2, 9, 64]"),
    (LooksAhead, "No token sees a later one", "it leaks the future"),
    (ForgetsTheEdge, "Tokens with different ids never reach one another across the edge of two chunks", "in chunks of"),
    (ForgetsTheEdge, "One forward for any length", "in chunks of"),
    (StartsAnewWithoutIds, "One forward for any length", "does not go on with the last document"),
    (ForgetsItsState, "One forward for any length", "in chunks of"),
    (MixesRows, "A row is as if alone", "without documents"), (WrongInRows, "A row is as if alone", "RuntimeError"),
    (IgnoresDocuments, "Tokens with different ids never reach one another: in one chunk", "changes when others change"),
    (KeepsAView, "A state is a State of its own", ""), (SharesItsState, "A state is a State of its own", "clone"),
    (SharesNestedState, "A state is a State of its own", "clone"), (NoState, "A state is a State of its own", "dict"),
    (LeavesOneOut, "Every parameter gets a finite gradient", "unused_D gets none"),
    (Counts, "Every parameter gets a finite gradient, the same", "with activation checkpointing"),
    (Reads, "Nothing is read from the device", "reads it"),
    (CopiesToTheHost, "Nothing is read from the device", "Tensor.cpu reads it"),
    (OnlyFp32, "It runs in bf16", "in bf16: expected m1 and m2 to have the same dtype"),
    (LearnsInFp32Alone, "It runs in bf16", "the gradient of gain_D is missing in bf16"),
    (DrawsAtMeta, "Its constructor draws no random numbers", "rand"),
    (DrawsOnTheHost, "Its constructor draws no random numbers", "randn"),
    (TakesMemory, "Its constructor draws no random numbers and takes no memory", "table_D lies on cpu"),
    (KeepsATensor, "A forward pass keeps nothing", "keeps a tensor [] on itself, as last_loss"),
    (ListsTensors, "A forward pass keeps nothing", "as losses"),
    (ChangesABuffer, "A forward pass keeps nothing", "changes the buffer seen"),
    (ForgetsOnResume, "What a checkpoint holds of it is all", "persistent=False"),
]


@pytest.mark.parametrize(("layer", "promise", "said"), FAULTS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_planted_fault_is_named(layer, promise, said):
    lines = [line for line in check_layer(layer, D) if line.startswith(promise)]
    assert lines and any(said in line for line in lines), check_layer(layer, D)
    assert all("(docs/plugins.md#" in line for line in lines)


@pytest.mark.parametrize(("layer", "promise", "said"), [
    (CompilesEachStep, "torch's compiler takes it whole, and once for a shape", "compiled again at each step"),
    (BreaksTheGraph, "torch's compiler takes it whole, and once for a shape", "cannot be taken whole"),
    (Counting, "`build` can plan it", "are there"),
], ids=lambda one: getattr(one, "__name__", ""))
def test_so_is_one_that_shows_in_a_spec_alone(layer, promise, said):
    lines = check(layer, {})
    assert any(line.startswith(promise) and said in line for line in lines), lines


@pytest.mark.parametrize("layer", [Kept, DrawsWhenInitialised])
def test_a_layer_that_keeps_them_all_is_said_to(layer):
    assert check_layer(layer, D) == []


class FromFarAway(Source):
    name = "far"

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config):
        pass

    def fingerprint(self):
        return "far"

    def documents(self):
        from urllib.request import urlopen

        for line in urlopen("http://documents.example/all.txt"):
            yield Document(line.decode(), line.decode(), "text", "")


class OnTheHub(HuggingFace):
    """`datasets` asks twenty times, five seconds apart, where the network is down."""

    name = "hub"
    trials = ({"dataset": "nobody/nothing"},)


@pytest.mark.parametrize("source", [FromFarAway, OnTheHub])
def test_it_is_asked_without_a_network(source):
    import socket

    before = socket.getaddrinfo, socket.socket.connect
    (finding,) = [one for one in findings(source) if one.promise.what.startswith("It gives the same documents")]
    assert finding.verdict == "not asked" and "the kit asks without a network" in finding.why
    assert (socket.getaddrinfo, socket.socket.connect) == before


def test_the_old_name_says_where_it_went():
    from tryplicity.contract import check_layer as old

    with pytest.warns(DeprecationWarning, match=r"is tryplicity\.testing\.check_layer"):
        assert old(Uninitialised, D)[0].startswith("Everything is initialised")
