"""What a tokenizer does with a text: bytes a token by domain, the pieces it hardly uses, whether all comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tryplicity.data.vocabulary import size_of, vocabulary_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tryplicity.components import Document

AT_ONCE = 64  # documents
RAREST = 20
#: how it parts what people ask about first; a probe each
PROBES = {"a number": "1234567.89", "a year": "in 2026,", "indentation": "\n        return x",
          "camel case": "getElementById", "accents": "déjà vu", "Chinese": "你好世界",
          "an emoji": "👍🏽", "white space": "a   b\t\tc"}


def inspect(tokenizer: Tokenizer, documents: Iterable[Document]) -> dict[str, Any]:
    """Counts over the documents: bytes and tokens by domain, tokens that never occur and the rarest that do, documents
    that do not come back as they were; and how the probes are parted."""
    by_domain: dict[str, Counter[str]] = {}
    used: Counter[int] = Counter()
    held: list[Document] = []
    unlike: list[str] = []

    def count() -> None:
        texts = [document.text for document in held]
        for document, encoding in zip(held, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            used.update(encoding.ids)
            by_domain.setdefault(document.domain, Counter()).update(
                documents=1, bytes=len(document.text.encode("utf-8", "replace")), tokens=len(encoding.ids))
            if tokenizer.decode(encoding.ids, skip_special_tokens=False) != document.text:
                unlike.append(document.id)
        held.clear()

    for document in documents:
        held.append(document)
        if len(held) == AT_ONCE:
            count()
    count()
    size, special = size_of(tokenizer), vocabulary_of(tokenizer).special
    whole = sum((Counter(counts) for counts in by_domain.values()), Counter())
    rarest = sorted((number, token) for token, number in used.items() if token not in special)[:RAREST]
    return {"vocab_size": size, **_figures(whole), "domains": {d: _figures(c) for d, c in sorted(by_domain.items())},
            "never_used": size - len(special) - sum(token not in special for token in used),
            "rarest": [{"token": tokenizer.decode([token]), "times": number} for number, token in rarest],
            "not_round_trip": unlike,
            "probes": {what: [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False).ids]
                       for what, text in PROBES.items()}}


def _figures(counts: Mapping[str, int]) -> dict[str, Any]:
    tokens = counts.get("tokens", 0)
    return {"documents": counts.get("documents", 0), "bytes": counts.get("bytes", 0), "tokens": tokens,
            "bytes_per_token": counts.get("bytes", 0) / tokens if tokens else None}


def page(said: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{said['vocab_size']:,} tokens; {said['never_used']:,} of them are never used in this text", "",
             f"{'domain':<12}{'documents':>12}{'MB':>10}{'tokens':>14}{'bytes/token':>13}"]
    for domain, own in (*said["domains"].items(), ("all", said)):
        rate = "-" if own["bytes_per_token"] is None else f"{own['bytes_per_token']:.2f}"
        lines.append(f"{domain:<12}{own['documents']:>12,}{own['bytes'] / 1e6:>10,.2f}{own['tokens']:>14,}{rate:>13}")
    back = "every document comes back as it was" if not said["not_round_trip"] else (
        f"{len(said['not_round_trip']):,} documents do not come back as they were, such as {said['not_round_trip'][0]}")
    lines += ["", back, "", "how it parts", *(f"  {what:<14}{' | '.join(map(repr, parts))}"
                                            for what, parts in said["probes"].items())]
    lines += ["", "the rarest", "  " + "  ".join(f"{one['token']!r} {one['times']}" for one in said["rarest"])]
    return "\n".join(lines)
