"""Training and decoding speed of a hybrid beside transformers' GraniteMoeHybridForCausalLM of the same shape.

    python -m tests.benchmarks.hybrid [train|decode|decode-ternary]    short bursts in turn, and the ratio pair by pair

Each side is a process of its own that stays alive, so that a drift in the machine's speed meets both alike. Ours
runs the project's own training step and engine; theirs a plain training loop and a cached greedy loop in eager
PyTorch with its defaults, and for decoding once more with a single thread. `decode-ternary` is the same hybrid with
ternary linears, packed, and its table of the vocabulary in bf16, as an exported model is; theirs is as it was.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROWS, CONTEXT, VOCAB = 8, 512, 8192
SPEC = Path(__file__).with_name("hybrid.yaml")
PROMPT, WARM, DECODED = 64, 4, 32  # tokens read, decoded untimed, decoded timed
ROOT = Path(__file__).parents[2]


def ours_model(seed: int = 0, settings: Sequence[str] = ()):
    from tryplicity import load_plugins
    from tryplicity.model import assemble, initialise
    from tryplicity.spec import load_spec

    registry = load_plugins().registry
    spec = load_spec(str(SPEC), registry, settings)
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


def ours_train() -> Callable[[], float]:
    """Makes one training step ready; each call does one and gives tokens per second."""
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    import torch

    from tryplicity.data import Batch
    from tryplicity.training.step import decay_groups, training_step

    spec, registry, model = ours_model()
    _say_size(model)
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    strategy = registry.part("parallelism", "single").build()
    ids_BT = torch.randint(0, VOCAB, (ROWS, CONTEXT + 1))
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], None, 0)
    steps = iter(range(10_000))

    def burst() -> float:
        started = time.perf_counter()
        training_step(model, optimizer, strategy, batch, step=next(steps), micro_batch=ROWS, precision="fp32",
                      max_norm=1.0, learning_rate_factor=0.1)
        return ROWS * CONTEXT / (time.perf_counter() - started)

    return burst


def theirs_train() -> Callable[[], float]:
    import torch

    model = theirs_model().train()
    _say_size(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids_BT = torch.randint(0, VOCAB, (ROWS, CONTEXT))

    def burst() -> float:
        started = time.perf_counter()
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ROWS * CONTEXT / (time.perf_counter() - started)

    return burst


def _decode_burst(start: Callable[..., Iterator[int]]) -> Callable[[], float]:
    """`start(prompt_BT)` reads a prompt and iterates over tokens; only decoding is timed, not the prompt."""
    import torch

    def burst() -> float:
        tokens = start(torch.randint(6, VOCAB, (1, PROMPT)))
        for _ in range(1 + WARM):
            next(tokens)
        started = time.perf_counter()
        for _ in range(DECODED):
            next(tokens)
        seconds = time.perf_counter() - started
        tokens.close()
        return DECODED / seconds

    return burst


def ours_decode(linear: str = "linear") -> Callable[[], float]:
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    import torch

    from tryplicity.inference.engine import decode, ready_for_decoding
    from tryplicity.inference.sampler import Sampler, Sampling

    _, _, model = ours_model(settings=[f"linear={{type: {linear}}}"])
    _say_size(model)
    if linear == "bitlinear":
        for module in model.modules():
            packed = module.pack() if hasattr(module, "pack") else None
            if packed:
                module.adopt(packed)
        model.embedding.hold(model.embedding.weight.detach().bfloat16(), None, torch.float32)
    ready_for_decoding(model)

    def start(prompt_BT) -> Iterator[int]:
        return decode(model, prompt_BT[0].tolist(), Sampler(Sampling(temperature=0)))

    return _decode_burst(start)


def ours_decode_ternary() -> Callable[[], float]:
    return ours_decode("bitlinear")


def theirs_decode() -> Callable[[], float]:
    import torch

    model = theirs_model().eval()
    _say_size(model)

    def start(prompt_BT) -> Iterator[int]:
        cache, ids_BT = None, prompt_BT
        while True:
            with torch.inference_mode():
                out = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids_BT = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                token = ids_BT.item()
            yield token

    return _decode_burst(start)


def theirs_decode_one_thread() -> Callable[[], float]:
    import torch

    torch.set_num_threads(1)
    return theirs_decode()


def _say_size(model) -> None:
    print(sum(p.numel() for p in model.parameters()), flush=True)


class Worker:
    """A process that holds one side and does one burst at a time when told to."""

    def __init__(self, side: str, module: str = "tests.benchmarks.hybrid", options: Sequence[str] = (),
                 python: str = sys.executable) -> None:
        self.process = subprocess.Popen([python, "-m", module, "--serve", side, *options],
                                        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.parameters = int(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker died with {self.process.wait()}; its error is above")
        return line

    def burst(self) -> float:
        """Tokens per second of one burst."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(burst: Callable[[], float]) -> None:
    """A worker's own loop: a burst for every line."""
    for _ in sys.stdin:
        print(burst(), flush=True)


def compare(what: str, pairs: int) -> None:
    """Alternate bursts and print each pair."""
    sides = {"train": ["ours_train", "theirs_train"],
             "decode": ["ours_decode", "theirs_decode", "theirs_decode_one_thread"],
             "decode-ternary": ["ours_decode_ternary", "theirs_decode", "theirs_decode_one_thread"]}[what]
    workers = [Worker(side) for side in sides]
    print(f"{what}, tokens per second; parameters: ours {workers[0].parameters:,}, "
          f"theirs {workers[1].parameters:,}")
    titles = ["ours", "transformers", "ratio", "on one thread", "ratio"][:2 * len(sides) - 1]
    print("".join(f"{title:>15}" for title in titles))
    for worker in workers:
        for _ in range(2):
            worker.burst()  # warm-up
    ratios: list[list[float]] = [[] for _ in sides[1:]]
    for pair in range(pairs):
        order = range(len(workers)) if pair % 2 == 0 else reversed(range(len(workers)))  # who is first has no edge
        speeds = {i: workers[i].burst() for i in order}
        line = f"{speeds[0]:15.1f}"
        for i, found in enumerate(ratios, 1):
            found.append(speeds[0] / speeds[i])
            line += f"{speeds[i]:15.1f}{found[-1]:15.2f}"
        print(line, flush=True)
    for side, found in zip(sides[1:], ratios, strict=True):
        print(f"ours / {side}: median {statistics.median(found):.2f}, min {min(found):.2f}, max {max(found):.2f}")
    print(flush=True)
    for worker in workers:
        worker.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["train", "decode", "decode-ternary"])
    parser.add_argument("--pairs", type=int, help="by default 8 for train, 20 for decoding")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(globals()[arguments.serve]())
        return
    for what in [arguments.what] if arguments.what else ["train", "decode", "decode-ternary"]:
        compare(what, arguments.pairs or (8 if what == "train" else 20))


if __name__ == "__main__":
    main()
