"""Sources over a real connection: busy servers, cut connections, licences; nothing is lost in silence."""

import json
import os
import subprocess
import sys

import datasets
import pytest

from tests.corpus.http_server import serving
from tryplicity.corpus import shards
from tryplicity.corpus.download import download
from tryplicity.corpus.recipe import Portion, Recipe
from tryplicity.errors import Unreachable, UserError
from tryplicity.parts import Part
from tryplicity_plugins.sources.huggingface import HuggingFace, _seconds

ROWS = [f"row {n} of a text from afar {'x' * 200}" for n in range(400)]
BODY = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def at_once(monkeypatch, tmp_path):
    """What `datasets` waits by itself is not what is tested."""
    for name in ("READ", "OPEN", "READ_RATE_LIMIT", "READ_SERVER_UNAVAILABLE"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 20)      # put back behind a download


def recipe(url, shard_mb=0.02):
    source = Part(HuggingFace, HuggingFace.Config("json", data_files=url))
    return Recipe("far", 1e9, [Portion(source)], shard_mb=shard_mb)


def fetched(folder):
    return [d.text for path in shards.shards(folder / "raw" / "huggingface") for d, _ in shards.read_shard(path)]


def no_progress(what, done, total):
    pass


@pytest.mark.parametrize("answers", [[429, 429], [503, 503], ["cut"]], ids=str)
def test_a_busy_server_and_a_cut_connection_are_tried_again_and_every_row_comes_once(tmp_path, answers):
    said, busy = [], answers[0] != "cut"
    with serving(BODY, answers) as (url, _):
        done = download(recipe(url), tmp_path / "c", no_progress, waits=(0.0, 0.0), say=said.append)
    assert done.states["huggingface"].done and fetched(tmp_path / "c") == ROWS and not answers
    if busy:        # then it waits as long as the server wishes, which is longer than ours
        assert said and all("is busy, or down (status" in line and "trying again in 0.3 s" in line for line in said)


@pytest.mark.parametrize("status", [429, 503])
def test_one_that_is_busy_in_the_middle_is_waited_for_as_long_as_it_asks(tmp_path, status):
    """The file is longer than what is asked for at once; of its first part more is read than fills a shard."""
    long = [f"{n} {'y' * 45_000}" for n in range(600)]
    body = "".join(json.dumps({"text": row}) + "\n" for row in long).encode()
    answers, said = [(status, 20_900_000)] * 2, []
    with serving(body, answers) as (url, _):
        done = download(recipe(url, shard_mb=1), tmp_path / "c", no_progress, waits=(0.0, 0.0), say=said.append)
    assert done.states["huggingface"].done and fetched(tmp_path / "c") == long and not answers
    assert len(said) == 2 and all(f"(status {status})" in line and "trying again in 0.3 s" in line for line in said)


def test_one_that_stays_busy_ends_with_its_status_and_keeps_what_is_there(tmp_path):
    with serving(BODY, [503] * 1000) as (url, _), pytest.raises(
            UserError, match=r"the server is busy, or down \(status 503\).*\(tried 3 times; what is there is kept"):
        download(recipe(url), tmp_path / "c", no_progress, waits=(0.0, 0.0))


def test_what_is_not_there_is_no_reason_to_wait(tmp_path):
    for status, why in ((404, "check dataset, name, split"), (403, "not without a login, or a licence")):
        with serving(BODY, [status] * 100) as (url, _), pytest.raises(UserError, match=why) as caught:
            list(HuggingFace(HuggingFace.Config("json", data_files=url)).documents())
        assert not isinstance(caught.value, Unreachable)


def test_a_disk_that_fills_up_is_told_and_what_is_there_is_kept(tmp_path):
    """As far as a file may grow: 15 kB, so that the second shard, which is larger, cannot be written."""
    import resource

    few = "".join(json.dumps({"text": text}) + "\n" for text in [*map(str, range(9)), "x" * 30_000])
    long = "".join(json.dumps({"text": os.urandom(20_000).hex()}) + "\n" for _ in range(3))
    with serving((few + long).encode(), []) as (url, _):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
        try:
            with pytest.raises(UserError, match=r"part-00001\.parquet: cannot be written \(File too large\); free"):
                download(recipe(url), tmp_path / "c", no_progress)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        there = (tmp_path / "c" / "raw" / "huggingface").iterdir()
        assert [path.name for path in there if path.suffix == ".parquet"] == [
            "part-00000.parquet"]
        done = download(recipe(url), tmp_path / "c", no_progress)
    assert done.states["huggingface"].documents == 13 and len(fetched(tmp_path / "c")) == 13


def test_how_long_a_server_asks_to_wait():
    assert _seconds("7") == 7 and _seconds(None) == _seconds("soon") == _seconds("-3") == 0
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and _seconds("Wed, 21 Oct 2122 07:28:00 GMT") > 1e6


def test_a_licence_and_a_login_are_told_before_anything_is_fetched(tmp_path):
    """Against a Hub of our own, since the library reads its address when it is loaded."""
    hub = {"/api/datasets/they/gated/auth-check": (403, {"X-Error-Code": "GatedRepo"}, b"{}"),
           "/api/datasets/they/private/auth-check": (401, {"X-Error-Code": "RepoNotFound"}, b"{}"),
           "/api/datasets/they/open/auth-check": (200, {}, b"{}")}
    (tmp_path / "r.yaml").write_text("name: r\nbytes: 4e6\nsources:\n" + "".join(
        f"  - {{name: {name}, source: {{type: huggingface, dataset: {dataset}}}}}\n" for name, dataset in (
            ("gated", "they/gated"), ("private", "json, data_files: 'hf://datasets/they/private/*.json'"),
            ("open", "they/open"))))
    with serving(b"", [], hub) as (url, seen):
        environment = {**os.environ, "HF_ENDPOINT": url.rsplit("/", 1)[0], "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment.pop("HF_HUB_OFFLINE", None)

        def call(*more):
            return subprocess.run([sys.executable, "-m", "tryplicity.cli", "data", "download", "r.yaml", "--out", "c",
                                   *more], cwd=tmp_path, env=environment, capture_output=True, text=True)

        dry, real = call("--dry-run", "--json"), call()
    said = json.loads(dry.stdout)
    assert dry.returncode == 0 and said["bytes"] == 4_000_000 and set(said["not_ready"]) == {"gated", "private"}
    assert "accept them at https://huggingface.co/datasets/they/gated, and log in" in said["not_ready"]["gated"]
    assert real.returncode == 2 and "Traceback" not in real.stderr
    assert "gated: huggingface:they/gated: its owner gives it" in real.stderr and "or it is private" in real.stderr
    assert not (tmp_path / "c" / "raw").exists() and all(path in hub for path, _ in seen)
