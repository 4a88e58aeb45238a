"""Going on with a run: the same data from another place is the same, other data is refused unless it is wanted."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

SPEC = str(Path(__file__).parents[1] / "small.yaml")


@pytest.fixture
def train(tmp_path, monkeypatch):
    from tryplicity.cli import main

    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRYPLICITY_TENSORBOARD", "0")

    def run(data, steps, *options):
        return CliRunner().invoke(main, ["train", SPEC, "--hw", "cpu", "--set", "hardware.batch=2", "--data", str(data),
                                         "--run", str(tmp_path / "run"), "--steps", str(steps), *options])

    return run


def test_a_copy_is_the_same_data_and_other_data_is_wanted_or_refused(train, corpus, tmp_path):
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    (texts / "setup.cfg").write_text("passed over")
    begun = train(texts, 2)
    assert begun.exit_code == 0, begun.output
    said = "files: left out 1 item: 1 of another kind (.cfg) (setup.cfg)"
    assert said in begun.output
    assert json.loads((tmp_path / "run" / "data.json").read_text())["left_out"] == {
        "data": {"of another kind (.cfg)": 1}}
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(texts, copy)
    shutil.rmtree(texts)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    gone_on = train(f"{copy}/", 3, "--resume")
    assert gone_on.exit_code == 0 and said in gone_on.output, gone_on.output

    (copy / "00.txt").write_text("another text altogether")
    refused = train(copy, 4, "--resume")
    assert refused.exit_code == 2 and "belongs to another data set" in refused.output
    assert "--other-data" in refused.output
    wanted = train(copy, 4, "--resume", "--other-data")
    assert wanted.exit_code == 0, wanted.output
    assert train(copy, 5, "--resume").exit_code == 0        # it is the run's data from now on
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5]
