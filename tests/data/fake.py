"""Token files without a text behind them, as large as one likes: the tokens are a hole in a file."""

import json

import numpy as np

from tryplicity.data.packing import DOCUMENT, TokenFile

DOMAINS = ("code", "math", "text")
AT_ONCE = 1 << 18


def fake_tokens(folder, documents, mean=50, real=False):
    """Documents of half to one and a half times `mean` tokens, in three domains in turn. real: each token is another
    one, its place in the file."""
    folder.mkdir(parents=True, exist_ok=True)
    end = 0
    index = np.lib.format.open_memmap(folder / "train.documents.npy", "w+", DOCUMENT, (documents,))
    for first in range(0, documents, AT_ONCE):
        some = index[first:first + AT_ONCE]
        number = np.arange(first, first + len(some))
        ends = np.cumsum(number * 7919 % (mean + 1) + mean // 2) + end
        some["end"], some["bytes"], some["domain"] = ends, 4 * mean, number % len(DOMAINS)
        end = int(ends[-1])
    index.flush()
    if real:
        np.arange(end, dtype="<u4").tofile(folder / "train.bin")
    else:
        with open(folder / "train.bin", "wb") as file:
            file.truncate(2 * end)
    np.save(folder / "token_bytes.npy", np.full(end if real else 65536, 4, np.uint32))
    manifest = {"parts": {"train": {"tokens": end}}, "domains": DOMAINS, "dtype": "<u4" if real else "<u2"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenFile(folder, "train")
