"""Sleep on a real model: what it repairs, replays and averages, and what it puts back."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tryplicity import Night, Parallelism, Part, Site
from tryplicity_plugins.brain.lateral_inhibition import LateralInhibitionRouter
from tryplicity_plugins.brain.sleep_consolidation import Reservoir, SleepConsolidation
from tryplicity_plugins.brain.spike import Spike
from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.moe import MixtureOfExperts
from tryplicity_plugins.optimization.adamw import AdamW

VOCAB, HIDDEN = 12, 16


class Tiny(torch.nn.Module):
    """embed -> mixture of experts -> logits: all that a night needs of a model."""

    def __init__(self):
        super().__init__()
        site = Site(hidden_size=HIDDEN, vocab_size=VOCAB, context_length=32, layers=2,
                    linear_part=Part(BitLinear, BitLinear.Config()))
        router = Part(LateralInhibitionRouter, LateralInhibitionRouter.Config(refresh_steps=2))
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.moe = MixtureOfExperts(MixtureOfExperts.Config(
            experts=4, top_k=2, inner_size=8, activation=Part(Spike, Spike.Config()), router=router), site)

    def forward(self, ids_BT):
        y_BTD, report = self.moe(self.embedding(ids_BT))
        return F.linear(self.embedding(ids_BT) + y_BTD, self.embedding.weight), report


class Life:
    """A model on documents, each a random cycle of tokens, with an optimizer and a night of real functions."""

    def __init__(self, tmp_path, seed=0, documents=40):
        torch.manual_seed(seed)
        self.model = Tiny()
        for module in self.model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        torch.nn.init.normal_(self.model.embedding.weight, std=0.5)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        undecayed = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = AdamW(AdamW.Config(learning_rate=0.01)).build(decayed, undecayed)
        generator = torch.Generator().manual_seed(1)
        orders = torch.stack([torch.randperm(VOCAB, generator=generator) for _ in range(3)])
        self.documents = orders[torch.randint(0, 3, (documents,), generator=generator)].repeat(1, 2)
        self.steps, self.tmp_path, self.checkpoints, self.replayed = 0, tmp_path, [], []
        self.stop = False

    def loss(self, ids_BT):
        logits, report = self.model(ids_BT)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()), report

    def step(self, documents=None, factor=1.0):
        router = self.model.moe.router
        router.before_step(self.steps)
        if documents is None:
            documents = torch.arange(8) + 8 * (self.steps % 5)
        loss, report = self.loss(self.documents[documents])
        (loss + sum(report.losses.values())).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        for path in ("router", "activation", "shared_activation"):
            own = {name.removeprefix(f"{path}."): stat for name, stat in report.stats.items()
                   if name.startswith(f"{path}.")}
            getattr(self.model.moe, path).after_step(self.steps, own)
        self.steps += 1
        return loss.item(), report.stats["router.load"].total

    def replay(self, documents, steps, factor):
        chosen = torch.from_numpy(documents)
        loss = sum(self.step(chosen, factor)[0] for _ in range(steps)) / steps
        self.replayed.append((documents, steps, factor, loss))
        return loss

    @torch.no_grad()
    def score(self):
        self.model.eval()
        loss, _ = self.loss(self.documents)
        self.model.train()
        return loss.item() / math.log(2)

    def checkpoint(self, change=None):
        folder = self.tmp_path / f"step-{len(self.checkpoints)}"
        folder.mkdir()
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state[name] = change(parameter.detach()).clone() if change else state[name]
        save_file(state, folder / "model.safetensors")
        self.checkpoints.append(folder)

    def night(self, **changes):
        return Night(**({"model": self.model, "optimizer": self.optimizer, "strategy": Parallelism(),
                         "step": self.steps, "seed": 3,
                         "checkpoints": self.checkpoints, "score": self.score, "replay": self.replay,
                         "interrupted": lambda: self.stop} | changes))


def make(**options):
    return SleepConsolidation(SleepConsolidation.Config(**options))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- the reservoir ---

def fill(reservoir, documents=2000, per_step=20, seed=5, losses=None):
    random = np.random.default_rng(0)
    losses = 3 + random.standard_normal(documents) if losses is None else losses
    for start in range(0, documents, per_step):
        numbers = np.arange(start, start + per_step)
        reservoir.observe(numbers, losses[numbers], seed)
    return losses


def test_the_reservoir_is_bounded_and_prefers_high_losses():
    reservoir = Reservoir(100)
    losses = fill(reservoir)
    held = reservoir.documents()
    assert len(held) == len(set(held.tolist())) == 100
    assert losses[held].mean() > losses.mean() + 1
    assert reservoir.mean_loss() == pytest.approx(losses[held].mean())


def test_equal_losses_are_sampled_evenly_over_time():
    counts = np.zeros(10)
    for seed in range(40):
        reservoir = Reservoir(50)
        fill(reservoir, documents=1000, seed=seed, losses=np.full(1000, 2.0))
        counts += np.bincount(reservoir.documents() // 100, minlength=10)
    # 2000 draws over 10 tenths: 200 each, by chance within 14 or so
    assert counts.sum() == 2000 and (abs(counts - 200) < 60).all()


def test_the_odds_are_those_of_the_weights():
    """Of two documents, a reservoir of one keeps each in proportion to its weight (Efraimidis and Spirakis)."""
    wins = 0
    for seed in range(4000):
        reservoir = Reservoir(1)
        reservoir.observe(np.array([7, 9]), np.array([2.0, 2.5]), seed)
        wins += int(reservoir.documents()[0] == 9)
    odds = math.exp(2 * 0.5)  # half a nat
    assert wins / 4000 == pytest.approx(odds / (1 + odds), abs=0.03)


def test_the_losses_of_a_young_model_do_not_stay_for_ever():
    reservoir = Reservoir(100)
    losses = np.linspace(9, 2, 2000) + 0.3 * np.random.default_rng(0).standard_normal(2000)
    fill(reservoir, losses=losses)
    assert (reservoir.documents() >= 1000).sum() > 25  # a sample of raw losses would hold none of these


def test_a_document_seen_again_has_its_latest_loss():
    reservoir = Reservoir(3)
    reservoir.observe(np.array([1, 2]), np.array([4.0, 4.0]), 0)
    reservoir.observe(np.array([1, 1]), np.array([1.0, 2.0]), 0)
    assert len(reservoir.held) == 2
    assert reservoir.held[1][1] == 1.5 and reservoir.held[2][1] == 4.0
    key = reservoir.held[1][0]
    reservoir.observe(np.array([1]), np.array([9.0]), 0)
    assert key < reservoir.held[1][0] < 0
    reservoir.observe(np.array([5]), np.array([math.nan]), 0)
    assert 5 not in reservoir.held


def test_the_reservoir_is_the_same_for_the_same_seed_in_any_order_and_after_a_resume():
    random = np.random.default_rng(1)
    steps = [(random.integers(0, 500, 20), random.random(20) * 3) for _ in range(50)]
    one, shuffled, resumed, other = Reservoir(40), Reservoir(40), Reservoir(40), Reservoir(40)
    for number, (documents, losses) in enumerate(steps):
        order = random.permutation(20)
        one.observe(documents, losses, 7)
        shuffled.observe(documents[order], losses[order], 7)
        other.observe(documents, losses, 8)
        if number % 10 == 0:
            state = json.loads(json.dumps(resumed.state()))
            resumed = Reservoir(40)
            resumed.load_state(state)
        resumed.observe(documents, losses, 7)
    assert one.state() == shuffled.state() == resumed.state()
    assert one.state() != other.state()


# --- the sleep ---

def test_an_expert_killed_by_hand_is_revived_and_used_again(tmp_path):
    life = Life(tmp_path)
    router = life.model.moe.router
    with torch.no_grad():
        router.bias[2] = -100
    for _ in range(130):
        _, load = life.step()
        assert load[2] == 0
    assert router.use_E[2] < 0.3 < router.use_E[[0, 1, 3]].min()  # 0.99^130 is 0.27
    before = snapshot(life.model)
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in life.optimizer.state.items()}

    said = make(replay_steps=0, average=0, min_use=0.3).sleep(life.night())
    assert said["moe.revived_experts"] == 1
    stacks = ["moe.gate_up.weight", "moe.down.weight", "moe.activation.threshold", "moe.router.weight"]
    after = snapshot(life.model)
    for name in stacks[:2] + stacks[3:]:
        assert not torch.equal(after[name][2], before[name][2])
    assert after["moe.gate_up.weight"][2].std() == pytest.approx(0.02, rel=0.3)  # as at the beginning
    for name, tensor in after.items():  # and all that is not this expert's is as it was
        if tensor.is_floating_point() and name not in ("moe.activation.offset", "moe.activation.zero_rate",
                                                       "moe.shared_activation.offset",
                                                       "moe.shared_activation.zero_rate"):
            kept = torch.ones(len(tensor), dtype=torch.bool)
            if len(tensor) == 4:
                kept[2] = False
            if name == "moe.router.inhibition.similarity_EE":
                tensor, before[name] = tensor[:, kept], before[name][:, kept]
            assert torch.equal(tensor[kept], before[name][kept]), name
    for name, parameter in life.model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            new, old = life.optimizer.state[parameter][key], moments[parameter][key]
            if name in stacks:
                assert (new[2] == 0).all() and torch.equal(new[[0, 1, 3]], old[[0, 1, 3]])
                assert new[[0, 1, 3]].any()
            else:
                assert torch.equal(new, old)

    loads = torch.stack([life.step()[1] for _ in range(20)])
    assert (loads.sum(0)[2] / loads.sum(0).sum()) > 0.1  # an even share is 0.25
    assert make(replay_steps=0, average=0, min_use=0.3).sleep(life.night())["moe.revived_experts"] == 0


def test_nothing_dead_nothing_changed(tmp_path):
    life = Life(tmp_path)
    for _ in range(30):
        life.step()
    router, gate_up = life.model.moe.router, life.model.moe.gate_up
    before = (router.weight.clone(), router.bias.clone(), gate_up.weight.clone())
    said = make(replay_steps=0, average=0).sleep(life.night())
    assert said["moe.revived_experts"] == 0 and said["moe.least_use"] > 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, (router.weight, router.bias, gate_up.weight), strict=True))


def test_the_hardest_documents_are_replayed_slowly_and_then_forgotten(tmp_path):
    life = Life(tmp_path)
    sleep = make(reservoir=5, replay_steps=6, replay_learning_rate=0.2, average=0)
    for _ in range(10):
        life.step()
    sleep.observe(np.arange(40), np.where(np.arange(40) >= 35, 9.0, 1.0), 3)
    said = sleep.sleep(life.night())
    (documents, steps, factor, loss), = life.replayed
    assert documents.tolist() == [35, 36, 37, 38, 39] and (steps, factor) == (6, 0.2)
    assert said["replayed_documents"] == 5 and said["remembered_loss"] == 9
    assert said["bits_per_byte_replayed"] == said["bits_per_byte_after"] == life.score()
    assert said["bits_per_byte_after"] < said["bits_per_byte_before"]
    assert said["replay_loss"] == loss
    sleep.sleep(life.night())
    assert len(life.replayed) == 1  # nothing new was seen


def test_an_average_that_helps_is_kept(tmp_path):
    life = Life(tmp_path)
    for _ in range(20):
        life.step()
    good = snapshot(life.model)
    noise = {name: 0.3 * torch.randn_like(p) for name, p in life.model.named_parameters()}
    for number in (-2, -1, 3):  # three models around a good one, whose mean is the good one
        with torch.no_grad():
            for name, parameter in life.model.named_parameters():
                parameter.copy_(good[name] + number * noise[name])
        if number < 0:
            life.checkpoint()
    said = make(replay_steps=0, average=2).sleep(life.night())
    assert said["averaging_kept"] == 1 and said["averaged_checkpoints"] == 2
    assert said["bits_per_byte_after"] == said["bits_per_byte_averaged"] < said["bits_per_byte_replayed"]
    assert life.score() == said["bits_per_byte_after"]
    for name, parameter in life.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), good[name], rtol=1e-4, atol=1e-5)


def test_an_average_that_hurts_is_undone_to_the_last_bit(tmp_path):
    life = Life(tmp_path)
    for _ in range(20):
        life.step()
    life.checkpoint(lambda weight: torch.randn_like(weight))
    life.checkpoint(lambda weight: -weight)
    sleep = make(replay_steps=0, average=2)
    sleep.sleep(life.night(checkpoints=[]))  # whatever is to repair is repaired
    before = snapshot(life.model)
    said = sleep.sleep(life.night())
    assert said["averaging_kept"] == 0
    assert said["bits_per_byte_averaged"] > said["bits_per_byte_replayed"] == said["bits_per_byte_after"]
    assert life.score() == said["bits_per_byte_after"]
    for name, parameter in life.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_only_so_many_of_the_latest_checkpoints_are_averaged_and_buffers_not_at_all(tmp_path):
    life = Life(tmp_path)
    life.step()
    start = snapshot(life.model)
    for size in (1000.0, 3.0, 5.0):
        life.checkpoint(lambda weight, size=size: weight * size)
    life.score = iter([3.0, 2.0, 1.0]).__next__
    said = make(replay_steps=0, average=2).sleep(life.night())
    assert said == said | {"bits_per_byte_before": 3.0, "bits_per_byte_replayed": 2.0, "bits_per_byte_averaged": 1.0}
    for name, parameter in life.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), start[name] * (1 + 3 + 5) / 3)
    torch.testing.assert_close(life.model.moe.router.bias, start["moe.router.bias"])


def test_what_was_drawn_anew_is_not_averaged_with_its_dead_past(tmp_path):
    life = Life(tmp_path)
    life.step()
    life.checkpoint(lambda weight: weight + 1)
    with torch.no_grad():
        life.model.moe.router.use_E[1] = 0
    down = life.model.moe.down.weight
    before = down.detach().clone()
    scores = iter([3.0, 2.0, 1.0])
    make(replay_steps=0).sleep(life.night(score=scores.__next__))
    torch.testing.assert_close(down[[0, 2, 3]].detach(), before[[0, 2, 3]] + 0.5)
    assert down[1].abs().max() < 0.2  # drawn anew, and nothing of the checkpoint in it


def test_an_interrupted_sleep_returns_at_once(tmp_path):
    life = Life(tmp_path)
    life.step()
    life.checkpoint()
    sleep = make()
    sleep.observe(np.arange(4), np.ones(4), 0)
    state = sleep.state()
    life.stop = True
    assert "bits_per_byte_replayed" not in sleep.sleep(life.night())
    assert not life.replayed and sleep.state() == state
    life.stop, replay = False, life.replay

    def cut_short(*what):
        life.stop = True
        return replay(*what)

    said = sleep.sleep(life.night(replay=cut_short))
    assert "replay_loss" in said and "bits_per_byte_averaged" not in said and sleep.state() == state


def test_the_same_sleep_twice_is_the_same(tmp_path):
    ends = []
    for number in range(2):
        life = Life(tmp_path / str(number))
        for _ in range(5):
            life.step()
        with torch.no_grad():
            life.model.moe.router.use_E[0] = 0
        torch.manual_seed(number)  # the global state plays no part, and is left as it was
        before = torch.get_rng_state()
        make().sleep(life.night())
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(snapshot(life.model))
    assert same(life.model, ends[0]) and not torch.equal(ends[0]["moe.gate_up.weight"][0], torch.zeros(16, 16))


def test_when_it_sleeps():
    assert not any(make().wants_sleep(step) for step in range(100))
    assert [step for step in range(25) if make(every=10).wants_sleep(step)] == [10, 20]
