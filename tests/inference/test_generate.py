"""From a trained run to text."""

import math

import pytest
import torch

from tryplicity.errors import UserError
from tryplicity.inference.engine import Engine, decode, ready_for_decoding
from tryplicity.inference.sampler import Sampler, Sampling, filtered
from tryplicity.run import Run
from tryplicity.training.loop import Budget, train


@pytest.fixture(scope="module")
def run(registry, prepared, tmp_path_factory):
    """A small model trained until it knows a word or two."""
    from pathlib import Path

    from tryplicity import load_plugins
    from tryplicity.builder import build

    spec = Path(__file__).parent.parent / "small.yaml"
    built = build(str(spec), "cpu", registry, ["hardware.batch=4", "linear=bitlinear"])
    run = Run(tmp_path_factory.mktemp("runs") / "small")
    run.create(spec=built.spec.as_yaml(), hardware="", build={}, data={}, tokenizer=prepared.tokenizer_path.read_text())
    train(built, prepared, run, Budget(steps=60), load_plugins())
    return run


def text(engine, prompt="the ", **sampling):
    return "".join(engine.stream(prompt, Sampling(**sampling), 30))


def test_the_same_seed_writes_the_same_text_and_letters_of_the_corpus(run, registry, corpus):
    engine = Engine.load(run.folder, registry)
    first = text(engine, temperature=0.5, top_p=0.9, seed=1)
    assert first == text(engine, temperature=0.5, top_p=0.9, seed=1) != text(engine, temperature=0.5, top_p=0.9, seed=2)
    assert len(first) > 30  # and of 256 bytes it could write:
    assert set(first) <= set("".join(path.read_text() for path in corpus.iterdir()))


def test_decoding_from_caches_is_the_whole_pass_again_and_again(run, registry):
    """Greedy text from caches equals greedy text by reading everything anew for each token."""
    engine = Engine.load(run.folder, registry)
    prompt = [2, *engine.tokenizer.encode("the model reads", add_special_tokens=False).ids]
    tokens = decode(engine.model, prompt, Sampler(Sampling(temperature=0), prompt))
    fast = [next(tokens) for _ in range(20)]
    slow = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            slow.append(int(engine.model(torch.tensor([slow]))[0, -1].argmax()))
    assert fast == slow[len(prompt):]


def test_getting_ready_for_decoding_changes_no_value(make_model):
    model, ids = make_model().eval(), torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        before = model(ids)
        torch.testing.assert_close(ready_for_decoding(model)(ids), before, rtol=1e-4, atol=1e-5)


def test_while_it_trains_the_newest_checkpoint_is_used(run, registry, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    (copy / "model.safetensors").unlink()
    same = {"temperature": 0.0}
    assert text(Engine.load(copy, registry), **same) == text(Engine.load(run.folder, registry), **same)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="no weights yet"):
        Engine.load(copy, registry)
    (copy / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        Engine.load(copy, registry)
    with pytest.raises(UserError, match="no such run folder"):
        Engine.load(tmp_path / "nothing", registry)
    with pytest.raises(UserError, match="not a run folder"):
        Engine.load(tmp_path, registry)


def test_a_checkpoint_is_a_model_too(run, registry, tmp_path):
    """By its folder, in the run that says what it is of."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    checkpoint = sorted((copy / "checkpoints").iterdir())[-1]
    (copy / "model.safetensors").write_bytes(b"something else")
    same = {"temperature": 0.0}
    loaded = Engine.load(checkpoint, registry)
    assert text(loaded, **same) == text(Engine.load(run.folder, registry), **same)
    (checkpoint / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"model\.safetensors is not as it was written; take another checkpoint"):
        Engine.load(checkpoint, registry)
    shutil.copytree(sorted((run.folder / "checkpoints").iterdir())[-1], tmp_path / "moved" / "away" / "step-4")
    with pytest.raises(UserError, match="not a run folder"):
        Engine.load(tmp_path / "moved" / "away" / "step-4", registry)


def test_weights_of_another_spec_are_refused(run, registry, tmp_path):
    import shutil

    shutil.copytree(run.folder, tmp_path / "other")
    spec = tmp_path / "other" / "spec.yaml"
    spec.write_text(spec.read_text().replace("hidden_size: 32", "hidden_size: 64"))
    with pytest.raises(UserError, match="belong to another spec"):
        Engine.load(tmp_path / "other", registry)


LOGITS = torch.log(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]))


@pytest.mark.parametrize("options, kept", [({"top_k": 2}, [0, 1]), ({"top_p": 0.6}, [0, 1]), ({"top_p": 0.5}, [0]),
                                           ({"top_p": 0.01}, [0]), ({}, [0, 1, 2, 3, 4]),
                                           ({"top_k": 9}, [0, 1, 2, 3, 4]),
                                           ({"top_k": 4, "top_p": 0.75}, [0, 1, 2])])
def test_filters_keep_what_they_say(options, kept):
    assert filtered(LOGITS, Sampling(**options)).isfinite().nonzero()[:, 0].tolist() == kept


def test_sampling_follows_the_distribution():
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [])
    counts = torch.bincount(torch.tensor([sampler(LOGITS) for _ in range(4000)]), minlength=5) / 4000
    torch.testing.assert_close(counts, LOGITS.exp(), atol=4 * math.sqrt(0.25 / 4000), rtol=0)


def test_the_repetition_penalty_lowers_what_was_seen():
    greedy = Sampling(temperature=0, repetition_penalty=3.0)
    logits = torch.tensor([2.0, 1.5, -1.0, -2.5])
    sampler = Sampler(greedy, [0])
    assert sampler(logits) == 1  # 2.0 / 3 < 1.5
    assert sampler(logits) == 0  # now 1 is seen too: 0.67 > 0.5
    assert Sampler(greedy, [2])(torch.tensor([-4.0, -9.0, -1.5, -9.0])) == 0  # -1.5 * 3 < -4


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5},
                                     {"repetition_penalty": 0}])
def test_impossible_sampling_is_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize("device", ["cuda:99", "toaster", "meta", "cpu:", ""])
@pytest.mark.parametrize("command", [["generate", ".", "hello"], ["serve", "."]], ids=["generate", "serve"])
def test_a_device_that_is_not_there_is_told_in_a_line(command, device):
    from click.testing import CliRunner

    from tryplicity.cli import main

    done = CliRunner().invoke(main, [*command, "--device", device])
    assert done.exit_code == 2 and f"--device {device}: cannot be used here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "there is cpu" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("ternary", [True, False])
def test_a_gpu_computes_what_the_processor_computes(run, registry, ternary):
    """By the plain products, packed and not."""
    prompt, scored = (2, *range(40, 140)), {}
    for device in ("cpu", "cuda"):
        engine = Engine.load(run.folder, registry, device, ternary=ternary)
        scored[device] = [token.logprob for token in engine.score(prompt).tokens[1:]]
        assert len(list(engine.tokens(prompt, Sampling(temperature=0), 5))) <= 5
        engine.close()
    assert scored["cuda"] == pytest.approx(scored["cpu"], abs=1e-2)
