"""The real `datasets` streaming path, on local files; the Hub itself is never asked."""

import json
import os
import subprocess
import sys

import pytest

from tryplicity import UserError
from tryplicity_plugins.sources import huggingface
from tryplicity_plugins.sources.huggingface import HuggingFace


@pytest.fixture
def data_files(tmp_path):
    for part in range(2):
        rows = [{"text": f"row {part * 10 + i}", "n": i} for i in range(10)]
        (tmp_path / f"part{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "part*.jsonl")


def source(data_files, **options):
    return HuggingFace(HuggingFace.Config("json", data_files=data_files, **options))


def test_streams_all_rows_or_the_first_ones(data_files):
    documents = list(source(data_files).documents())
    assert [d.text for d in documents] == [f"row {i}" for i in range(20)]
    assert len({d.id for d in documents}) == 20 and documents[0].domain == "text"
    assert [d.text for d in source(data_files, limit=3).documents()] == ["row 0", "row 1", "row 2"]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a", None, "b"]}), tmp_path / "x.parquet")
    config = HuggingFace.Config("parquet", data_files=str(tmp_path / "x.parquet"), text_key="body",
                                domain="math")
    assert [(d.text, d.domain) for d in HuggingFace(config).documents()] == [("a", "math"), ("b", "math")]


class Flaky:
    """A stream that breaks off after some rows, the first few times it is read."""

    def __init__(self, stream, breaks, after):
        self.stream, self.breaks, self.after = stream, breaks, after

    def __iter__(self):
        for number, row in enumerate(self.stream):
            if self.breaks and number == self.after:
                self.breaks.pop()
                raise ConnectionError("connection reset")
            yield row

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("after", [0, 4, 7, 10])
def test_goes_on_where_it_stood_after_the_connection_broke(data_files, monkeypatch, after, every):
    waits, really = [], HuggingFace._open
    breaks = [1, 1]
    monkeypatch.setattr(huggingface, "_STATE_EVERY", every)
    monkeypatch.setattr(huggingface.time, "sleep", waits.append)
    monkeypatch.setattr(HuggingFace, "_open", lambda self: Flaky(really(self), breaks, after))
    assert [d.text for d in source(data_files).documents()] == [f"row {i}" for i in range(20)]
    # the waits grow only while nothing new comes through
    assert waits == ([2.0, 4.0] if after == 0 or every == 1000 else [2.0] * len(waits))
    assert len(waits) == (1 if after == 10 and every == 1 else 2)


def test_gives_up_after_the_retries_in_a_row(data_files, monkeypatch):
    waits = []
    monkeypatch.setattr(huggingface.time, "sleep", waits.append)

    def refuse(self):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HuggingFace, "_open", refuse)
    with pytest.raises(UserError, match=r"no route to host.*cannot be reached.*--data python-docs"):
        list(source(data_files, retries=3).documents())
    assert waits == [2.0, 4.0, 8.0]


def test_offline_is_told_at_once_and_in_a_line():
    program = ("from tryplicity import UserError\n"
               "from tryplicity_plugins.sources.huggingface import HuggingFace\n"
               "try:\n    list(HuggingFace(HuggingFace.Config('someone/something')).documents())\n"
               "except UserError as error:\n    print(error)\n")
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                             check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}).stdout
    assert printed.startswith("huggingface:someone/something: ") and printed.count("\n") == 1
    assert "the Hub cannot be reached" in printed and "--data python-docs" in printed


def test_wrong_names_are_told(data_files, tmp_path):
    with pytest.raises(UserError, match="row 0 has no text in the column 'body'; its columns are text, n"):
        list(source(data_files, text_key="body").documents())
    with pytest.raises(UserError, match="check dataset, name, split"):
        list(source(str(tmp_path / "nothing*.jsonl")).documents())
    with pytest.raises(UserError, match="check dataset, name, split"):
        list(source(data_files, split="validation").documents())


def test_the_fingerprint_follows_options_and_local_files(data_files, tmp_path):
    first = source(data_files).fingerprint()
    assert first == source(data_files, retries=9).fingerprint() != source(data_files, limit=5).fingerprint()
    (tmp_path / "part2.jsonl").write_text('{"text": "more"}\n')
    assert source(data_files).fingerprint() != first


def test_the_share_read_is_known_with_a_limit(data_files):
    limited = source(data_files, limit=4)
    assert [limited.read_share for _ in limited.documents()] == [0.25, 0.5, 0.75, 1.0]
    assert source(data_files).read_share is None
