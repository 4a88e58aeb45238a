"""The real `datasets` streaming path, on local files; the Hub itself is never asked."""

import json
import os
import subprocess
import sys

import pytest

from tryplicity import UserError
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


def test_datasets_itself_asks_again_after_the_connection_broke(tmp_path, monkeypatch):
    """What this project leaves to the library: a file whose reading breaks off is read on, and no row is lost."""
    import datasets
    import fsspec
    from fsspec.implementations.local import LocalFileSystem
    from huggingface_hub.utils import httpx

    breaks = [1, 1, 1]

    class Flaky(LocalFileSystem):
        protocol = "flaky"

        @classmethod
        def _strip_protocol(cls, path):
            return LocalFileSystem._strip_protocol("/" + path.removeprefix("flaky:").lstrip("/"))

        def unstrip_protocol(self, name):
            return f"flaky://{self._strip_protocol(name)}"

        def _open(self, path, mode="rb", **options):
            file = super()._open(path, mode, **options)
            read, times = file.read, []

            def sometimes(*size):
                times.append(1)
                if breaks and len(times) > 1:
                    breaks.pop()
                    raise httpx.ReadError("connection reset")
                return read(*size)

            file.read = sometimes
            return file

    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(500)))
    documents = list(source(f"flaky://{tmp_path}/x.jsonl").documents())
    assert [d.text for d in documents] == [f"row {i}" for i in range(500)] and not breaks


def test_odd_rows_stop_with_their_place_or_are_counted(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": ""}, {"text": "b"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty = source(str(tmp_path / "x.jsonl"))
    assert [d.text for d in empty.documents()] == ["a", "b"] and empty.left_out.as_dict() == {"empty": 2}
    odd = source(str(tmp_path / "x.jsonl"), bad_rows="skip", text_key="body", limit=3)
    assert not list(odd.documents()) and str(odd.left_out) == (
        "left out 3 items: 3 with no text under the key 'body' (row 0, row 1, row 2)")


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
    with pytest.raises(UserError, match=r"row 0: no text under the key 'body': its keys are text, n; .*bad_rows"):
        list(source(data_files, text_key="body").documents())
    with pytest.raises(UserError, match="check dataset, name, split"):
        list(source(str(tmp_path / "nothing*.jsonl")).documents())
    with pytest.raises(UserError, match="check dataset, name, split"):
        list(source(data_files, split="validation").documents())


def test_the_fingerprint_follows_options_and_local_files(data_files, tmp_path):
    first = source(data_files).fingerprint()
    assert first == source(data_files).fingerprint() != source(data_files, limit=5).fingerprint()
    (tmp_path / "part2.jsonl").write_text('{"text": "more"}\n')
    second = source(data_files).fingerprint()
    assert second != first
    # a pattern over folders, and a data set that is a folder of this machine
    (tmp_path / "a" / "b").mkdir(parents=True)
    ways = [lambda: source(f"{tmp_path}/*/*/x.jsonl"), lambda: source(f"{tmp_path}/**/x.jsonl"),
            lambda: HuggingFace(HuggingFace.Config(str(tmp_path / "a")))]
    before = [way().fingerprint() for way in ways]
    (tmp_path / "a" / "b" / "x.jsonl").write_text('{"text": "new"}\n')
    after = [way().fingerprint() for way in ways]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert [d.text for d in ways[2]().documents()] == ["new"]


def test_the_share_read_is_known_with_a_limit(data_files):
    limited = source(data_files, limit=4)
    assert [limited.read_share for _ in limited.documents()] == [0.25, 0.5, 0.75, 1.0]
    assert source(data_files).read_share is None
