"""Phases, stages, sleeps and brain modules in a run: what the loop makes of them."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tryplicity import IGNORE, load_plugins
from tryplicity.data.packing import Batch
from tryplicity.errors import UserError
from tryplicity.run import Run
from tryplicity.spec.model import Phase
from tryplicity.training import checkpoint
from tryplicity.training.loop import Budget, train
from tryplicity.training.metrics import read_lines
from tryplicity.training.phases import PhasePlan
from tryplicity.training.session import document_losses, mean_losses


def test_phases_take_their_shares_in_order_and_a_sleep_lies_between():
    plan = PhasePlan([Phase("pretrain", share=3), Phase("sleep"), Phase("chat")])
    assert [plan.at(spent, 0) for spent in (0.0, 0.5, 0.7499, 0.75, 0.9)] == [0, 0, 0, 1, 1]
    assert [plan.at(spent, 1) for spent in (0.75, 0.99, 1.0)] == [2, 2, None]
    assert plan.within(0, 0.375) == 0.5 and plan.within(2, 0.875) == 0.5 and plan.within(2, 1.1) == 1.0


@pytest.mark.parametrize(("phases", "message"), [
    ("[{kind: chat}]", "none of them pretrains"),
    ("[{kind: pretrain}, {kind: sleep}]", "nothing in `brain` sleeps"),
    ("[{kind: pretrain}, {kind: sleep, share: 2}]", "a sleep takes no share"),
    ("[{kind: dream}]", "phases[0].kind"),
])
def test_impossible_phases_are_refused(make_spec, phases, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("`", ".")):
        make_spec(f"phases={phases}")


def test_the_losses_of_documents_are_their_means_over_valid_tokens():
    doc_ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]], dtype=torch.int32)
    targets = torch.tensor([[5, IGNORE, 5, 5], [5, 5, IGNORE, 5]])
    nll = torch.tensor([[1.0, 0.0, 2.0, 4.0], [7.0, 3.0, 0.0, 5.0]])
    batch = Batch(targets, targets, doc_ids, 0, (np.array([9, 4]), np.array([4, 2, 9])))
    rows = [batch._replace(**{name: value[i:i + 1] for name, value in batch._asdict().items() if name != "bytes"})
            for i in range(2)]
    whole = document_losses(batch, list(nll.split(1)))  # in parts, as a step gives them
    apart = [document_losses(row, [nll[i:i + 1]]) for i, row in enumerate(rows)]  # as two ranks have them
    nothing = document_losses(batch, [])  # a rank without a row
    for parts in ([whole], apart, [*apart, nothing]):
        documents, losses = mean_losses(parts)
        assert documents.tolist() == [2, 4, 9]
        assert losses.tolist() == [3.0, (2.0 + 4.0 + 7.0) / 3, (1.0 + 5.0) / 2]


PLUGIN = """
import json
from dataclasses import dataclass
from pathlib import Path

from tryplicity import Brain, Objective, Report, Stage, hookimpl

log = Path({log!r})


def say(**what):
    with log.open("a") as file:
        file.write(json.dumps(what) + "\\n")


