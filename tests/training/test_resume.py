"""Options given on --resume hold from that step on, or are refused by name; the folder says what is in force."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.plain import plain_step, rate, steps_of
from tryplicity.errors import UserError
from tryplicity.run import Run
from tryplicity.spec import read_yaml
from tryplicity.training.metrics import read_lines
from tryplicity.training.resume import differences, in_words

FIRST = ["training.optimizer={type: adamw, learning_rate: 1.0e-3, beta1: 0.9, beta2: 0.95, weight_decay: 0.0}",
         "training.schedule={type: wsd, warmup_steps: 0, decay: 0}", "training.gradient_clip=1.0"]
THEN = ["training.optimizer={type: adamw, learning_rate: 4.0e-3, beta1: 0.5, beta2: 0.8, weight_decay: 3.0}",
        "training.schedule={type: wsd, warmup_steps: 0, decay: 0.5}", "training.gradient_clip=0.2"]
SMALL = ["heads=[{type: multi_token_prediction, tokens: 2, weight: 0.3}]", "layers=[attention]",
         "training.checkpoint_every=2"]


@pytest.fixture
def built(make_spec):
    from tryplicity.model import assemble, initialise

    return initialise(assemble(make_spec(*SMALL)), "cpu", 0).train()


def test_optimizer_schedule_clip_and_batch_hold_from_the_resumed_step_on(go, built, prepared):
    """A plain loop that changes them at the same step comes to the same weights."""
    run = go("run", [*SMALL, *FIRST], steps=2)
    assert read_yaml(run.spec).data["training"]["gradient_clip"] == 1.0
    go("run", [*SMALL, *THEN, "hardware.accumulation=2"], steps=4, resume=True)
    states, stream = {}, prepared.stream(seed=0)
    for step in range(2):
        plain_step(built, stream.batch(step * 2 * 48, 2, 48), states, step=step, parts=1, clip=1.0, head_weight=0.3,
                   lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.0)
    for step in (2, 3):
        lr = rate(step, 4, peak=4e-3, warmup=0, decay=0.5, floor=0.0)
        plain_step(built, stream.batch((2 * step - 2) * 2 * 48, 4, 48), states, step=step, parts=2, clip=0.2,
                   head_weight=0.3, lr=lr, beta1=0.5, beta2=0.8, eps=1e-8, decay=3.0)
        assert steps_of(run)[step]["learning_rate"] == pytest.approx(lr)
    begun, trained = {}, load_file(run.weights)
    for name, tensor in built.state_dict().items():
        moved = (tensor - begun.get(name, torch.zeros_like(tensor))).double().norm()
        assert (trained[name].double() - tensor.double()).norm() <= 1e-3 * moved + 1e-7, name

    # what is in force, and since when
    said = read_yaml(run.spec).data["training"]
    assert said["optimizer"]["learning_rate"] == 4e-3 and said["gradient_clip"] == 0.2
    assert read_yaml(run.hardware).data["accumulation"] == 2
    assert json.loads(run.build.read_text())["name"] == "small"
    (line,) = [line for line in read_lines(run.metrics) if "resumed" in line]
    assert line["step"] == 2 and line["resumed"]["training.optimizer.learning_rate"] == [1e-3, 4e-3]
    assert {"training.optimizer.beta1", "training.optimizer.beta2", "training.optimizer.weight_decay",
            "training.schedule.decay", "training.gradient_clip"} <= line["resumed"].keys()


def test_what_is_part_of_the_model_is_refused_by_its_name_and_the_folder_stays_as_it_was(go):
    run = go("run", SMALL, steps=2)
    before = run.spec.read_text()
    for setting, name in (("blocks.attention.mixer.kv_heads=4", r"layers\[0\].mixer.kv_heads 4 \(was 2\)"),
                          ("tied_embeddings=false", r"tied_embeddings false \(was true\)"),
                          ("heads=[{type: multi_token_prediction, tokens: 2, weight: 0.9}]",
                           r"heads\[0\].weight 0.9 \(was 0.3\)"),
                          ("training.seed=3", r"training\.seed")):
        with pytest.raises(UserError, match=name):
            go("run", [*SMALL, setting], steps=4, resume=True)
    assert run.spec.read_text() == before


def test_another_optimizer_is_refused_by_name(go, tmp_path):
    from tryplicity import load_plugins

    (tmp_path / "plain_sgd.py").write_text("""
import torch
from tryplicity import Optimizer, hookimpl

