"""The lm-evaluation-harness on a small model: its numbers are the model's own, and its tasks run without a network."""

import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.test_cli import call
from tryplicity.data.tokenizer import BOS
from tryplicity.inference.engine import Engine, decode
from tryplicity.inference.sampler import Sampler, Sampling

CHOICES = [{"question": "the model", "choices": [" reads a list", " zzz"], "answer": 0},
           {"question": "if it is", "choices": [" qqq", " not empty"], "answer": 1}]


@pytest.fixture(scope="module")
def lm(run, registry):
    from tryplicity.evaluation.harness import TryplicityLM

    engine = Engine.load(run, registry, ternary=False)
    yield TryplicityLM(engine)
    engine.close()


@pytest.fixture
def tasks(tmp_path):
    """A task of choices, one of perplexity and one of writing, each from a local file."""
    (tmp_path / "choices.json").write_text("\n".join(json.dumps(row) for row in CHOICES))
    (tmp_path / "texts.json").write_text("\n".join(json.dumps({"text": text}) for text in
                                                   ("the model reads a list of numbers", "it raises an error")))
    words = "doc_to_text: '{{text}}'\n"
    common = "dataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: %s}}\nmetadata: {version: 1}\n"
    (tmp_path / "choices.yaml").write_text(
        f"task: own_choices\n{common % (tmp_path / 'choices.json')}output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n")
    (tmp_path / "texts.yaml").write_text(
        f"task: own_texts\n{common % (tmp_path / 'texts.json')}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]\n")
    (tmp_path / "writing.yaml").write_text(
        f"task: own_writing\n{common % (tmp_path / 'texts.json')}output_type: generate_until\n{words}"
        "doc_to_target: ' and'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 8, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n")
    return tmp_path


def asked(*args):
    return SimpleNamespace(args=args)


def own_logprobs(lm, ids):
    """(log-probability, likeliest) of each token but the first, by one plain pass over the row alone."""
    with torch.no_grad():
        logprobs_TV = lm.engine.model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    return [(row[token].item(), int(row.argmax()) == token) for row, token in zip(logprobs_TV, ids[1:], strict=True)]


def test_likelihoods_are_the_model_s_own_whatever_is_batched_with_them(lm):
    pairs = [("the model", " reads a list"), ("", "the sum"), ("a", " zzz"),
             ("it raises an error while another function opens ", "file"),
             ("if it is not empty", " otherwise it raises an error")]
    found = lm.loglikelihood([asked(*pair) for pair in pairs])
    for (before, after), (logprob, greedy) in zip(pairs, found, strict=True):
        start = [BOS, *lm.engine.tokenizer.encode(before.rstrip(), add_special_tokens=False).ids]
        whole = [BOS, *lm.engine.tokenizer.encode(before + after, add_special_tokens=False).ids]
        own = own_logprobs(lm, whole)[len(start) - 1:]
        assert logprob == pytest.approx(sum(value for value, _ in own), abs=1e-4)
        assert greedy == all(likeliest for _, likeliest in own)


def test_what_greedy_decoding_writes_is_called_greedy(lm):
    prompt = [BOS, *lm.engine.tokenizer.encode("the model", add_special_tokens=False).ids]
    written = list(itertools.islice(decode(lm.engine.model, prompt, Sampler(Sampling(temperature=0), prompt)), 5))
    other = [*written[:-1], (written[-1] + 1) % 300]
    assert [greedy for _, greedy in lm.scores([(prompt, written), (prompt, other)])] == [True, False]


def test_whole_texts_are_scored_in_windows_each_token_once(lm):
    text = "the model reads a list of numbers and returns their sum if it is not empty otherwise. " * 4
    ids = lm.tok_encode(text, add_special_tokens=False)
    context = lm.engine.context_length
    assert len(ids) > 2 * context
    first, rest = own_logprobs(lm, [BOS, *ids[:context]]), ids[context:]
    assert len(first) == context
    wanted, at = sum(value for value, _ in first), context
    while rest:
        part, rest = rest[:context], rest[context:]
        at += len(part)
        wanted += sum(value for value, _ in own_logprobs(lm, ids[at - context - 1:at])[-len(part):])
    found = lm.loglikelihood_rolling([asked(text), asked("it"), asked("")])
    assert found[0] == pytest.approx(wanted, abs=1e-3) and found[2] == 0
    assert found[1] == pytest.approx(lm.loglikelihood([asked("", "it")])[0][0], abs=1e-4)


