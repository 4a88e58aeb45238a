"""A chat phase after pretraining: what the assistant says is learnt, and measured on conversations held out."""

import itertools
import json

import pytest
import torch

from tryplicity import IGNORE, load_plugins
from tryplicity.cli import main
from tryplicity.data import parse_source, prepare_conversations
from tryplicity.errors import UserError
from tryplicity.run import Run
from tryplicity.training.loop import Budget, train
from tryplicity.training.metrics import read_lines


def test_the_held_out_loss_of_the_assistants_tokens_falls(make_build, registry, prepared, cache, tmp_path):
    kinds, verbs = ("list", "file", "line", "sum", "text", "error"), ("reads", "opens", "prints", "raises", "closes")
    rows = [{"question": f"{kind} {verb} {number}?", "answer": f"The {kind} {verb} {number} and returns."}
            for kind in kinds for verb in verbs for number in range(10)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare_conversations(parse_source(registry, str(chats)), prepared.tokenizer_path, 300, cache)
    build = make_build("phases=[{kind: pretrain, share: 0.2}, {kind: chat, share: 0.8}]", "heads=[]",
                       "training.validate_every=10")
    run = Run(tmp_path / "run")
    run.create(spec=build.spec.as_yaml(), hardware="", build={}, data={}, tokenizer=prepared.tokenizer_path.read_text())
    outcome = train(build, prepared, run, Budget(steps=70), load_plugins(), phase_data={1: data})

    lines = read_lines(run.metrics)
    measured = [line["chat_validation_bits_per_byte"] for line in lines if "chat_validation_bits_per_byte" in line]
    assert len(measured) > 4 and outcome.chat_bits_per_byte == pytest.approx(measured[-1], rel=1e-6)
    assert measured[-1] < 0.6 * measured[0]
    phases = [line["phase"] for line in lines if "phase" in line]
    assert phases == sorted(phases, reverse=True) and phases.count("pretrain") == 14 and phases.count("chat") == 56


@pytest.fixture
def chats(tmp_path, registry, prepared, cache):
    """`chats(rows)`: these conversations, prepared with the tokenizer of `prepared`."""

    def make(rows, name="chats.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare_conversations(parse_source(registry, str(path)), prepared.tokenizer_path, 300, cache)

    return make


@pytest.fixture
def chat(make_build, prepared, tmp_path):
    """`chat(data, steps)`: one step of pretraining, then a chat on that data, in rows of 16 tokens."""

    def start(data, steps=6):
        build = make_build("phases=[{kind: pretrain, share: 1}, {kind: chat, share: 2}]", "heads=[]",
                           "layers=[attention]", "context_length=16")
        run = Run(tmp_path / "run")
        run.create(spec=build.spec.as_yaml(), hardware="", build={}, data={},
                   tokenizer=prepared.tokenizer_path.read_text())
        return run, train(build, prepared, run, Budget(steps=steps), load_plugins(), phase_data={1: data})

    return start


def test_rows_inside_a_long_question_are_left_out_and_counted_and_every_step_learns(chats, chat, capsys):
    """Questions of about 300 tokens, answers of a few, rows of 16: most rows have nothing to learn."""
    data = chats([{"question": f"the list of numbers {number} " * 40, "answer": f"its sum {number}"}
                  for number in range(40)])
    run, outcome = chat(data)
    lines = [line for line in read_lines(run.metrics) if line.get("phase") == "chat"]
    assert len(lines) == 4 and all(line["loss"] > 0 for line in lines)
    assert all(line["chat_validation_bits_per_byte"] > 0 for line in read_lines(run.metrics)
               if "chat_validation_bits_per_byte" in line)

    # how many there are, from the file itself: rows of 16 that no mask touches, in the order that they are delivered
    stream, taken, empty = data.stream(seed=0), 0, 0
    while taken < 4 * 4:
        (row,) = stream.batch((taken + empty) * 16, 1, 16).targets_BT
        taken, empty = (taken + 1, empty) if (row >= 0).any() else (taken, empty + 1)
    assert empty > 50  # or this test shows nothing
    assert outcome.left_out.total == sum(line.get("rows_left_out", 0) for line in lines) == empty
    assert str(outcome.left_out) == f"left out {empty} rows: {empty} without a word to learn"
    assert {line["tokens"] - before["tokens"] for before, line in itertools.pairwise(lines)} == {4 * 16}


def test_data_without_a_word_to_learn_is_refused_before_it_begins(chats, chat):
    import numpy as np

    data = chats([{"question": "another list", "answer": f"the sum {number}"} for number in range(40)])
    (data.folder / "train.mask.bin").write_bytes(bytes(len(np.fromfile(data.folder / "train.mask.bin", np.uint8))))
    with pytest.raises(UserError, match=r"phases\[1\]: .*there is nothing to learn here"):
        chat(data)


def test_a_held_out_part_with_nothing_to_predict_is_said_and_not_scored_as_null(chats, chat, capsys):
    import numpy as np

    data = chats([{"question": "the list", "answer": f"the sum {number}"} for number in range(40)])
    mask = data.folder / "heldout.mask.bin"
    mask.write_bytes(bytes(len(np.fromfile(mask, np.uint8))))
    run, outcome = chat(data)
    assert outcome.reason == "budget" and outcome.chat_bits_per_byte is None and outcome.bits_per_byte > 0
    assert not any("chat_validation_bits_per_byte" in line for line in read_lines(run.metrics))
    assert capsys.readouterr().err.count("has nothing to predict, so that nothing is scored on it") == 1


def test_a_step_without_a_target_changes_nothing(make_model, prepared, registry):
    from tryplicity.training.step import training_step

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    for module in model.modules():
        if hasattr(module, "before_step"):
            module.before_step(0)  # what is measured of the weights before any step is no change by this one
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = prepared.stream(seed=0).batch(0, 2, 16)
    batch = batch._replace(targets_BT=torch.full_like(batch.targets_BT, IGNORE))
    training_step(model, optimizer, registry.part("parallelism", "single").build(), batch, step=0, micro_batch=2,
                  precision="fp32", max_norm=1.0, learning_rate_factor=1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_conversations_of_chat_data_are_what_is_learned(chats, command, tmp_path, capfd):
    """From the command line: the run's checkpoint is of that data; a mistake in it is told; without a chat phase the
    option is refused and not ignored."""
    rows = [{"question": f"the list {number}?", "answer": f"the sum {number}"} for number in range(40)]
    data = chats(rows, "mine.jsonl")
    phases = ["--set", "phases=[{kind: pretrain}, {kind: chat}]", "--set", "layers=[attention]"]
    chosen = [*phases, "--chat-data", str(tmp_path / "mine.jsonl")]
    main(command("run", "--steps", "2", *chosen)[3:], prog_name="tryplicity", standalone_mode=False)
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert data.identity in json.loads((newest / "progress.json").read_text())["data"].split("+")

    main(command("base", "--steps", "1", *phases[2:])[3:], prog_name="tryplicity", standalone_mode=False)
    capfd.readouterr()
    for name, warned in (("run", 0), ("base", 1)):  # a base model has no answers to give, and that is said
        ask = ["generate", str(tmp_path / name), "the list 3?", "--chat", "--max-tokens", "2"]
        main(ask, prog_name="tryplicity", standalone_mode=False)
        assert capfd.readouterr().err.count("a base model: it has learned no conversations") == warned

    (tmp_path / "mine.jsonl").write_text('{"question": "a?"\n')
    for options, said in ((chosen, "mine.jsonl"), (chosen[2:], "--chat-data: the spec has no chat phase")):
        with pytest.raises(SystemExit) as end:
            main(command("other", "--steps", "2", *options)[3:], prog_name="tryplicity")
        assert end.value.code == 2 and said in capfd.readouterr().err
