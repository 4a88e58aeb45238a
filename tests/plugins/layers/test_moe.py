"""The mixture of experts against a loop over tokens, and what must not depend on how a batch is laid out."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tryplicity import Activation, Linear, Part, Report, Routing, Site
from tryplicity_plugins.brain.dynamic_sparsity import DynamicSparsityRouter
from tryplicity_plugins.brain.lateral_inhibition import LateralInhibition, LateralInhibitionRouter
from tryplicity_plugins.brain.spike import Spike
from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.moe import MixtureOfExperts
from tryplicity_plugins.layers.router import BalancedRouter, TopKRouter
from tryplicity_plugins.layers.slots import lay_out

HIDDEN = 32
SITE = Site(hidden_size=HIDDEN, vocab_size=64, context_length=64, layers=4, linear_part=Part(Linear, None))


class Silu(Activation):
    name = "test_silu"

    def __init__(self, config, features, groups=None):
        super().__init__()

    def forward(self, x, group=None):
        return F.silu(x)


ROUTERS = {
    "top_k": Part(TopKRouter, TopKRouter.Config()),
    "top_k_softmax": Part(TopKRouter, TopKRouter.Config(score="softmax", z_loss=0.01)),
    "top_k_raw": Part(TopKRouter, TopKRouter.Config(normalize=False)),
    "groups": Part(TopKRouter, TopKRouter.Config(groups=3, groups_kept=2, scale=2.5)),
    "dynamic_sparsity": Part(DynamicSparsityRouter, DynamicSparsityRouter.Config(
        min_experts=1, max_experts=5, mean_experts=3)),
    "lateral_inhibition": Part(LateralInhibitionRouter, LateralInhibitionRouter.Config(strength=0.5)),
    "both": Part(DynamicSparsityRouter, DynamicSparsityRouter.Config(
        min_experts=1, max_experts=5, mean_experts=3,
        inhibition=Part(LateralInhibition, LateralInhibition.Config(strength=0.5)))),
}
INHIBITED = ("lateral_inhibition", "both")
ACTIVATIONS = {"silu": Part(Silu, None), "spike": Part(Spike, Spike.Config(threshold=0.02))}
every_router = pytest.mark.parametrize("router", ROUTERS)


def make(router="top_k", activation="silu", experts=6, top_k=2, inner=16, shared=2, site=SITE, seed=0):
    config = MixtureOfExperts.Config(experts=experts, top_k=top_k, inner_size=inner, shared_experts=shared,
                                     shared_inner_size=24, activation=ACTIVATIONS[activation],
                                     router=ROUTERS[router])
    with torch.device("meta"):
        moe = MixtureOfExperts(config, site)
    moe.to_empty(device="cpu")
    torch.manual_seed(seed)
    for value in (*moe.parameters(), *moe.buffers()):
        value.data.fill_(torch.nan)
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(value.isfinite().all() for value in (*moe.parameters(), *moe.buffers()))
    with torch.no_grad():  # large enough that choices and mistakes show
        for name, value in moe.named_parameters():
            if "threshold" not in name:
                value.copy_(torch.randn_like(value) * (1.0 if "router" in name else 0.2))
        if router in INHIBITED:
            moe.router.inhibition.similarity_EE.copy_(torch.rand(experts, experts))
    return moe


def activate(moe, gate_F, expert=None):
    if isinstance(moe.activation, Spike):
        spike = moe.shared_activation if expert is None else moe.activation
        threshold = spike.threshold + spike.offset
        return Plain.apply(gate_F, threshold if expert is None else threshold[expert])
    return F.silu(gate_F)


class Plain(torch.autograd.Function):
    """The spike, one vector at a time, from its definition."""

    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        return grad * (x > threshold), -x * grad / 0.1 * ((x - threshold).abs() < 0.05)


def token_by_token(moe, x_BTD, routing: Routing):
    """Every token alone, every chosen expert a plain MLP."""
    outputs = []
    for n, x_D in enumerate(x_BTD.flatten(0, 1)):
        gate, up = (moe.shared_gate_up.weight @ x_D).chunk(2)
        y_D = moe.shared_down.weight @ (activate(moe, gate) * up)
        for k, expert in enumerate(routing.experts_NK[n].tolist()):
            if expert < moe.config.experts:
                gate, up = (moe.gate_up.weight[expert] @ x_D).chunk(2)
                h = activate(moe, gate, expert) * up
                y_D = y_D + routing.weights_NK[n, k] * (moe.down.weight[expert] @ h)
        outputs.append(y_D)
    return torch.stack(outputs).view_as(x_BTD)


@contextmanager
def poisoned_heap():
    """Memory that is handed out uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_router
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_every_token_alone(router, activation):
    moe = make(router, activation)
    x = torch.randn(2, 9, HIDDEN, requires_grad=True)
    weigh = torch.randn(2, 9, HIDDEN)
    wanted_inputs = [x, *moe.parameters()]
    routing = moe.router(x)
    if router == "dynamic_sparsity":
        unused = (routing.experts_NK == moe.config.experts).sum()
        assert 0 < unused < routing.experts_NK.numel()
    wanted = token_by_token(moe, x, routing)
    wanted_grads = torch.autograd.grad((wanted * weigh).sum(), wanted_inputs)
    with poisoned_heap():
        got, _ = moe(x)
        grads = torch.autograd.grad((got * weigh).sum(), wanted_inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for name, a, b in zip(["x", *dict(moe.named_parameters())], grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_heap_is_really_poisoned():
    with poisoned_heap():
        assert torch.empty(64).isnan().all()


@every_router
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_equals_the_whole_sequence(router, activation, batch):
    moe = make(router, activation).eval()
    x = torch.randn(batch, 7, HIDDEN)
    with torch.no_grad():
        whole, _ = moe(x)
        steps = [moe(x[:, t:t + 1]) for t in range(7)]
    assert all(isinstance(step, torch.Tensor) for step in steps)  # the decoding path reports nothing
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)


def test_decoding_reads_the_chosen_experts_alone():
    moe = make(shared=0).eval()
    x = torch.randn(1, 1, HIDDEN)
    with torch.no_grad():
        chosen = moe.router(x).experts_NK[0]
        others = [e for e in range(6) if e not in chosen.tolist()]
        before = moe(x)
        for linear in (moe.gate_up, moe.down):
            linear.weight[others] = torch.nan
        assert torch.equal(moe(x), before)


def test_without_shared_experts_only_the_routed_ones_speak():
    moe = make(shared=0)
    x = torch.randn(1, 5, HIDDEN)
    with torch.no_grad():
        moe.down.weight.zero_()
    assert torch.equal(moe(x)[0], torch.zeros(1, 5, HIDDEN))
    assert not any("shared" in name for name, _ in moe.named_parameters())


@pytest.mark.parametrize("tokens, slots, experts", [(1, 1, 1), (5, 3, 4), (64, 2, 8), (40, 4, 64)])
def test_the_layout_places_every_used_slot_once(tokens, slots, experts):
    generator = torch.Generator().manual_seed(tokens)
    choice = torch.stack([torch.randperm(max(experts, slots), generator=generator)[:slots] % experts
                          for _ in range(tokens)])
    used = torch.arange(slots) < torch.randint(1, slots + 1, (tokens, 1), generator=generator)
    choice[~used] = experts
    layout = lay_out(choice, experts)
    ends = layout.offsets_E.tolist()
    assert all(end % 8 == 0 for end in ends) and ends[-1] <= len(layout.token_S)
    assert len(set(layout.slot_NK[used].tolist())) == int(used.sum())  # nothing dropped, nothing shared
    for n in range(tokens):
        for k in range(slots):
            row = layout.slot_NK[n, k].item()
            assert layout.token_S[row] == n
            if used[n, k]:
                expert = choice[n, k].item()
                assert ([0, *ends][expert]) <= row < ends[expert] and layout.expert_S[row] == expert
    assert int((layout.expert_S < experts).sum()) == int(used.sum())


@every_router
@pytest.mark.parametrize("activation, linear", [("silu", Linear), ("spike", BitLinear)])
@pytest.mark.parametrize("tokens", [13, 701])
@pytest.mark.parametrize("threads", [1, 2])
def test_other_tokens_change_nothing_bit_for_bit(router, activation, linear, tokens, threads):
    """With other neighbours a token lies in other rows of groups of other sizes."""
    site = replace(SITE, hidden_size=64, linear_part=Part(linear, None))
    moe = make(router, activation, inner=40, site=site)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(4):
            torch.manual_seed(seed)
            kept = 1 + seed * tokens // 4
            x = torch.randn(1, tokens, 64)
            other = torch.cat([x[:, :kept], torch.randn(1, tokens - kept, 64) * 3 + 1], 1)
            with torch.no_grad():
                assert torch.equal(moe(x)[0][:, :kept], moe(other)[0][:, :kept])
    finally:
        torch.set_num_threads(before)


def totals(stats):
    return {name: (stat.total, torch.as_tensor(stat.count)) for name, stat in stats.items()}


def add(reports):
    losses, stats = {}, {}
    for report in reports:
        for name, loss in report.losses.items():
            losses[name] = losses.get(name, 0) + loss.detach() / len(reports)
        for name, stat in report.stats.items():
            stats[name] = stats[name] + stat if name in stats else stat
    return losses, stats


@every_router
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_balances_as_the_whole(router, parts):
    moe = make(router, "spike")
    x = torch.randn(4, 16, HIDDEN)
    whole_losses, whole_stats = add([moe(x)[1]])
    part_losses, part_stats = add([moe(part)[1] for part in x.chunk(parts)])
    assert "router.balance" in whole_losses and whole_losses.keys() == part_losses.keys()
    for name, loss in whole_losses.items():
        torch.testing.assert_close(part_losses[name], loss, rtol=1e-6, atol=1e-9)
    assert whole_stats.keys() == part_stats.keys()
    before = {name: value.clone() for name, value in moe.named_buffers()}
    after = []
    for stats in (whole_stats, part_stats):
        for name, value in moe.named_buffers():
            value.copy_(before[name])
        for name in ("router", "activation", "shared_activation"):
            own = {key.removeprefix(f"{name}."): stat for key, stat in stats.items()
                   if key.startswith(f"{name}.")}
            moe.get_submodule(name).after_step(1, own)
        after.append({name: value.clone() for name, value in moe.named_buffers()})
    assert not torch.equal(after[0]["router.bias"], before["router.bias"])
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@every_router
def test_checkpointing_changes_no_loss_statistic_or_gradient(router):
    moe = make(router, "spike")
    moe.before_step(0)
    x = torch.randn(2, 16, HIDDEN, requires_grad=True)
    plain, plain_report = moe(x)
    recomputed, report = checkpoint(moe, x, use_reentrant=False)
    assert torch.equal(plain, recomputed)
    assert totals(plain_report.stats).keys() == totals(report.stats).keys()
    for name, (total, count) in totals(plain_report.stats).items():
        assert torch.equal(total, totals(report.stats)[name][0]), name
        assert torch.equal(count, totals(report.stats)[name][1]), name
    wanted = torch.autograd.grad(plain.square().sum() + sum(plain_report.losses.values()), moe.parameters())
    got = torch.autograd.grad(recomputed.square().sum() + sum(report.losses.values()), moe.parameters())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@every_router
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_under_autocast_close_to_fp32(router, activation):
    moe = make(router, activation)
    x = torch.randn(2, 16, HIDDEN)
    full, _ = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, report = moe(x)
    assert half.dtype == torch.bfloat16
    assert all(stat.total.dtype == torch.float32 for stat in report.stats.values())
    (half.float().sum() + sum(report.losses.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
    assert F.cosine_similarity(half.float().flatten(), full.flatten(), dim=0) > 0.99


def test_a_model_in_bf16_keeps_its_dtypes_through_a_step():
    for router in ROUTERS:
        moe = make(router, "spike").to(torch.bfloat16)
        y, report = moe(torch.randn(2, 16, HIDDEN, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        (y.float().sum() + sum(report.losses.values())).backward()
        for name in ("router", "activation", "shared_activation"):
            own = {key.removeprefix(f"{name}."): stat for key, stat in report.stats.items()
                   if key.startswith(f"{name}.")}
            moe.get_submodule(name).after_step(1, own)
        assert all(b.dtype == torch.bfloat16 and b.isfinite().all() for b in moe.buffers())


def test_dead_experts_load_and_entropy_are_told():
    moe = make(experts=6, top_k=2)
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([9.0, 8.0, 0, 0, 0, 0]))
    _, report = moe(torch.randn(2, 10, HIDDEN))
    own = {name.removeprefix("router."): stat for name, stat in report.stats.items()}
    assert own["load"].total.tolist() == [20, 20, 0, 0, 0, 0]
    metrics = moe.router.metrics(own)
    assert metrics["dead_experts"] == 4 and metrics["load_max_over_mean"] == pytest.approx(3)
    assert metrics["experts_per_token"] == 2
    assert metrics["load_entropy"] == pytest.approx(math.log(2) / math.log(6))
    assert metrics["load"] == [0.5, 0.5, 0, 0, 0, 0]


def test_a_router_of_someone_else_with_unused_slots():
    class First(BalancedRouter):
        """Expert 0 for every token, expert 1 for every other one."""
        name = "first"

        def forward(self, x_BTD):
            tokens = x_BTD.shape[0] * x_BTD.shape[1]
            experts = torch.tensor([[0, 6], [0, 1]]).repeat(tokens, 1)[:tokens]
            weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).repeat(tokens, 1)[:tokens]
            return Routing(experts, weights, Report())

    moe = make()
    moe.router = First(BalancedRouter.Config(), SITE, 6, 2)
    x = torch.randn(1, 7, HIDDEN)
    with poisoned_heap():
        got, _ = moe(x)
    torch.testing.assert_close(got, token_by_token(moe, x, moe.router(x)), rtol=1e-4, atol=1e-5)


def test_impossible_options_are_told_with_the_nearest_legal_value():
    config = MixtureOfExperts.Config(experts=4, top_k=6, router=ROUTERS["dynamic_sparsity"])
    said = dict(MixtureOfExperts.check(config, SITE))
    assert "at most 4" in said["top_k"] and "at most 4" in said["router.max_experts"]
    fine = MixtureOfExperts.Config(experts=8, top_k=2, router=ROUTERS["top_k"])
    assert not list(MixtureOfExperts.check(fine, SITE))


def test_parameters_at_work_on_one_token():
    moe = make("dynamic_sparsity", "spike")
    assert moe.gate_up.active_fraction == moe.down.active_fraction == moe.activation.active_fraction == 0.5
    assert moe.shared_gate_up.active_fraction == 1


@every_router
@pytest.mark.parametrize("activation, linear", [("silu", Linear), ("spike", BitLinear)])
def test_the_unused_are_drawn_anew_and_take_after_the_busiest(router, activation, linear):
    moe = make(router, activation, site=replace(SITE, linear_part=Part(linear, None)))
    with torch.no_grad():
        moe.router.use_E.copy_(torch.tensor([1.0, 0.02, 2.5, 0.05, 1.9, 0.11]))
        moe.router.bias.copy_(torch.arange(6.0))
        if activation == "spike":
            moe.activation.threshold.add_(0.5)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    state = torch.get_rng_state()
    repair = moe.consolidate(0.1, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert repair.stats == {"least_use": pytest.approx(0.02), "revived_experts": 2}
    after, dead, alive = moe.state_dict(), [1, 3], [0, 2, 4, 5]
    for name, _ in moe.named_parameters():
        own = name in repair.reset
        assert own == (name in ("gate_up.weight", "down.weight", "activation.threshold", "router.weight")), name
        if own:
            assert repair.reset[name].tolist() == [False, True, False, True, False, False]
            assert torch.equal(after[name][alive], before[name][alive])
            assert not torch.equal(after[name][dead], before[name][dead])
        else:
            assert torch.equal(after[name], before[name]), name
    for linear in (moe.gate_up, moe.down):
        assert linear.weight[dead].std().item() == pytest.approx(linear.init_std, rel=0.1)
    # of the two dead, 3 was used more and takes after the busiest, 2; then 1 after 4
    assert torch.equal(moe.router.bias, torch.tensor([0.0, 4, 2, 2, 4, 5]))
    cosine = F.cosine_similarity(moe.router.weight[[3, 1]], moe.router.weight[[2, 4]], dim=-1)
    assert ((cosine > 0.97) & (cosine < 1)).all()
    assert moe.router.use_E[dead].tolist() == [1, 1]
    if router in INHIBITED:
        similarity_EE = moe.router.inhibition.similarity_EE
        assert not similarity_EE[dead].any() and not similarity_EE[:, dead].any()
    assert moe(torch.randn(1, 9, HIDDEN))[0].isfinite().all()
    assert not moe.consolidate(0.1, torch.Generator()).reset  # not pruned again at once


def test_where_all_are_unused_or_nobody_counts_nothing_is_drawn():
    moe = make()
    weight = moe.gate_up.weight.clone()
    moe.router.use_E.zero_()
    assert moe.consolidate(0.1, torch.Generator()).stats["revived_experts"] == 0
    del moe.router.use_E  # a stranger's router need not count
    assert moe.consolidate(0.1, torch.Generator()) is None
    assert torch.equal(moe.gate_up.weight, weight)
