"""Runs tests on a changed copy of the repository, a fork each, so that torch is imported once.

`python -m tests.mutation.worker` in the copy reads one JSON object a line, {"tests": [...], "limit": seconds}, and
answers {"outcome": "killed" | "survived" | "time", "test": the first that failed}.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time

import click
import datasets
import httpx
import hypothesis
import numpy
import openai
import prometheus_client
import pydantic
import pytest
import rich
import safetensors.torch
import sanic
import tokenizers
import torch

HEAVY = (click, datasets, httpx, hypothesis, numpy, openai, prometheus_client, pydantic, rich, safetensors, sanic,
         tokenizers, torch)  # shared by all forks

MEMORY = 8 << 30  # bytes for the tests of one change


class _First:
    """Remembers the first failing test."""

    failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def _child(tests: list[str], answer: int) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # a loop that never ends fills what there is
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    first = _First()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *tests], plugins=[first])
    os.write(answer, f"{int(code)} {first.failed}".encode()[:4000])
    os._exit(0)


def run(tests: list[str], limit: float) -> dict[str, str]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _child(tests, write)
        finally:
            os._exit(1)
    os.close(write)
    end = time.monotonic() + limit
    while True:
        done, _ = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() > end:
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what tests started too
    if not done:
        os.waitpid(child, 0)
        os.close(read)
        return {"outcome": "time", "test": ""}
    said = os.read(read, 5000).decode()
    os.close(read)
    code, _, failed = said.partition(" ")
    if code == "0":
        return {"outcome": "survived", "test": ""}
    return {"outcome": "killed", "test": failed or "(the process ended)"}


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["tests"], asked["limit"])), flush=True)