class Plain(Optimizer):
    '''Stochastic gradient descent.'''
    name = "plain_sgd"

    def __init__(self, config):
        pass

    def build(self, decayed, undecayed):
        return torch.optim.SGD([*decayed, *undecayed], lr=0.1)

@hookimpl
def tryplicity_components():
    return [Plain]
""")
    go("run", SMALL, steps=2)
    with pytest.raises(UserError, match=r"training\.optimizer: this run was begun with adamw"):
        go("run", [*SMALL, "training.optimizer=plain_sgd"], steps=4, resume=True,
           plugins=load_plugins((str(tmp_path / "plain_sgd.py"),)))


def test_where_every_checkpoint_is_damaged_nothing_is_begun_anew(go, capsys):
    run = go("run", SMALL, steps=4)
    before = run.weights.read_bytes()
    (run.checkpoints / "step-2" / "model.safetensors").write_bytes(b"cut")
    (run.checkpoints / "step-4" / "optimizer.safetensors").unlink()
    with pytest.raises(UserError) as refused:
        go("run", SMALL, steps=6, resume=True)
    said = str(refused.value)
    assert "step-4: optimizer.safetensors is missing; step-2: model.safetensors is not as it was written" in said
    assert run.weights.read_bytes() == before and len(steps_of(run)) == 4


def test_equal_trainings_leave_equal_files(go, tmp_path):
    """All but what says how long it took."""
    runs = [go(name, SMALL, steps=2) for name in ("a", "b")]
    for name in ("model.safetensors", *(f"checkpoints/step-2/{file}" for file in
                                        ("model.safetensors", "optimizer.safetensors", "state.pt", "index.json"))):
        first, second = ((run.folder / name).read_bytes() for run in runs)
        assert first == second, name
    progress = [json.loads((run.checkpoints / "step-2" / "progress.json").read_text()) for run in runs]
    assert [list(p) for p in progress] == [sorted(progress[0])] * 2
    # and the order is the same in every process
    header = runs[0].weights.read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert list(json.loads(header[8:8 + size])["__metadata__"]) == ["format", "identity"]


def test_differences_and_their_words():
    before = {"a": 1, "b": {"type": "x", "c": [1, 2]}, "d": {"type": "y"}, "e": None}
    now = {"a": 1, "b": {"type": "x", "c": [1, 3]}, "d": {"type": "z", "f": 1}, "e": "text"}
    found = differences(before, now)
    assert found == {"b.c[1]": (2, 3), "d": ({"type": "y"}, {"type": "z", "f": 1}), "e": (None, "text")}
    assert in_words(found) == 'b.c[1] 3 (was 2), d {"type": "z", "f": 1} (was {"type": "y"}), e text (was nothing)'
    assert in_words(found, 1).endswith("(was 2) and 2 more")


@pytest.mark.parametrize("options", [True, False])
def test_checkpoints_of_before_are_gone_on_from(go, options):
    """model.safetensors and optimizer.pt; in the oldest it is not said what the optimizer was built with, and the
    options given hold."""
    whole = go("whole", SMALL, steps=3)
    run = go("run", SMALL, steps=2)
    as_before(run.checkpoints / "step-2", options)
    go("run", [*SMALL, "training.optimizer.learning_rate=7.0e-4"] if not options else SMALL, steps=3, resume=True)
    if options:
        assert run.weights.read_bytes() == whole.weights.read_bytes()
    else:
        assert steps_of(Run(run.folder))[2]["learning_rate"] < 7.1e-4


def as_before(folder, options):
    """Write a checkpoint as it was written until torch.distributed.checkpoint took over: the whole optimizer's
    `state_dict`, where parameters have numbers, in one file."""
    plain = torch.load(folder / "state.pt", weights_only=True)
    tensors = load_file(folder / "optimizer.safetensors")
    names = [name for group in plain["groups"] for name in group["params"]]
    state = {i: {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                 if f"{name}.{key}" in tensors} for i, name in enumerate(names)}
    numbers = iter(range(len(names)))
    groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in plain["groups"]]
    saved = {"optimizer": {"state": state, "param_groups": groups}, "random": plain["random"][0]}
    torch.save(saved | ({"options": plain["options"]} if options else {}), folder / "optimizer.pt")
    for name in ("state.pt", "optimizer.safetensors", "index.json", "complete.json"):
        (folder / name).unlink()
    complete = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "complete.json").write_text(json.dumps(complete))
