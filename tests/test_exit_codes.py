"""What the command ends with: 0, 1 (the answer is no), 2 (the input is wrong), 3 (a part failed), 130, 143."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.command_line import call
from tryplicity.cli import main

ROOT = Path(__file__).parents[1]
SMALL = str(ROOT / "tests" / "small.yaml")


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "tryplicity.cli", *arguments], capture_output=True, timeout=120,
                          **{"cwd": ROOT, **options})


def test_nobody_reads_the_page_and_the_verdict_is_the_same():
    """The pipe is closed before a word is written: `build ... | head -1` at its quickest."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run([sys.executable, "-m", "tryplicity.cli", "build", "tests/small.yaml", "--hw", "cpu",
                               "--set", "hardware.memory_gb=1e-3"], stdout=closed, stderr=subprocess.PIPE, timeout=120,
                              cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_closed_pipe_within_one_process(capfd, monkeypatch):
    """Through click's own writing, and through rich's."""
    class Closed:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def isatty(self):
            return False

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    for arguments, code in ((["--help"], 0), (["schema"], 0), (["build", SMALL, "--hw", "cpu"], 0),
                            (["build", SMALL, "--hw", "cpu", "--set", "hardware.memory_gb=1e-3"], 1)):
        monkeypatch.setattr(sys, "stdout", Closed())
        with pytest.raises(SystemExit) as end:
            main(arguments)
        monkeypatch.undo()
        assert (end.value.code or 0) == code, arguments


@pytest.mark.parametrize("arguments", [
    ["build", "a" * 5000, "--hw", "cpu"], ["build", SMALL, "--hw", "b" * 5000], ["build", "a\0b", "--hw", "cpu"],
    ["build", SMALL + "/x", "--hw", "cpu"], ["build", "/", "--hw", "cpu"], ["generate", "c" * 5000, "x"],
    ["export", "c" * 5000], ["brain", "c" * 5000], ["bild"], ["build"], ["--nonsense"],
    ["train", SMALL, "--hw", "cpu", "--run", "d" * 5000, "--steps", "1"],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--steps", "1", "--data", "e" * 5000],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--tokens", "nan"],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--tokens", "inf"],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--tokens", "1e400"],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--tokens", "2.5"],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--minutes", "nan"],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--minutes", "-inf"],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--minutes", "0"],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--steps", "1" * 400],
    ["train", SMALL, "--hw", "cpu", "--run", "x", "--steps", "1", "--set", "training.seed=1e20"],
    ["ablate", SMALL, "--hw", "cpu", "--without", "gqa", "--tokens", "nan", "--out", "x"],
    ["quickstart", "--minutes", "nan"], ["generate", "x", "y", "--seed", "99999999999999999999"],
    ["generate", "x", "y", "--temperature", "nan"], ["generate", "x", "y", "--top-p", "nan"],
    ["generate", "x", "y", "--repetition-penalty", "inf"],
], ids=lambda a: " ".join(word[:20] for word in a[-3:]))
def test_wrong_input_ends_with_2(capfd, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capfd, *arguments)
    assert code == 2 and err


