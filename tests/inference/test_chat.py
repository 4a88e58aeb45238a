"""A small model learns three conversations through the packed stream and is asked."""

import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tryplicity import Conversation, Source, UserError, load_plugins
from tryplicity.data.conversations import prepare_conversations
from tryplicity.inference.chat import ask, dialogue, prompt, reply, request
from tryplicity.inference.engine import Engine, Request, ready_for_decoding
from tryplicity.inference.sampler import Sampling
from tryplicity.model import assemble, initialise
from tryplicity.run import Run
from tryplicity.training.step import decay_groups, training_step

TALKS = {"What is a list?": "It reads lines.\nIn order.", "What is a file?": "It prints the text.",
         "What is a sum?": "An error → of numbers."}
GREEDY = Sampling(temperature=0)


class Talks(Source):
    name = "talks"

    def fingerprint(self):
        return json.dumps(TALKS)

    def conversations(self):
        last = ("29", "What is left?", "What is held out.")     # 29 comes first in the order that decides what is
        for number, question, answer in [*((str(n), *talk) for n, talk in enumerate(TALKS.items())), last]:
            yield Conversation(number, tuple([*dialogue(question), {"role": "assistant", "content": answer}]), "")


@pytest.fixture(scope="module")
def engine(registry, prepared, tmp_path_factory):
    from tryplicity.data.tokenizer import load_tokenizer
    from tryplicity.spec import load_spec

    chats = prepare_conversations(Talks(), prepared.tokenizer_path, 300, tmp_path_factory.mktemp("cache"))
    spec = load_spec(str(Path(__file__).parents[1] / "small.yaml"), registry, ["context_length=128", "heads=[]"])
    model = initialise(assemble(spec), "cpu", 0)
    decayed, undecayed = decay_groups(model)
    optimizer = torch.optim.AdamW([{"params": decayed + undecayed, "initial_lr": 5e-3}], lr=5e-3, weight_decay=0.0)
    strategy, stream = registry.part("parallelism", "single").build(), chats.stream(seed=0)
    for step in range(120):
        training_step(model, optimizer, strategy, stream.batch(step * 2 * 128, 2, 128), step=step, micro_batch=2,
                      precision="fp32", max_norm=1.0, learning_rate_factor=min(1.0, (120 - step) / 60))
    return Engine(ready_for_decoding(model), load_tokenizer(prepared.tokenizer_path, 300)), chats


def learnt(chats):
    return [json.loads(d.text) for d in chats.collection.documents(held_out=False)]


def test_it_gives_the_answers_back_and_ends(engine):
    engine, chats = engine
    for question, answer in learnt(chats):
        assert ask(engine, question["content"], GREEDY, max_tokens=60) == answer["content"]
    assert len(learnt(chats)) == 3


def test_it_streams_whole_characters_and_ends_at_a_stop_string_or_the_most_tokens(engine):
    engine, chats = engine
    asked, answer = next((q, a["content"]) for q, a in learnt(chats) if "sum" in q["content"] or "list" in q["content"])
    pieces = list(reply(engine, [asked], GREEDY, 60))
    assert len(pieces) > 3 and "".join(pieces) == answer
    assert "".join(reply(engine, [asked], GREEDY, 60, stop=[answer[6:9]])) == answer[:6]
    assert answer.startswith(first := "".join(reply(engine, [asked], GREEDY, 2))) and len(first) < len(answer)


def test_a_penalty_on_repetition_leaves_the_end_alone(engine):
    """<|im_end|> is in every prompt; as a word it would be penalised and the answer would go on."""
    engine, chats = engine
    for question, answer in learnt(chats):
        said = ask(engine, question["content"], Sampling(temperature=0, repetition_penalty=1.02), 60)
        assert said == answer["content"]


