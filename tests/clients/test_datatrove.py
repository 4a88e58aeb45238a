"""The filter by datatrove's own executors, as `make clients` installs them: the same shards as without it."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus.stories import story

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".venv-clients" / "datatrove"
PLUGIN = ROOT / "tests" / "corpus" / "long_words.py"

#: stands for a cluster: each job is checked, and its tasks are run one after another before the next is taken
SBATCH = """#!/bin/bash
script="${@: -1}"
bash -n "$script" || exit 1
count=$(ls "$JOBS" | wc -l)
cp "$script" "$JOBS/$count.sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
case "$*" in *dependency=*) echo "$@" > "$JOBS/$count.depends";; esac
if ! grep -q merge_stats "$script"; then
    for i in $(seq 0 "$last"); do
        SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here RUN_OFFSET=0 bash "$script" >> "$JOBS/out.log" 2>&1 || exit 1
    done
fi
echo "Submitted batch job $count"
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """datatrove and Ray from their own place, everything else from here."""
    packages, = INSTALLED.glob("lib/python*/site-packages")
    assert (packages / "datatrove").exists(), f"{packages} has no datatrove; `make clients` installs it"
    tools = tmp_path_factory.mktemp("tools")
    (tools / "sbatch").write_text(SBATCH)
    (tools / "scontrol").write_text("#!/bin/bash\necho here\n")
    (tools / "launch_pickled_pipeline").write_text(
        f'#!/bin/bash\nexec "{sys.executable}" -m datatrove.tools.launch_pickled_pipeline "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    jobs = tmp_path_factory.mktemp("jobs")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]), "JOBS": str(jobs),
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def tryplicity(environment, *line):
    done = subprocess.run([sys.executable, "-m", "tryplicity.cli", "data", *line, "--plugin", str(PLUGIN)],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def corpora(environment, tmp_path_factory):
    """A downloaded corpus with copies, another language and bad documents; and one that was filtered without it."""
    place = tmp_path_factory.mktemp("corpora")
    texts = place / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number:03d}.txt").write_text(story(number))
    (texts / "960.txt").write_text(story(5))
    (texts / "970.txt").write_text("Der Fluss entspringt in den Bergen oberhalb des Dorfes und ist recht schmal. " * 3)
    (texts / "980.txt").write_text("12 34 56 78 90 " * 40)
    recipe = place / "recipe.yaml"
    recipe.write_text("name: small\nbytes: 1e9\nshard_mb: 0.01\nlanguages: [en]\nsources: [{name: stories, source: "
                      "{type: files, path: texts}}]\njudges: [{judge: statistical}, "
                      "{judge: long_words, keep_top: 0.8}]")
    tryplicity(environment, "download", str(recipe), "--out", str(place / "raw"))
    shutil.copytree(place / "raw", place / "plain")
    tryplicity(environment, "filter", str(place / "plain"), "--workers", "1")
    return place


def shards_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for part in ("filtered", "work")
            for path in sorted((folder / part).iterdir()) if path.is_file()}


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_an_executor_gives_the_same_shards(environment, corpora, executor):
    folder = corpora / executor
    shutil.copytree(corpora / "raw", folder)
    said = tryplicity(environment, "filter", str(folder), "--executor", executor, "--tasks", "2",
                      *(["--executor-option", "mem_per_cpu_gb=0.5"] if executor == "ray" else []))
    assert "small: kept" in said
    assert shards_of(folder) == shards_of(corpora / "plain") and len(shards_of(folder)) > 10
    assert (folder / "report.json").read_text() == (corpora / "plain" / "report.json").read_text()


def test_what_was_begun_without_it_is_gone_on_with(environment, corpora):
    folder = corpora / "cut"
    shutil.copytree(corpora / "plain", folder)
    for path in [*sorted((folder / "work").glob("stories-*.json"))[2:], folder / "filtered" / "manifest.json"]:
        path.unlink()
    kept = sorted((folder / "work").glob("stories-*.json"))
    before = [path.stat().st_mtime_ns for path in kept]
    tryplicity(environment, "filter", str(folder), "--executor", "local", "--tasks", "3")
    assert shards_of(folder) == shards_of(corpora / "plain")
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_slurm_gets_scripts_that_run_in_their_order(environment, corpora):
    folder = corpora / "slurm"
    shutil.copytree(corpora / "raw", folder)
    options = [word for option in ("partition=cpu", "time=01:00:00", "with_srun=false", "qos=null")
               for word in ("--executor-option", option)]
    said = tryplicity(environment, "filter", str(folder), "--executor", "slurm", "--tasks", "2", *options)
    assert "its jobs are with Slurm" in said
    jobs = Path(environment["JOBS"])
    scripts = [path.read_text() for path in sorted(jobs.glob("*.sh"), key=lambda path: int(path.stem))]
    names = [line for script in scripts for line in script.splitlines() if "job-name" in line and "merge" not in script]
    assert names == [f"#SBATCH --job-name=filter-{name}" for name in ("sign", "settle", "judge", "finish")]
    assert all("#SBATCH --partition=cpu" in script and "#SBATCH --time=01:00:00" in script for script in scripts)
    assert len(list(jobs.glob("*.depends"))) == 3  # each stage on the one before
    assert shards_of(folder) == shards_of(corpora / "plain")


def test_an_option_that_datatrove_does_not_have(environment, corpora):
    done = subprocess.run([sys.executable, "-m", "tryplicity.cli", "data", "filter", str(corpora / "raw"), "--executor",
                           "slurm", "--executor-option", "partion=cpu", "--plugin", str(PLUGIN)], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "SlurmPipelineExecutor has no such option; it has" in done.stderr
