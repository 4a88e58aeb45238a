"""A simulated step against real ones, and the closed forms against the simulation."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import real_ranks
import torch
from planning_tools import CPU, DENSE, EVERYTHING, HYBRID, like, make_model, make_spec
from test_measured_peak import real_peak
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.command_line import call
from tests.ranks import together
from tryplicity import PluginFault, UserError
from tryplicity.planner import ledger as ledgers
from tryplicity.planner import plan
from tryplicity.planner.ledger import Ledger
from tryplicity.planner.neighbours import neighbours
from tryplicity.planner.simulate import Question, Simulation
from tryplicity.training.simulation import simulate as in_this_process

KIB = 1024
#: blocks that are most of a model, so that shards and buckets weigh
WIDE = ("hidden_size=256", "vocab_size=2048", "context_length=64",
        "blocks={attention: {mixer: {type: gqa, heads: 4, kv_heads: 2, head_dim: 64}, "
        "feed_forward: {type: gated_mlp, inner_size: 1024}}}")
TWO = like(CPU, count=2, link_bandwidth_gbs=1.0, accumulation=3, activation_checkpointing=True)
FOUR_GPUS = like(CPU, count=4, link_bandwidth_gbs=1.0, device="cuda", precision="bf16", accumulation=2,
                 activation_checkpointing=True)


@pytest.fixture
def simulated(tmp_path):
    """`simulated(text, settings, hardware, strategy)`: the answer of a process of its own."""

    def simulated(text, settings, hardware, strategy, *plugins):
        spec, profile = tmp_path / "spec.yaml", tmp_path / "hardware.yaml"
        spec.write_text(text)
        profile.write_text(json.dumps(dataclasses.asdict(hardware)))
        question = Question(str(spec), str(profile), tuple(settings), tuple(map(str, plugins)), strategy)
        return Simulation(question, hardware).answer()

    return simulated


def closed_form(registry, text, settings, hardware, strategy):
    return plan(make_model(registry, text, *settings), like(hardware, strategy=strategy), registry).nearest.memory


# --- real steps ---

@pytest.mark.parametrize(("text", "settings", "changes"), [
    (DENSE, (), {"activation_checkpointing": True, "accumulation": 2}),
    (DENSE, ("tied_embeddings=false",), {}),
    (HYBRID, (), {"accumulation": 3, "batch": 2}),
    pytest.param(HYBRID, EVERYTHING, {"activation_checkpointing": True, "batch": 2}, marks=pytest.mark.slow)],
    ids=["dense", "untied", "hybrid", "everything"])
def test_a_simulated_step_takes_what_a_real_one_takes(registry, text, settings, changes):
    hardware, spec = like(CPU, **changes), make_spec(registry, text, *settings)
    parts = in_this_process(spec, hardware, registry, "single")["parts"]
    assert sum(parts.values()) == pytest.approx(real_peak(registry, spec, hardware), rel=0.02)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("text", "settings", "hardware"), [
    (DENSE, WIDE, TWO), pytest.param(HYBRID, (), TWO, marks=pytest.mark.slow),
    pytest.param(DENSE, (*WIDE, "tied_embeddings=false", "linear=bitlinear"),
                 like(TWO, accumulation=1, activation_checkpointing=False), marks=pytest.mark.slow)],
    ids=["wide", "hybrid", "ternary, untied, kept"])
def test_two_real_ranks_take_what_a_simulated_one_takes(simulated, strategy, text, settings, hardware):
    real = together(2, real_ranks.peak, text, settings, hardware, strategy)
    assert real == pytest.approx([simulated(text, settings, hardware, strategy).memory.counted] * 2, rel=0.02)


# --- closed forms ---

@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("text", "settings"), [(DENSE, ()), (HYBRID, EVERYTHING)], ids=["dense", "everything"])
def test_the_closed_form_of_one_device(registry, text, settings, checkpointing, accumulation):
    hardware = like(CPU, activation_checkpointing=checkpointing, accumulation=accumulation)
    answer = in_this_process(make_spec(registry, text, *settings), hardware, registry, "single")
    planned = closed_form(registry, text, settings, hardware, "single")
    assert planned.counted == pytest.approx(sum(answer["parts"].values()), rel=0.01)
    assert planned.moment == answer["moment"]
    # a tied table's gradient is no gradient of the table's before the embedding's is added to it
    for name in ("weights", "optimizer", "activations", "buffers", *(["gradients"] if accumulation > 1 else [])):
        assert planned.parts[name] == pytest.approx(answer["parts"].get(name, 0), rel=0.02, abs=200 * KIB), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("text", "settings", "hardware"), [
    (DENSE, WIDE, TWO), (HYBRID, EVERYTHING, FOUR_GPUS), (DENSE, WIDE, like(TWO, accumulation=1))],
    ids=["dense", "everything on GPUs", "one micro-batch"])
def test_the_closed_form_of_several_devices(registry, simulated, strategy, text, settings, hardware):
    planned = closed_form(registry, text, settings, hardware, strategy)
    assert simulated(text, settings, hardware, strategy).compared_to(planned) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("strategy", "options", "settings", "changes"), [
    ("fsdp", {"reshard_after_forward": False}, WIDE, {}),
    ("fsdp", {"accumulate_locally": True}, WIDE, {"activation_checkpointing": False}),
    ("fsdp", {"exact": True}, WIDE, {"device": "cuda", "precision": "bf16"}),
    ("fsdp", {"shards": 2, "accumulate_locally": True}, WIDE, {"count": 4, "device": "cuda", "precision": "bf16"}),
    ("fsdp", {}, WIDE, {"nodes": 2, "accumulation": 1}),
    ("ddp", {}, WIDE, {"activation_checkpointing": False, "nodes": 2}),
    ("ddp", {"exact": True}, WIDE, {"accumulation": 1})], ids=lambda value: str(value)[:40])
def test_the_closed_form_of_each_option(registry, simulated, strategy, options, settings, changes):
    hardware = like(TWO, strategy={"type": strategy, **options}, **changes)
    planned = plan(make_model(registry, DENSE, *settings), hardware, registry).nearest.memory
    difference = simulated(DENSE, settings, hardware, strategy).compared_to(planned)
    assert difference == pytest.approx(0, abs=0.05 if strategy == "fsdp" else 0.03)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_closed_form_of_exact_sums_on_one_device(registry, accumulation):
    hardware = like(CPU, strategy={"type": "single", "exact": True}, accumulation=accumulation)
    answer = in_this_process(make_spec(registry, DENSE, *WIDE), hardware, registry, "single")
    planned = plan(make_model(registry, DENSE, *WIDE), hardware, registry).nearest.memory
    assert planned.counted == pytest.approx(sum(answer["parts"].values()), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "profile", "strategy", "within"), [
    ("full", "h200", "fsdp", 0.05), ("full", "b200", "ddp", 0.03), ("full", "mi300x", "ddp", 0.03),
    ("5090", "5090", "single", 0.03)])
def test_the_shipped_plans(capfd, spec, profile, strategy, within):
    code, out, _ = call(capfd, "build", spec, "--hw", profile, "--simulate", "--json")
    said = json.loads(out)
    assert code == 0 and said["fits"] and said["strategy"]["chosen"] == strategy
    assert abs(said["simulated"]["closed_form_differs"]) < within
    assert said["simulated"]["resident_gb"] < 1 and said["simulated"]["seconds"] < 60


# --- the ledger ---

@pytest.fixture
def ledger():
    fake = FakeTensorMode()
    with fake, Ledger(fake) as ledger:
        yield ledger


def test_the_peak_is_the_most_at_once_and_says_of_what(ledger):
    kept = torch.empty(256)  # 1 KiB
    ledger.label("weights", [kept])
    ledger.phase, ledger.stage, ledger.micro_batch = "forward", "layer 0", 1
    saved = torch.empty(512)
    ledger.stage = "layer 1"
    ledger.start()
    at_work = torch.empty(1024)
    view = at_work.view(32, 32)[4:]
    del at_work
    assert ledger.live == 7 * KIB, "a view keeps its memory"
    del view
    smaller = torch.empty(100)
    assert ledger.live == 3 * KIB + 512 and ledger.peak == 7 * KIB, "512 bytes is the least"
    assert ledger.parts() == {"weights": KIB, "activations": 2 * KIB, "workspace": 4 * KIB}
    assert str(ledger.peak_at) == "forward of layer 1"
    del kept, saved, smaller
    assert ledger.live == 0


def test_memory_that_is_emptied_and_filled_in_place_counts_as_it_is(ledger):
    with ledger.watching_resizes():
        tensor = torch.empty(1024)
        tensor.untyped_storage().resize_(0)
        assert ledger.live == 0
        tensor.untyped_storage().resize_(8192)
    assert ledger.live == ledger.peak == 8 * KIB


def test_what_is_worked_out_aside_is_not_counted(ledger):
    with ledger.looking_away():
        aside = torch.empty(4096) * 2
    assert ledger.live == 0 and aside.shape == (4096,)


def test_a_shortcut_gives_what_the_fake_mode_gives(registry, monkeypatch):
    spec, hardware = make_spec(registry, HYBRID, *EVERYTHING), like(CPU, activation_checkpointing=True, accumulation=2)
    short = in_this_process(spec, hardware, registry, "single")
    monkeypatch.setattr(ledgers._Shortcuts, "__call__", lambda self, func, args, kwargs: func(*args, **kwargs))
    long = in_this_process(spec, hardware, registry, "single")
    assert short["parts"] == long["parts"] and short["moment"] == long["moment"]


# --- strangers ---

HOARDER = '''
import torch
from tryplicity import Parallelism, finish_plan, hookimpl, initialise


class Hoarder(Parallelism):
    """Holds a third of a gigabyte that its plan does not mention."""

    name = "hoarder"

    def __init__(self, config):
        pass

    def place(self, model, world, seed, precision="fp32"):
        self.hoard = torch.zeros(300_000_000, dtype=torch.uint8, device=world.device)
        return initialise(model, world.device, seed)

    def clip_gradients(self, model, max_norm):
        READS
        return super().clip_gradients(model, max_norm)

    def memory(self, facts, hardware):
        return finish_plan(hardware, [("always", {"weights": 4 * facts.parameters})])


@hookimpl
def tryplicity_parallelism():
    return [Hoarder]
'''


@pytest.fixture
def hoarder(tmp_path):
    def write(reads="pass"):
        (tmp_path / "hoarder.py").write_text(HOARDER.replace("READS", reads))
        return tmp_path / "hoarder.py"

    return write


def test_a_strangers_strategy_is_judged_by_what_it_does(capfd, tmp_path, hoarder):
    spec = tmp_path / "spec.yaml"
    spec.write_text(DENSE)
    options = ("build", str(spec), "--hw", "cpu", "--plugin", str(hoarder()), "--set", "hardware.strategy=hoarder")
    code, out, _ = call(capfd, *options, "--simulate", "--json")
    said = json.loads(out)
    assert code == 0 and said["simulated"]["total_gb"] > 0.75 > 0.55 > said["memory"]["total_gb"]
    assert said["simulated"]["parts"]["buffers"] == pytest.approx(0.3, rel=0.01)

    code, out, _ = call(capfd, *options, "--simulate", "--set", "hardware.memory_gb=0.65")
    assert code == 1 and "does not fit, simulated" in out, "the plan alone would have let it pass"
    assert call(capfd, *options, "--set", "hardware.memory_gb=0.65")[0] == 0


def test_a_step_that_makes_shapes_of_data_is_named(capfd, tmp_path, hoarder):
    spec = tmp_path / "spec.yaml"
    spec.write_text(DENSE)
    plugin = hoarder("[p.grad.nonzero() for p in model.parameters()]")
    code, out, err = call(capfd, "build", str(spec), "--hw", "cpu", "--plugin", str(plugin), "--simulate",
                          "--set", "hardware.strategy=hoarder")
    assert code == 2 and not out and err.count("\n") == 1
    assert "simulating hoarder" in err and "nonzero" in err and "needs the data of a tensor" in err


def test_a_strategy_that_fails_is_named(simulated, hoarder):
    with pytest.raises(PluginFault, match=r"simulating hoarder: .*'hoarder'.*clip_gradients.*ValueError: no.*choose"):
        simulated(DENSE, (), CPU, "hoarder", hoarder("raise ValueError('no')"))


def test_a_simulation_that_is_killed_says_so(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(DENSE)
    simulation = Simulation(Question(str(spec), "cpu", (), (), "single"), CPU)
    os.kill(simulation._process.pid, signal.SIGABRT)
    with pytest.raises(PluginFault, match="ended by SIGABRT"):
        simulation.answer()


def test_a_question_about_nothing_is_the_users(simulated):
    with pytest.raises(UserError, match="no parallelism is called 'doublle'"):
        simulated(DENSE, (), CPU, "doublle")


# --- neighbours ---

def test_neighbours_keep_the_step_and_the_fastest_that_fits_comes_first(registry):
    hardware = like(FOUR_GPUS, batch=2, accumulation=4, memory_gb=3)
    model = make_model(registry, HYBRID)
    planned = plan(model, hardware, registry)
    around = neighbours(model, planned, registry)
    assert {n.strategy for n in around} == {"ddp", "fsdp"}, "single is of no use on four"
    assert {n.hardware.batch * n.hardware.accumulation for n in around} == {8}
    assert {(n.hardware.batch, n.hardware.activation_checkpointing) for n in around} == {
        (batch, checkpointing) for batch in (1, 2, 4, 8) for checkpointing in (True, False)}
    fit = [n for n in around if n.fits]
    assert fit and around[:len(fit)] == fit
    assert fit[0].tokens_per_second * 1.005 >= max(n.tokens_per_second for n in fit)
    assert not fit[0].hardware.activation_checkpointing, "nothing is computed twice"
    for n in around:
        again = plan(model, like(n.hardware, strategy=n.strategy), registry)
        assert (again.nearest.memory, again.speed.tokens_per_second) == (n.memory, n.tokens_per_second)


def test_of_equally_fast_ones_the_asked_for_comes_first(registry):
    hardware = like(CPU, accumulation=2, activation_checkpointing=False)
    planned = plan(make_model(registry, DENSE), hardware, registry)
    first = neighbours(make_model(registry, DENSE), planned, registry)[0]
    assert (first.hardware, first.strategy) == (hardware, "single")


def test_a_faster_neighbour_is_simulated_and_offered(capfd, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(DENSE)
    options = ("build", str(spec), "--hw", "cpu", "--set", "hardware.activation_checkpointing=true", "--simulate")
    code, out, _ = call(capfd, *options)
    assert code == 0 and "simulated, fastest" in out
    assert ("the fastest that fits: --set hardware.batch=4 --set hardware.accumulation=1 "
            "--set hardware.activation_checkpointing=false") in out
    code, out, _ = call(capfd, *options, "--json")
    said = json.loads(out)
    assert said["fastest"] == {"batch": 4, "accumulation": 1, "activation_checkpointing": False}
    asked, faster = said["neighbours"][:2]
    assert asked["simulated_gb"] == pytest.approx(asked["total_gb"], rel=0.01)
    assert faster["simulated_gb"] == pytest.approx(faster["total_gb"], rel=0.01)
    assert asked["tokens_per_second"] < faster["tokens_per_second"]


# --- a GPU's autocast ---

GPU_DTYPES = """
import torch
from torch.nn import functional as F
from tryplicity.planner.fake import autocast_as_on_a_gpu
autocast_as_on_a_gpu()
x, y = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8, 8)
with torch.autocast("cpu", torch.bfloat16):
    wide = [x.exp(), x.log(), x ** 2, 2 ** x, x.rsqrt(), F.softplus(x), F.layer_norm(x, (8,)), F.rms_norm(x, (8,)),
            x.softmax(-1), F.log_softmax(x, -1), x.sum(), x.sum(-1), x.cumsum(-1), x.norm(), x.logsumexp(-1),
            torch.linalg.vector_norm(x, dim=-1)]
    half = [x @ y, F.linear(x, y), x + x, x.mean(-1), F.silu(x), x.sigmoid(), x.sum(-1, dtype=torch.bfloat16),
            x.softmax(-1, dtype=torch.bfloat16)]
assert [t.dtype for t in wide] == [torch.float32] * len(wide), [t.dtype for t in wide]
assert [t.dtype for t in half] == [torch.bfloat16] * len(half), [t.dtype for t in half]
assert x.exp().dtype == torch.bfloat16
"""


def test_autocast_is_a_gpus():
    """Dtypes by torch's documented list of operators that CUDA autocasts to fp32 (docs.pytorch.org, amp)."""
    subprocess.run([sys.executable, "-c", GPU_DTYPES], check=True)
