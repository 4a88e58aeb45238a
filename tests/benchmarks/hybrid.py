"""Training and decoding speed of a hybrid beside transformers' GraniteMoeHybridForCausalLM of the same shape.

    python -m tests.benchmarks.hybrid            both sides in turn, A B A B ..., and the ratio pair by pair

Every measurement is a process of its own; ours runs the project's own training step and engine, theirs a plain
torch training loop and a cached greedy loop, each with its library's defaults.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS, CONTEXT, VOCAB = 8, 512, 8192
SPEC = Path(__file__).with_name("hybrid.yaml")
DECODED = 64


def ours_model(seed: int = 0):
    from tryplicity import load_plugins
    from tryplicity.model import assemble, initialise
    from tryplicity.spec import load_spec

    registry = load_plugins().registry
    spec = load_spec(str(SPEC), registry)
    return spec, registry, initialise(assemble(spec), "cpu", seed)


def theirs_model(seed: int = 0):
    import torch
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    torch.manual_seed(seed)
    pattern = ["mamba", "mamba", "mamba", "attention"] * 2
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=256, shared_intermediate_size=256, num_hidden_layers=8,
        layer_types=pattern, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        mamba_n_heads=8, mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_expand=2, mamba_d_conv=4,
        tie_word_embeddings=True, position_embedding_type="rope", max_position_embeddings=CONTEXT))


def _tokens_per_second(step, count: int, tokens: int) -> float:
    step()  # warm-up
    times = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return tokens / statistics.median(times)


def ours_train(count: int) -> dict:
    from tryplicity.training.process import polite_threads, tune_malloc

    polite_threads()
    tune_malloc()
    import torch

    from tryplicity.data import Batch
    from tryplicity.training.step import decay_groups, training_step

    spec, registry, model = ours_model()
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    strategy = registry.part("parallelism", "single").build()
    ids_BT = torch.randint(0, VOCAB, (ROWS, CONTEXT + 1))
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], None, 0)
    steps = iter(range(10_000))

    def step() -> None:
        training_step(model, optimizer, strategy, batch, step=next(steps), micro_batch=ROWS, precision="fp32",
                      max_norm=1.0, learning_rate_factor=0.1)

    speed = _tokens_per_second(step, count, ROWS * CONTEXT)
    return {"tokens_per_second": speed, "parameters": sum(p.numel() for p in model.parameters())}


def theirs_train(count: int) -> dict:
    import torch

    model = theirs_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids_BT = torch.randint(0, VOCAB, (ROWS, CONTEXT))

    def step() -> None:
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    speed = _tokens_per_second(step, count, ROWS * CONTEXT)
    return {"tokens_per_second": speed, "parameters": sum(p.numel() for p in model.parameters())}


def _decode_speed(start, count: int) -> dict:
    """`start(prompt)` reads a prompt and gives an iterator of tokens; only those after the first are timed."""
    import torch

    times = []
    for _ in range(count + 1):
        tokens = start(torch.randint(6, VOCAB, (1, 64)))
        next(tokens)
        started = time.perf_counter()
        for _ in range(DECODED):
            next(tokens)
        times.append(time.perf_counter() - started)
    return {"tokens_per_second": DECODED / statistics.median(times[1:])}  # the first is a warm-up


def ours_decode(count: int) -> dict:
    from tryplicity.training.process import polite_threads, tune_malloc

    polite_threads()
    tune_malloc()
    from tryplicity.inference.engine import decode, ready_for_decoding
    from tryplicity.inference.sampler import Sampler, Sampling

    _, _, model = ours_model()
    ready_for_decoding(model)

    def start(prompt_BT):
        return decode(model, prompt_BT[0].tolist(), Sampler(Sampling(temperature=0), [], prompt_BT.device))

    return _decode_speed(start, count)


def theirs_decode(count: int) -> dict:
    import torch

    model = theirs_model().eval()

    def start(prompt_BT):
        cache, ids_BT = None, prompt_BT
        while True:
            with torch.inference_mode():
                out = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids_BT = out.past_key_values, out.logits[:, -1:].argmax(-1)
                token = ids_BT.item()
            yield token

    return _decode_speed(start, count)


def compare(what: str, rounds: int, count: int) -> None:
    """Alternate whole processes and print each pair."""
    ratios = []
    print(f"{what}: tokens per second   ours   transformers   ratio")
    for _ in range(rounds):
        pair = []
        for side in ("ours", "theirs"):
            command = [sys.executable, "-m", "tests.benchmarks.hybrid", what, side, "--count", str(count)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            pair.append(json.loads(output.splitlines()[-1]))
        ours, theirs = (p["tokens_per_second"] for p in pair)
        ratios.append(ours / theirs)
        print(f"{'':27}{ours:7.1f}{theirs:15.1f}{ratios[-1]:8.2f}", flush=True)
    if what == "train":
        print(f"parameters: ours {pair[0]['parameters']:,}, theirs {pair[1]['parameters']:,}")
    print(f"median ratio {statistics.median(ratios):.2f}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["train", "decode"])
    parser.add_argument("side", nargs="?", choices=["ours", "theirs"])
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(globals()[f"{arguments.side}_{arguments.what}"](arguments.count)))
        return
    for what in [arguments.what] if arguments.what else ["train", "decode"]:
        compare(what, arguments.rounds, arguments.count)


if __name__ == "__main__":
    main()
