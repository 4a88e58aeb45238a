"""A copy of the repository to change, and the worker that runs tests on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutation.coverage_map import ROOT


class Bench:
    """`with Bench() as bench`: `bench.change({file: bytes})`, `bench.run(tests, limit)`, `bench.restore()`; or all of
    it, and whether the tests are to be believed, `bench.judge({file: bytes}, tests, limit)`."""

    def __enter__(self) -> Bench:
        self.folder = Path(tempfile.mkdtemp(prefix="mutation-"))
        self.copy = self.folder / "copy"
        shutil.copytree(ROOT, self.copy, symlinks=True, ignore=shutil.ignore_patterns(
            ".git", ".venv*", ".mutation", "runs", "ablations", "build", "*.egg-info", "node_modules"))
        for package, place in (("tryplicity_plugins", "plugins"), ("tryplicity_specs", "specs"),
                               ("tryplicity_hardware", "hardware"), ("tryplicity_static", "static")):
            (self.copy / package).symlink_to(place)
        environment = {**os.environ, "PYTHONPATH": str(self.copy), "OMP_WAIT_POLICY": "PASSIVE",
                       "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
        self.worker = subprocess.Popen([sys.executable, "-m", "tests.mutation.worker"], cwd=self.copy, text=True,
                                       env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ask(None)
        self._changed: dict[str, tuple[bytes, os.stat_result]] = {}
        self._time = 2_000_000_000
        self._pass: set[str] = set()  # tests that were seen to, on the unchanged copy
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.stdin.close()
        self.worker.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def change(self, files: dict[str, bytes]) -> None:
        for file, content in files.items():
            path = self.copy / file
            self._changed.setdefault(file, (path.read_bytes(), path.stat()))
            path.write_bytes(content)
            self._time += 1  # Python knows a compiled file by the second it was changed in
            os.utime(path, (self._time, self._time))

    def restore(self) -> None:
        for file, (content, stat) in self._changed.items():
            (self.copy / file).write_bytes(content)
            os.utime(self.copy / file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        self._changed.clear()

    def run(self, tests: list[str], limit: float) -> dict[str, str]:
        return self._ask({"tests": tests, "limit": limit})

    def judge(self, files: dict[str, bytes], tests: list[str], limit: float) -> dict[str, str]:
        """What the tests say of a change. A test that fails on the unchanged copy too is left out, and where time runs
        out the limit becomes what the unchanged copy takes on a machine as busy as now: neither tells of the change.
        """
        for _ in range(6):
            near = [test for test in tests if test.partition("::")[0] == tests[0].partition("::")[0]]
            self.change(files)
            some = near  # which find most: no other file is collected
            said = self.run(some, limit)
            if said["outcome"] == "survived" and (rest := [test for test in tests if test not in near]):
                some = rest
                said = self.run(some, limit)
            self.restore()
            if said["outcome"] == "survived":
                return said
            at = time.monotonic()
            if said["outcome"] == "time":
                plain, longest = self.run(some, 4 * limit), limit
                limit = max(limit, 15 + 2.5 * (time.monotonic() - at))
                if plain["outcome"] == "survived" and longest == limit:
                    return said
            else:
                file, _, name = said["test"].partition("::")
                if name and said["test"].partition("[")[0] in self._pass:
                    return said
                like_it = [test for test in tests if test.partition("::")[0] == file] or tests  # and so seen once
                plain = self.run(like_it, 4 * limit)
                if plain["outcome"] == "survived":
                    self._pass.update(like_it)
                    return said
            bad = plain["test"].partition("[")[0]
            tests = [test for test in tests if test != bad]
            if not tests or plain["outcome"] == "time":
                break
        return {"outcome": "unsure", "test": ""}

    def _ask(self, what: dict | None) -> dict[str, str]:
        if what is not None:
            self.worker.stdin.write(json.dumps(what) + "\n")
            self.worker.stdin.flush()
        line = self.worker.stdout.readline()
        if not line:
            raise RuntimeError("the worker ended")
        return json.loads(line)
