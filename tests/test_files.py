"""Files appear whole or not at all, and what a killed process left of them goes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tryplicity import UserError
from tryplicity.files import may_be_written, whole_file, whole_folder, write_text

HALF = """
import sys
from pathlib import Path
from tryplicity.files import whole_file
with whole_file(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("written", flush=True)
    sys.stdin.read()
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from tryplicity.files import whole_file, whole_folder
left = int(sys.argv[2])
def heard(event, arguments):
    global left
    if event.startswith(("open", "os.", "shutil.")) and any(str(sys.argv[1]) in str(path) for path in arguments[:2]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(heard)
for name in "12":
    with whole_file(Path(sys.argv[1]) / "file") as temporary:
        temporary.write_text(name)
    with whole_folder(Path(sys.argv[1]) / "folder") as temporary:
        (temporary / "inside").write_text(name)
"""


@pytest.fixture
def writing(tmp_path):
    """A process in the middle of writing `out`."""
    process = subprocess.Popen([sys.executable, "-c", HALF, str(tmp_path / "out")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    yield process
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_that_fails_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "out", "old")
    with pytest.raises(OSError, match="no"), whole_file(tmp_path / "out") as temporary:
        temporary.write_text("new")
        raise OSError("no")
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "old"


def test_what_a_killed_process_left_is_removed_by_the_next_to_write_that_file(writing, tmp_path):
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    write_text(tmp_path / "other", "")
    [left] = {*names(tmp_path)} - {"other"}
    (tmp_path / f"{left}.notes").write_text("somebody's")
    write_text(tmp_path / "out", "whole")
    assert names(tmp_path) == sorted([f"{left}.notes", "other", "out"])


def test_killed_at_any_moment_the_next_to_write_finds_all_or_nothing_and_leaves_no_more(tmp_path):
    """After each thing done to the disk, by number, until one process lives to the end."""
    moments = 0
    while True:
        moments, place = moments + 1, tmp_path / str(moments)
        place.mkdir()
        ended = subprocess.run([sys.executable, "-c", KILLED, str(place), str(moments)]).returncode
        assert ended in (0, -signal.SIGKILL)
        if (place / "file").exists():
            assert (place / "file").read_text() in ("1", "2")
        seen = [folder for folder in place.iterdir() if folder.name == "folder"]
        assert all((folder / "inside").read_text() in ("1", "2") for folder in seen)
        write_text(place / "file", "whole")
        with whole_folder(place / "folder") as temporary:
            (temporary / "inside").write_text("whole")
        assert names(place) == ["file", "folder"] and (place / "folder" / "inside").read_text() == "whole"
        if ended == 0:
            break
    assert moments > 30


def test_what_another_process_still_writes_is_left_alone(writing, tmp_path):
    write_text(tmp_path / "out", "first")
    assert len(names(tmp_path)) == 2
    writing.communicate("")
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "half"


def test_only_its_own_kind_is_written_over(tmp_path):
    """Whatever is at the place: a file or folder of the kind or empty may go, nothing else, and nothing is changed."""
    def allowed(out, sources=()):
        try:
            may_be_written(out, "a poem", lambda path: "poem" in path.name, sources)
        except UserError as error:
            assert str(error).startswith(f"{out}: ") and "another --out" in str(error) and "\n" not in str(error)
            return False
        return True

    text, poem, empty = (tmp_path / name for name in ("text", "poem", "empty"))
    text.write_text("text")
    poem.write_text("poem")
    empty.touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "full of poems").mkdir()
    (tmp_path / "full of poems" / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    os.symlink("text", tmp_path / "link")
    os.symlink("nowhere", tmp_path / "dangling")
    os.symlink("poem", tmp_path / "poem too")
    before = names(tmp_path)
    assert {name: allowed(tmp_path / name) for name in before} == {
        "text": False, "poem": True, "empty": True, "folder": True, "full": False, "full of poems": True, "fifo": False,
        "link": False, "dangling": True, "poem too": True}
    assert allowed(tmp_path / "new") and not allowed(Path("/dev/null"))
    assert not allowed(poem, [text, poem]) and not allowed(tmp_path / "poem too", [poem]) and allowed(poem, [text])
    assert names(tmp_path) == before and text.read_text() == "text"