def test_what_no_option_can_be_is_not_written(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(capfd, "train", SMALL, "--hw", "cpu", "--run", "x", "--tokens", "nan")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_where_the_answer_goes_is_said(unbuffered):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-m", "tryplicity.cli", "schema", "--hardware"], stdout=full,
                              stderr=subprocess.PIPE, timeout=120, cwd=ROOT,
                              env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2 and b"No space left" in done.stderr and b"Traceback" not in done.stderr


COMMANDS = """\
import click, sys
from tryplicity import PluginFault, UserError, hookimpl

@click.command()
@click.option("--how", default="well")
def mine(how):
    '''Mine.'''
    ends = {"user": UserError("wrong"), "fault": PluginFault("broken"), "raise": ValueError("oh"),
            "interrupt": KeyboardInterrupt(), "abort": click.Abort(), "usage": click.UsageError("no"),
            "click": click.ClickException("no"), "file": OSError(36, "File name too long", "x"),
            "memory": MemoryError(), "recursion": RecursionError("deep"), "pipe": BrokenPipeError(),
            "7": SystemExit(7), "text": SystemExit("text"), "1": SystemExit(1)}
    if how in ends:
        raise ends[how]
    click.echo(f"it went {how}")

@hookimpl
def tryplicity_commands():
    return [mine]
"""


@pytest.fixture
def commands(tmp_path):
    path = tmp_path / "commands.py"
    path.write_text(COMMANDS)
    return str(path)


@pytest.mark.parametrize(("how", "code"), [
    ("user", 2), ("fault", 3), ("raise", 3), ("interrupt", 130), ("abort", 130), ("usage", 2), ("click", 2),
    ("file", 2), ("memory", 3), ("recursion", 3), ("pipe", 0), ("7", 3), ("text", 2), ("1", 1), ("well", 0)])
def test_whatever_ends_a_command_has_one_of_the_codes(capfd, commands, how, code):
    ended, _, err = call(capfd, "--plugin", commands, "mine", "--how", how)
    assert ended == code
    assert len(err.splitlines()) == (0 if how in ("pipe", "1", "well") else 4 if how == "usage" else 1), err


def test_a_command_of_a_plugins_file_is_called_with_the_file_before_it_and_behind_it(capfd, commands):
    assert call(capfd, "mine")[0] == 2
    for arguments in (["--plugin", commands, "mine"], ["mine", "--plugin", commands], [f"--plugin={commands}", "mine"],
                      ["mine", f"--plugin={commands}"], ["mine", "--how", "well", "--plugin", commands]):
        assert call(capfd, *arguments)[:2] == (0, "it went well\n"), arguments
    assert "Mine." in call(capfd, "--plugin", commands, "--help")[1]
    assert "--how" in call(capfd, "mine", "--plugin", commands, "--help")[1]
    code, out, _ = call(capfd, "--plugin", commands, "plugins", "list", "--json")
    assert code == 0 and '"hook tryplicity_commands"' in out


def test_a_signal_ends_with_its_code(tmp_path):
    waits = "    import time\n    print('ready', flush=True)\n    time.sleep(60)\n"
    text = COMMANDS.replace("    if how in ends", waits + "    if how in ends")
    (tmp_path / "slow.py").write_text(text)
    with subprocess.Popen([sys.executable, "-m", "tryplicity.cli", "mine", "--plugin", str(tmp_path / "slow.py")],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and err == "error: interrupted\n"


# --- where only ASCII can be written, and where no line can be rewritten ---

@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"},
                                         {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}], ids=str)
def test_output_that_can_only_be_ascii(environment, tmp_path):
    (tmp_path / "says.py").write_text(textwrap.dedent("""
        import click
        from tryplicity import hookimpl
        @click.command()
        def says():
            from tryplicity.brain_page import bars, sparkline
            from tryplicity.pages import console, preparation
            from tryplicity.training.metrics import curve
            with preparation() as progress:
                progress("reading", 1, 2)
            console.print(sparkline([0.0, 1.0, 2.0], 3), bars([0.0, 1.0], 2), curve([3.0, 2.0, 1.0] * 20))
            print("naïve ✓ 模")
        @hookimpl
        def tryplicity_commands(): return [says]
        """))
    kept = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "LANG", "PYTHONIOENCODING")}
    done = run("says", "--plugin", str(tmp_path / "says.py"), env={**kept, **environment})
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and rb"na\xefve \u2713 \u6a21" in done.stdout and b"\\u258" not in done.stdout


def test_a_dumb_terminal_is_told_line_by_line(monkeypatch):
    import io

    from tryplicity import pages

    said = io.StringIO()
    for term, words in (("dumb", True), ("xterm", False)):
        monkeypatch.setenv("TERM", term)
        status = pages.Console(file=said, force_terminal=True, highlight=False, soft_wrap=True)
        monkeypatch.setattr(pages, "status", status)
        assert pages.is_live() != words
        with pages.preparation() as progress:
            progress("reading documents", 1, 2)
        with pages.training() as watcher:
            assert type(watcher).__name__ == ("_Lines" if words else "_Live")
        if words:
            assert said.getvalue() == "reading documents\n"