class Halves(Brain):
    '''Short rows and slow learning in the first half; sleeps at step 6, keeps the hardest document.'''
    name = "halves"

    @dataclass(frozen=True)
    class Config:
        noisy: bool = False
        '''whether to say what it sees'''

    def __init__(self, config):
        self.worst = [0, 0.0]

    def stage(self, spent, context_length):
        if spent < 0.5:
            return Stage("first", context_length // 2, 0.5, factors={{"pull": 3.0}})
        return Stage("second", context_length)

    def observe(self, documents, losses, seed):
        hardest = int(losses.argmax())
        if losses[hardest] > self.worst[1]:
            self.worst = [int(documents[hardest]), float(losses[hardest])]

    def wants_sleep(self, step):
        return step == 6

    def sleep(self, night):
        import numpy as np
        before = night.score()
        loss = night.replay(np.array([self.worst[0]]), 2, 0.1)
        return {{"before": before, "replay_loss": loss, "after": night.score()}}

    def state(self):
        return {{"worst": self.worst}}

    def load_state(self, state):
        self.worst = state["worst"]


class Pull(Objective):
    '''Pulls each block's output to zero.'''
    name = "pull"

    def block_loss(self, x_BTD, y_BTD, doc_ids_BT):
        return Report(losses={{"pull": self.factor * 0.01 * y_BTD.square().mean((1, 2)).mean()}})


@hookimpl
def tryplicity_brain_modules():
    return [Halves, Pull]


@hookimpl
def tryplicity_slept(step, report):
    say(slept=step, **report)
"""


@pytest.fixture
def plugins(tmp_path):
    file = tmp_path / "halves.py"
    file.write_text(PLUGIN.format(log=str(tmp_path / "log")))
    return load_plugins((str(file),))


@pytest.fixture
def go(plugins, prepared, tmp_path):
    from tryplicity.builder import build

    def start(name, steps, *settings, resume=False, stop_at=None, **data):
        built = build(str(Path(__file__).parent.parent / "small.yaml"), "cpu", plugins.registry,
                      ["hardware.batch=4", "brain=[halves, pull]", *settings])
        run = Run(tmp_path / name)
        if not run.exists():
            run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={},
                       tokenizer=prepared.tokenizer_path.read_text())
        return run, train(built, prepared, run, Budget(steps=steps), plugins, resume=resume, **data)

    return start


def test_a_stage_changes_rows_rate_and_factors_and_a_sleep_is_reported(go, tmp_path):
    run, outcome = go("run", 12)
    lines = [line for line in read_lines(run.metrics) if "loss" in line]
    assert [line["stage"] for line in lines] == ["first"] * 6 + ["second"] * 6
    assert [line["context_length"] for line in lines] == [24] * 6 + [48] * 6
    assert {line["tokens"] for line in lines[:6]} == {4 * 48 * n for n in range(1, 7)}  # as many tokens a step
    rates = [line["learning_rate"] for line in lines]
    assert rates[5] == pytest.approx(0.5 * 3e-3) and rates[6] == pytest.approx(3e-3)
    assert lines[5]["pull_loss"] > 1.5 * lines[6]["pull_loss"] > 0
    (sleep,) = [line for line in read_lines(run.metrics) if "sleep" in line]
    assert sleep["step"] == 6 and sleep["sleep"].keys() == {"before", "replay_loss", "after"}
    assert sleep["sleep"]["before"] != sleep["sleep"]["after"]
    told = json.loads((tmp_path / "log").read_text())
    assert told["slept"] == 6 and told["after"] == pytest.approx(sleep["sleep"]["after"], rel=1e-6)
    assert outcome.progress.tokens == 14 * 4 * 48  # the two replayed steps are of the budget's tokens
    assert outcome.progress.brain["halves"]["worst"][1] > 4


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_stopped_in_any_stage_or_before_a_sleep_and_resumed_is_never_stopped(go, tmp_path, plugins, stop):
    from safetensors.torch import load_file

    whole, _ = go("whole", 12)
    # a run of `stop` steps has other stages, so that it is stopped as a user would stop it
    original = plugins.call

    def call(hook, **arguments):
        original(hook, **arguments)
        if hook == "tryplicity_step_finished" and arguments["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    plugins.call = call
    _, outcome = go("cut", 12)
    plugins.call = original
    assert outcome.reason == "interrupted" and outcome.progress.step == stop
    assert checkpoint.steps(tmp_path.joinpath("cut", "checkpoints"))[-1] == stop  # all is saved, a sleep due or not
    cut, _ = go("cut", 12, resume=True)
    losses = [[line.get("loss") for line in read_lines(run.metrics)] for run in (whole, cut)]
    assert losses[0] == losses[1]
    assert [line["sleep"] for line in read_lines(cut.metrics) if "sleep" in line] == [
        line["sleep"] for line in read_lines(whole.metrics) if "sleep" in line]
    a, b = load_file(whole.weights), load_file(cut.weights)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_interrupted_sleep_leaves_nothing_behind(go, plugins, monkeypatch):
    """Stopped in the middle of the sleep after step 6: what is on disk is the moment before it."""
    from safetensors.torch import load_file

    whole, _ = go("whole", 12)
    halves = plugins.registry.get("brain", "halves")
    sleep = halves.sleep

    def cut_short(self, night):
        os.kill(os.getpid(), signal.SIGTERM)
        return sleep(self, night)

    monkeypatch.setattr(halves, "sleep", cut_short)
    cut, outcome = go("cut", 12)
    assert outcome.reason == "interrupted" and checkpoint.steps(cut.checkpoints)[-1] == 6
    assert not any("sleep" in line for line in read_lines(cut.metrics))
    assert json.loads((cut.checkpoints / "step-6" / "progress.json").read_text())["tokens"] == 6 * 4 * 48
    monkeypatch.setattr(halves, "sleep", sleep)
    go("cut", 12, resume=True)
    a, b = load_file(whole.weights), load_file(cut.weights)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_regular_checkpoints_are_the_same_after_an_interruption(go, make_spec):
    run, _ = go("run", 9, "training.checkpoint_every=4", "training.keep_checkpoints=2")
    assert checkpoint.steps(run.checkpoints) == [4, 8, 9]  # 6, before the sleep, and none of the regular ones, is gone


def test_a_sleep_phase_is_slept_once_and_a_chat_phase_wants_conversations(go, prepared):
    run, outcome = go("run", 4, "phases=[{kind: pretrain}, {kind: sleep}, {kind: pretrain, learning_rate_factor: 0.1}]")
    lines = read_lines(run.metrics)
    assert [line["step"] for line in lines if "sleep" in line] == [2] and outcome.progress.sleeps == 1
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[2] < 0.2 * rates[1]
    run, outcome = go("both", 12, "phases=[{kind: pretrain}, {kind: sleep}, {kind: pretrain}]")
    asleep = [line["step"] for line in read_lines(run.metrics) if "sleep" in line]
    assert asleep == [6] and outcome.progress.sleeps == 1  # the module wants it after step 6 too: once is enough
    with pytest.raises(UserError, match=r"phases\[1\]: a chat phase needs conversations"):
        go("chat", 4, "phases=[{kind: pretrain}, {kind: chat}]")


def test_a_stage_that_cannot_be_is_refused_before_the_first_step(go, tmp_path):
    stages = "brain=[{type: neuro_curriculum, stages: [{name: easy, share: 0.5}, {name: hard, share: 0.5, %s}]}]"
    with pytest.raises(UserError, match="stage hard: no training text in the domains code"):
        go("run", 4, stages % "mixture: {code: 1}")
    with pytest.raises(UserError, match=r"stage hard: factors: no objective is called 'hebian_loss' \(did you mean"):
        go("run", 4, stages % "factors: {hebian_loss: 1}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_phase_learns_the_data_that_it_names(command, tmp_path):
    """From the command line: what the run's checkpoint and data.json say it was of."""
    from tryplicity.cli import main

    (tmp_path / "own").mkdir()
    for number in range(30):
        text = f"The own text number {number} of this phase, and its end. " * 9
        (tmp_path / "own" / f"{number}.txt").write_text(text)
    (tmp_path / "own" / "odd.bin").write_bytes(b"\0\1")
    line = command("run", "--steps", "2", "--set", "layers=[attention]", "--set",
                   f"phases=[{{kind: pretrain}}, {{kind: pretrain, data: {tmp_path / 'own'}}}]")
    main(line[3:], prog_name="tryplicity", standalone_mode=False)
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    progress = json.loads((newest / "progress.json").read_text())
    assert len(set(progress["data"].split("+"))) == 2 == len(progress["positions"])
    assert json.loads((tmp_path / "run" / "data.json").read_text())["left_out"]["phases[1]"]


def test_a_level_that_nothing_has_is_told_and_any_text_taken(prepared, registry):
    from tryplicity.spec import load_spec
    from tryplicity.training.stages import Stages, brains_of

    path = str(Path(__file__).parent.parent / "small.yaml")
    spec = load_spec(path, registry, ["brain=[{type: neuro_curriculum, stages: [{name: easy, share: 0.5, max_grade: "
                                      "0.1, mixture: {text: 1}}, {name: any, share: 0.5}]}]"])
    stages = Stages(spec, brains_of(spec), {0: prepared}, registry, seed=0)
    assert [(stage.name, round(share, 6)) for _, stage, share in stages.found] == [("easy", 0.5), ("any", 0.5)]
    (level,) = stages.warnings(None)
    assert level.startswith("stage easy: no training text up to grade 0.1; it takes texts of any")
    tokens = prepared.manifest["parts"]["train"]["tokens"]
    assert f"stage any: it goes over its {tokens:,} tokens of all 5 times" in stages.warnings(10 * tokens)
    assert len(stages.warnings(2 * tokens)) == 1


def test_a_second_pretraining_goes_on_in_the_data_and_a_damaged_later_checkpoint_costs_nothing(go, prepared):
    phases = "phases=[{kind: pretrain}, {kind: pretrain, learning_rate_factor: 0.1}]"
    run, outcome = go("two", 8, phases, "brain=[]")
    (positions,) = outcome.progress.positions.values()
    assert [state["rows"] for state in positions.values()] == [[[48, 8 * 4]]]  # no row twice
    (run.checkpoints / "step-8" / "optimizer.safetensors").write_bytes(b"cut")
    _, outcome = go("two", 7, phases, "brain=[]", resume=True)
    assert outcome.progress.step == 7 and checkpoint.damage(run.checkpoints / "step-7") is None


def test_what_a_plugin_gets_wrong_is_told_by_name(tmp_path, make_spec, prepared):
    from tryplicity.model import assemble
    from tryplicity.spec import load_spec

    file = tmp_path / "wrong.py"
    file.write_text("""
from tryplicity import Objective, hookimpl

class Idle(Objective):
    # does nothing
    name = "idle"

    def block_los(self, x_BTD, y_BTD, doc_ids_BT):
        raise AssertionError

@hookimpl
def tryplicity_brain_modules():
    return [Idle]
""")
    registry = load_plugins((str(file),)).registry
    spec = load_spec(str(Path(__file__).parent.parent / "small.yaml"), registry, ["brain=[idle]"])
    with pytest.raises(UserError, match="objective idle: overrides neither block_loss nor token_weights"):
        assemble(spec)


def test_a_checkpoint_of_another_version_says_so(go):
    run, _ = go("run", 4)
    path = run.checkpoints / "step-4" / "progress.json"
    said = json.loads(path.read_text())
    del said["sleeps"]
    path.write_text(json.dumps(said))
    complete = json.loads((path.parent / "complete.json").read_text())
    complete["progress.json"] = checkpoint.digest_of(path)
    (path.parent / "complete.json").write_text(json.dumps(complete))
    with pytest.raises(UserError, match="written by another version"):
        go("run", 8, resume=True)
