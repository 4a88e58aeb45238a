"""docs/published.md: the page about published models, its tables made from the specs and the architectures."""

from __future__ import annotations

from collections import Counter

from tryplicity import load_plugins
from tryplicity.model import assemble
from tryplicity.planner.count import count
from tryplicity.reference import described
from tryplicity.spec import installed_files, load_spec

TEXT = """# Published models

Made by `python -m tests.generated`.

## As specs

`tryplicity build published/granite-4.0-h-tiny --hw 5090` answers for each of these; with `base:` a spec starts from one
and says what differs:

```yaml
base: published/granite-4.0-h-tiny
name: granite-with-windows
blocks: {attention: {mixer: {window: 4096}}}
```

Mappings are laid over each other key by key, lists are replaced, and a part of another `type` replaces the whole part;
`expect` is not taken over. The base may be a file, too, and may have a base itself.

%s
Totals are those of transformers' own model, to the parameter; active are all but the experts that a token does not
choose, the embedding table included. So count the cards of Qwen3-30B-A3B (3.3B of 30.5B), OLMoE (1.3B of 6.9B) and
Jamba (12B of 52B), too; Granite 4.0 H Tiny's says 1B of 7B, which is 1.31B without the table, in whole billions.

## Weights in and out

    tryplicity import FOLDER --run runs/smollm2
    tryplicity generate runs/smollm2 --chat "What is a tuple?"
    tryplicity serve runs/smollm2
    tryplicity export runs/smollm2 --format transformers --out smollm2-again
    tryplicity export runs/smollm2 --format gguf --out smollm2.gguf

`import` reads a folder in transformers' form (config.json, safetensors in one file or in shards, tokenizer.json) or a
GGUF file of a Llama with a byte-level tokenizer (`pip install "tryplicity[gguf]"`; whatever it is quantised to becomes
floats again). The run has the model's own tokenizer, special tokens and chat template. Every tensor has its place: one
too many, too few or of another shape is an error, and nothing is left behind. Tensors keep their dtype and go through
one at a time. `export --format transformers` writes a run that was imported as transformers reads it, the tensors the
same, bit for bit; and one that was trained here, from an imported one or from nothing, where its spec is that of a
`llama`, `mistral`, `qwen2`, `qwen3`, `olmo2`, `mixtral`, `qwen3_moe` or `olmoe` (routers that score by softmax), heads
and objectives left out. `--format gguf` writes a Llama for llama.cpp, its matrices as they are and not quantised.

| model_type | |
|---|---|
%s
What is not read, and said so: Gemma (norms whose weights count from one), BitNet whose weights are packed already,
Nemotron 3 with latent experts or several predicted tokens, Zamba2 with a context extended by other positions;
of GGUF other architectures than Llama, scaled positions (Llama 3.1 and later) and SentencePiece's tokenizers; folders
without a tokenizer.json; pickles. What is not written: runs of any other spec; as GGUF, tokenizers that llama.cpp has
no name for, those trained here among them.

Another architecture is a plugin: a class that says how its config.json reads as a spec, and which tensor goes where
(`tryplicity.Architecture`; the contract is in its docstring):

```python
from tryplicity import Architecture, Piece, hookimpl, turned


class Tiny(Architecture):
    name = "tiny"  # the model_type of its config.json

    @classmethod
    def spec(cls, config):
        mixer = {"type": "gqa", "heads": config["heads"], "head_dim": 32}
        return {"vocab_size": config["vocab_size"], "hidden_size": config["hidden_size"], "context_length": 2048,
                "blocks": {"look": {"mixer": mixer}}, "layers": [{"repeat": config["layers"], "of": "look"}]}

    @classmethod
    def tensors(cls, config):
        yield Piece("embed.weight", "embedding.weight")
        yield Piece("norm.weight", "norm.weight")
        rows = config["heads"] * 32
        for i in range(config["layers"]):
            yield Piece(f"{i}.norm.weight", f"layers.{i}.mixer.norm.weight")
            yield Piece(f"{i}.q.weight", f"layers.{i}.mixer.layer.qkv.weight", slice(0, rows), turned(32))
            yield Piece(f"{i}.k.weight", f"layers.{i}.mixer.layer.qkv.weight", slice(rows, 2 * rows), turned(32))
            yield Piece(f"{i}.v.weight", f"layers.{i}.mixer.layer.qkv.weight", slice(2 * rows, 3 * rows))
            yield Piece(f"{i}.o.weight", f"layers.{i}.mixer.layer.out.weight")


@hookimpl
def tryplicity_components():
    return [Tiny]
```
"""


def page() -> str:
    registry = load_plugins().registry
    rows = ["| spec | layers | parameters | active on a token |", "|---|---|---:|---:|"]
    for name in sorted(name for name in installed_files("spec") if name.startswith("published/")):
        spec = load_spec(name, registry)
        counts = count(assemble(spec))
        kinds = Counter(" + ".join(part.name for part in (block.mixer, block.feed_forward) if part is not None)
                        for block in spec.layers)
        layers = ", ".join(f"{times} {kind}" for kind, times in kinds.items())
        rows.append(f"| `{name}` | {layers} | {counts.total:,} | {counts.active:,.0f} |")
    known = [f"| `{name}` | {described(registry.get('architecture', name))} |"
             for name in sorted(registry.names("architecture"))]
    return TEXT % ("\n".join(rows) + "\n", "\n".join(known) + "\n")
