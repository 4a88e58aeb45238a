"""Decoding speed at batch 1, on random weights.

    python -m tests.benchmarks.decode --spec 5090 [--bursts 6]        ternary, bf16, and transformers, in turn
    python -m tests.benchmarks.decode --spec full --packed FILE       one exported model: load, memory, speed, the bound

The first compares the spec with ternary linears packed as an exported model has them, the same spec with plain bf16
linears through the same engine, and transformers' GraniteMoeHybridForCausalLM in bf16 of the same layers, widths and
experts; what its config cannot say is left out of it (several residual streams, ternary weights, the router's kind).
Each side is a process of its own, and short bursts alternate, so that a drift in the machine's speed meets all alike.

The bound is how many bytes of weights a token needs, divided by how fast one stream of reads through memory is here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

from tests.benchmarks.hybrid import Worker, _say_size, serve

PROMPT, WARM, DECODED = 16, 3, 12  # tokens read, decoded untimed, decoded timed
SIDES = ("ternary", "bf16", "transformers")


def load(name: str, settings: Sequence[str] = ()):
    from tryplicity import load_plugins
    from tryplicity.spec import load_spec

    return load_spec(name, load_plugins().registry, settings)


def fill(model, dtype) -> None:
    """Initial values for what is not packed."""
    import torch

    model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        torch.manual_seed(0)
        for module in model.modules():
            if hasattr(module, "reset_parameters") and getattr(module, "matrix", None) is None:
                module.reset_parameters()


def ternary(name: str):
    """The model of a spec, every packable linear with random digits; none of its weights was ever a float."""
    import torch

    from tryplicity.model import assemble

    model = assemble(load(name))
    parameters = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if getattr(module, "packed_bits", 16) < 2:
            *stack, out, columns = module.weight.shape
            module.adopt({"weight_ternary": torch.randint(243, (*stack, out, -(-columns // 5)), dtype=torch.uint8),
                          "weight_scale": torch.full((*stack, 1, 1), 0.02)})
    fill(model, torch.float32)
    model.embedding.hold(model.embedding.weight.detach().bfloat16(), None, torch.float32)
    return model, parameters


def bf16(name: str):
    import torch

    from tryplicity.model import assemble

    model = assemble(load(name, ["linear={type: linear}"]))
    fill(model, torch.bfloat16)
    return model, sum(p.numel() for p in model.parameters())


def transformers_of(name: str):
    """GraniteMoeHybrid of the spec's shape."""
    import torch
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    spec = load(name)
    mixers = [block.mixer for block in spec.layers]
    mamba = next(mixer.config for mixer in mixers if mixer.name == "mamba2")
    attention = next(mixer.config for mixer in mixers if mixer.name == "gqa")
    experts = spec.layers[0].feed_forward.config
    active = getattr(experts.router.config, "mean_experts", experts.top_k)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=experts.inner_size,
        shared_intermediate_size=experts.shared_experts * (experts.shared_inner_size or experts.inner_size),
        num_hidden_layers=len(mixers),
        layer_types=["attention" if mixer.name == "gqa" else "mamba" for mixer in mixers],
        num_attention_heads=attention.heads, num_key_value_heads=attention.kv_heads or attention.heads,
        num_local_experts=experts.experts, num_experts_per_tok=round(active),
        mamba_n_heads=spec.hidden_size * mamba.expand // mamba.head_dim, mamba_d_head=mamba.head_dim,
        mamba_d_state=mamba.state_size, mamba_n_groups=mamba.groups, mamba_expand=mamba.expand,
        mamba_d_conv=mamba.conv_width, tie_word_embeddings=spec.tied_embeddings, position_embedding_type="rope",
        max_position_embeddings=spec.context_length)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def our_burst(model) -> Callable[[], float]:
    """Tokens per second of one burst."""
    import torch

    from tryplicity.inference.engine import decode
    from tryplicity.inference.sampler import Sampler, Sampling

    vocabulary = model.spec.vocab_size

    def burst() -> float:
        tokens = decode(model, torch.randint(6, vocabulary, (PROMPT,)).tolist(), Sampler(Sampling(temperature=0)))
        for _ in range(1 + WARM):
            next(tokens)
        started = time.perf_counter()
        for _ in range(DECODED):
            next(tokens)
        seconds = time.perf_counter() - started
        tokens.close()
        return DECODED / seconds

    return burst