def test_the_next_turn_reads_only_what_is_new(engine):
    """As far as the answer's text has the tokens that it was written with."""
    engine, chats = engine
    question, answer = learnt(chats)[0]
    messages, ids = [question], prompt(engine, [question])
    assert "".join(reply(engine, messages, GREEDY, 60)) == answer["content"]
    before = engine.statistics()["prompt_tokens_total"]
    messages += [answer, {"role": "user", "content": "A sum?"}]
    known = (*ids, *engine.tokenizer.encode(answer["content"], add_special_tokens=False).ids)
    assert prompt(engine, messages)[:len(known)] == known
    list(reply(engine, messages, GREEDY, 2))
    # all of the answer but its last token was read when it ended
    assert engine.statistics()["prompt_tokens_total"] - before <= len(prompt(engine, messages)) - len(known) + 1


def test_a_conversation_goes_on_alike_whoever_wrote_its_beginning(make_packed, tokenizer):
    """One engine writes a conversation turn by turn; another, as after a restart, hears of it only before its last
    turn. The answers have many tokens that their text would not be given."""
    model, otherwise = make_packed(), 0
    model.embedding.weight.mul_(1 / 8)  # near even chances: what is written is no text
    writer = Engine(model, tokenizer)
    for number in range(12):
        dice = random.Random(number)
        question = "".join(dice.choices("abcdefgh ->()=:\n", k=dice.randrange(1, 30)))
        sampling, messages = Sampling(temperature=number % 3 * 0.5, seed=number), dialogue(f"q {question}")
        for _ in range(2):
            pieces = list(writer.generate(request(writer, messages, sampling, 12)))
            text = "".join(piece.text for piece in pieces)
            written = [token.id for piece in pieces for token in piece.tokens]
            otherwise += tokenizer.encode(text, add_special_tokens=False).ids != written
            messages = [*messages, {"role": "assistant", "content": text or "-"}, {"role": "user", "content": "And?"}]
        fresh = Engine(model, tokenizer)
        last = [(prompt(one, messages), "".join(reply(one, messages, sampling, 12))) for one in (writer, fresh)]
        assert last[0] == last[1]
        fresh.close()
    writer.close()
    assert otherwise > 6


def test_an_answer_can_be_gone_on_with(engine):
    engine, chats = engine
    question, answer = learnt(chats)[0]
    short = "".join(reply(engine, [question], GREEDY, 3))
    messages = [question, {"role": "assistant", "content": short}]
    going_on = Request(prompt(engine, messages, go_on=True), GREEDY, 60, end_tokens=engine.vocabulary.ends)
    rest = list(engine.generate(going_on))
    assert short + "".join(piece.text for piece in rest) == answer["content"]
    with pytest.raises(UserError, match="only a message of the assistant can be gone on with"):
        prompt(engine, [question], go_on=True)


def test_an_empty_question_is_told(engine):
    with pytest.raises(UserError, match=r"chat: message 1 \(user\): the content is empty"):
        ask(engine[0], "  ", GREEDY)


def test_generate_chat_prints_the_answer_alone(engine, prepared, tmp_path):
    from safetensors.torch import save_file

    from tryplicity.builder import build
    from tryplicity.cli import main

    engine, chats = engine
    built = build(str(Path(__file__).parents[1] / "small.yaml"), "cpu", load_plugins().registry,
                  ["context_length=128", "heads=[]"])
    run = Run(tmp_path / "run")
    run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={}, tokenizer=prepared.tokenizer_path.read_text())
    save_file({name: tensor.contiguous() for name, tensor in engine.model.state_dict().items()}, run.weights)
    question, answer = learnt(chats)[0]
    command = ["generate", str(run.folder), "--temperature", "0", "--repetition-penalty", "1"]
    done = CliRunner().invoke(main, [*command, "--chat", question["content"]])
    assert (done.exit_code, done.stdout) == (0, answer["content"] + "\n")
    told = CliRunner().invoke(main, [*command, "--chat", question["content"], "--system", "Be short."])
    assert told.exit_code == 0
    refused = CliRunner().invoke(main, [*command, "hello", "--system", "Be short."])
    assert refused.exit_code == 2 and "error: --system is for --chat" in refused.output
