"""A chat phase after pretraining: what the assistant says is learnt, and measured on conversations held out."""

import json

from tryplicity import load_plugins
from tryplicity.data import parse_source, prepare_conversations
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
    assert len(measured) > 4 and round(outcome.chat_bits_per_byte, 4) == round(measured[-1], 4)
    assert measured[-1] < 0.6 * measured[0]
    phases = [line["phase"] for line in lines if "phase" in line]
    assert phases == sorted(phases, reverse=True) and phases.count("pretrain") == 14 and phases.count("chat") == 56