def their_burst(model) -> Callable[[], float]:
    import torch

    def burst() -> float:
        cache, ids_BT = None, torch.randint(6, model.config.vocab_size, (1, PROMPT))
        with torch.inference_mode():
            for step in itertools.count():
                if step == 1 + WARM:
                    started = time.perf_counter()
                if step == 1 + WARM + DECODED:
                    return DECODED / (time.perf_counter() - started)
                out = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids_BT = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                ids_BT.tolist()

    return burst


def side(which: str, name: str) -> Callable[[], float]:
    """A worker's: makes its model, says how many parameters it has, and gives the burst."""
    if which == "transformers":
        model = transformers_of(name)
        _say_size(model)
        return their_burst(model)
    from tryplicity.inference.engine import ready_for_decoding
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    model, parameters = {"ternary": ternary, "bf16": bf16}[which](name)
    print(parameters, flush=True)
    return our_burst(ready_for_decoding(model))


def compare(name: str, bursts: int) -> None:
    workers = [Worker(which, module="tests.benchmarks.decode", options=["--spec", name]) for which in SIDES]
    print(f"{name}, tokens per second at batch 1; parameters: "
          + ", ".join(f"{which} {worker.parameters:,}" for which, worker in zip(SIDES, workers, strict=True)))
    print("".join(f"{which:>14}" for which in SIDES) + "".join(f"{f'/ {which}':>16}" for which in SIDES[1:]))
    for worker in workers:
        worker.burst()  # warm-up
    found: list[list[float]] = []
    for burst in range(bursts):
        order = range(len(workers)) if burst % 2 == 0 else reversed(range(len(workers)))
        speeds = {i: workers[i].burst() for i in order}
        found.append([speeds[0], *(speeds[0] / speeds[i] for i in range(1, len(workers)))])
        print("".join(f"{speeds[i]:14.2f}" for i in range(len(workers)))
              + "".join(f"{ratio:16.2f}" for ratio in found[-1][1:]), flush=True)
    for i, which in enumerate(SIDES[1:], 1):
        ratios = [row[i] for row in found]
        print(f"ternary / {which}: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, "
              f"max {max(ratios):.2f}")
    for worker in workers:
        worker.close()


def stream_rate() -> float:
    """Bytes per second that reading alone reaches, with all threads."""
    import torch

    data = torch.ones(1 << 27, dtype=torch.int32)  # 512 MB, more than any cache
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        data.sum(dtype=torch.int32)
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def peak_memory() -> int:
    """Bytes: VmHWM of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def exported(path: str, bursts: int) -> None:
    from tryplicity import load_plugins
    from tryplicity.inference.engine import ready_for_decoding
    from tryplicity.inference.packed import load_model
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    registry = load_plugins().registry
    started = time.perf_counter()
    model, _, _, info = load_model(path, registry)
    ready_for_decoding(model)
    seconds = time.perf_counter() - started
    burst = our_burst(model)
    burst()
    speeds = [burst() for _ in range(bursts)]
    peak, rate = peak_memory(), stream_rate()  # the stream's own memory does not count
    bound = rate / info.packed_bytes_per_token
    print(f"{info.name} ({info.format}): {info.parameters:,} parameters, {info.active_parameters:,} at work on a token")
    print(f"loaded in {seconds:.1f} s; peak memory {peak / 1e9:.2f} GB")
    print(f"{statistics.median(speeds):.2f} tokens/s (of {bursts} bursts: {min(speeds):.2f} to {max(speeds):.2f})")
    print(f"bound: {info.packed_bytes_per_token / 1e9:.2f} GB of packed weights a token at {rate / 1e9:.1f} GB/s: "
          f"{bound:.2f} tokens/s; reached {statistics.median(speeds) / bound:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", default="5090")
    parser.add_argument("--packed", help="an exported model; measured alone")
    parser.add_argument("--bursts", type=int, default=6)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(side(arguments.serve, arguments.spec))
    elif arguments.packed:
        exported(arguments.packed, arguments.bursts)
    else:
        compare(arguments.spec, arguments.bursts)


if __name__ == "__main__":
    main()
