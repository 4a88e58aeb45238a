"""Many clients at once: nobody's answer is lost, or another's, and whoever leaves leaves nothing behind."""

import asyncio
import os

import pytest

from tests.benchmarks.load import measure, run


def check(result):
    assert result.lost == [] and result.mixed == [], result.table()
    assert result.still_running == 0 and result.tokens_after == 0
    assert result.finished > result.streams and result.cut > 0
    assert result.memory_after < result.memory_before + 64, result.table()
    assert "mixed up" in result.table()


def test_8_streams_for_a_moment(server):
    """On a server in this process."""
    port = int(server.url.rpartition(":")[2])
    check(asyncio.run(measure(port, os.getpid(), "talker", streams=8, seconds=1.5, tokens=8, cuts=0.2, seed=0)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("slots", [8, 64])
def test_64_streams_for_a_minute(chat_run, slots):
    result = run(chat_run, streams=64, seconds=60, slots=slots, tokens=32)
    print(result.table())
    check(result)
    assert result.refused == 0