def test_of_a_long_context_the_end_is_read_and_a_long_continuation_is_refused(lm):
    from tryplicity.errors import UserError

    context, ids = lm.engine.context_length, [7 + i % 50 for i in range(100)]
    (found, _), = lm.scores([(ids, [20, 21])])
    assert found == pytest.approx(sum(v for v, _ in own_logprobs(lm, [*ids, 20, 21][-context - 1:])[-2:]), abs=1e-4)
    with pytest.raises(UserError, match=f"continuation of 49 tokens, and the context of this model holds {context}"):
        lm.scores([([BOS], ids[:49])])


def test_texts_are_greedy_and_end_before_what_ends_them(lm):
    prompts = ["the model reads", "if it is", "the model reads", "numbers and " * 40]
    plain = lm.generate_until([asked(p, {"until": [], "max_gen_toks": 12}) for p in prompts])
    assert plain[0] == plain[2] and all(plain)
    prompt = lm.tok_encode(prompts[0])
    own = itertools.islice(decode(lm.engine.model, prompt, Sampler(Sampling(temperature=0), prompt)), 12)
    assert plain[0] == lm.engine.tokenizer.decode(list(own), skip_special_tokens=True)
    end = plain[0][3]
    cut, = lm.generate_until([asked(prompts[0], {"until": end, "max_gen_toks": 12, "do_sample": False,
                                                 "temperature": 0.9})])
    assert cut == plain[0][:plain[0].index(end)]


def test_tasks_of_a_folder_without_a_network(capfd, run, lm, tasks, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = call(capfd, "eval", str(run), "--tasks", "own_choices,own_texts,own_writing", "--tasks-folder",
                          str(tasks), "--json")
    assert code == 0, err
    said = json.loads(out)
    scores = [[lm.loglikelihood([asked(row["question"], choice)])[0][0] for choice in row["choices"]]
              for row in CHOICES]
    right = [max(range(2), key=own.__getitem__) == row["answer"] for own, row in zip(scores, CHOICES, strict=True)]
    assert said["tasks"]["own_choices"]["acc,none"] == sum(right) / 2
    nats = -sum(lm.loglikelihood_rolling([asked("the model reads a list of numbers"), asked("it raises an error")]))
    assert said["tasks"]["own_texts"]["bits_per_byte,none"] == pytest.approx(nats / (33 + 18) / 0.693147, rel=1e-4)
    assert said["tasks"]["own_writing"]["exact_match,none"] in (0, 0.5, 1)
    code, page, _ = call(capfd, "eval", str(run), "--tasks", "own_choices", "--tasks-folder", str(tasks), "--limit",
                         "1")
    assert code == 0 and f"{float(right[0]):.4f}" in page and "first 1 documents" in page


@pytest.mark.parametrize("arguments, line", [
    (["--tasks", "no_such_task"], "there is no task 'no_such_task'"),
    (["--tasks", "own_broken", "--tasks-folder", "{tasks}"], "own_broken: cannot be loaded"),
    (["--limit", "3"], "are for --tasks"),
    (["--tasks", "a", "--data", "b"], "leave one of --data and --tasks out"),
], ids=["unknown", "broken", "no tasks", "both"])
def test_what_is_wrong_is_one_line(capfd, run, tasks, arguments, line):
    (tasks / "broken.yaml").write_text(
        f"task: own_broken\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks}/nothing.json}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n")
    code, out, err = call(capfd, "eval", str(run), *(argument.format(tasks=tasks) for argument in arguments))
    assert code == 2 and line in err and not out


def test_without_the_package_a_line_says_what_to_install(capfd, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = call(capfd, "eval", str(run), "--tasks", "arc_easy")
    assert code == 2 and 'pip install "tryplicity[lm-eval]"' in err
