"""Many clients at once: python -m tests.benchmarks.load RUN [--streams 64] [--seconds 60] [--slots 16]

A server in a process of its own serves RUN. Each client asks for the text of its own prompt and seed, again and again;
what it must get was written beforehand by the same server with nobody else there. Some are cut off in the middle, at
random. Printed: what was lost or mixed up (nothing may be), time to the first token, tokens per second of all beside
those of one alone, and the server's memory before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVE = """
import json, sys
from tryplicity import load_plugins
from tryplicity.server.app import serve
from tryplicity.training.process import limit_spinning, tune_malloc
limit_spinning(); tune_malloc()
serve(sys.argv[1], plugins=load_plugins(), search="none", conversations="none", say=lambda url: print(url, flush=True),
      **json.loads(sys.argv[2]))
"""


@dataclass
class Result:
    """What the clients saw."""

    streams: int
    seconds: float = 0.0
    alone_tokens_per_second: float = 0.0
    alone_first: list[float] = field(default_factory=list)
    finished: int = 0
    cut: int = 0
    refused: int = 0                        # 429: no place in the queue
    lost: list[str] = field(default_factory=list)       # ended early, or in an error
    mixed: list[str] = field(default_factory=list)      # another text than alone
    first: list[float] = field(default_factory=list)    # seconds to the first token
    tokens: int = 0
    memory_before: float = 0.0              # MB, when every client has been answered once
    memory_after: float = 0.0
    still_running: int = 0                  # slots taken after everyone has gone
    tokens_after: int = 0                   # written after everyone has gone

    def table(self) -> str:
        def percentile(values: list[float], share: float) -> float:
            return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")

        rate = self.tokens / max(self.seconds, 1e-9)
        rows = [
            ("streams, seconds", f"{self.streams}, {self.seconds:.0f}"),
            ("answers whole / cut by us / refused (429)", f"{self.finished} / {self.cut} / {self.refused}"),
            ("lost, mixed up", f"{len(self.lost)}, {len(self.mixed)}"),
            ("tokens per second: all, one alone, ratio",
             f"{rate:.0f}, {self.alone_tokens_per_second:.0f}, {rate / max(self.alone_tokens_per_second, 1e-9):.2f}"),
            ("first token, one alone: median", f"{1000 * statistics.median(self.alone_first):.0f} ms"),
            ("first token, under load: median, p95",
             f"{1000 * percentile(self.first, 0.5):.0f} ms, {1000 * percentile(self.first, 0.95):.0f} ms"),
            ("server's memory: before, after", f"{self.memory_before:.0f} MB, {self.memory_after:.0f} MB"),
            ("slots still taken, tokens still written", f"{self.still_running}, {self.tokens_after}")]
        return "\n".join(f"{name:<45} {value}" for name, value in rows)


@dataclass(frozen=True)
class Marker:
    """A request whose text is known."""

    body: bytes
    text: str = ""


def marker(model: str, number: int, tokens: int) -> Marker:
    return Marker(json.dumps({
        "model": model, "prompt": f"{number}. The list of number {number * 7919 % 1000} is", "seed": number,
        "temperature": 0.9, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True},
        "logit_bias": {str(special): -100 for special in range(10)}}).encode())


async def ask(port: int, body: bytes, result: Result, cut: float | None = None) -> tuple[str | None, float | None, int]:
    """(text, or None where it was not whole; seconds to its first token; tokens). cut: go away after so many chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    parts, first, tokens, chunks, done = [], None, 0, 0, False
    start = time.perf_counter()
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
                     b"Connection: close\r\n\r\n%b" % (len(body), body))
        status = int((await reader.readline()).split()[1])
        if status == 429:
            result.refused += 1
            await asyncio.sleep(0.5)
            return None, None, 0
        while line := await reader.readline():
            if not line.startswith(b"data: "):      # headers, comments, the sizes of chunks
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                result.lost.append(event["error"]["message"])
                return None, first, 0
            tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
            for choice in event["choices"]:
                if choice["text"]:
                    first = first or time.perf_counter() - start
                    parts.append(choice["text"])
                    chunks += 1
            if cut is not None and chunks >= cut:
                result.cut += 1
                result.tokens += chunks
                return None, first, 0
    except OSError as error:
        result.lost.append(str(error))
        return None, first, 0
    finally:
        writer.transport.abort()
    if not done:
        result.lost.append(f"status {status}, {chunks} pieces, no end")
        return None, first, 0
    return "".join(parts), first, tokens


async def measure(port: int, pid: int, model: str, streams: int, seconds: float, tokens: int, cuts: float,
                  seed: int) -> Result:
    result, markers = Result(streams), []
    for number in range(streams):   # alone, one after another; the second time, as under load, the prompt is known
        asked = marker(model, number, tokens)
        text, *_ = await ask(port, asked.body, result)
        assert text, result.lost
        markers.append(Marker(asked.body, text))
    start, written = time.perf_counter(), 0
    for asked in markers[:16]:
        text, first, count = await ask(port, asked.body, result)
        assert text == asked.text, "alone, the same seed wrote another text"
        result.alone_first.append(first)
        written += count
    result.alone_tokens_per_second = written / (time.perf_counter() - start)
    assert len({m.text for m in markers}) > streams * 0.9, "the texts are too alike to show a mix-up"

    begin = time.perf_counter()
    answered: set[int] = set()

    async def client(number: int) -> None:
        rng, turn = random.Random(seed * 1000 + number), 0
        while time.perf_counter() - begin < seconds:
            own = markers[(number + turn * 13) % streams]       # not always from what its slot has just written
            cut = rng.randint(1, tokens) if rng.random() < cuts else None
            text, first, count = await ask(port, own.body, result, cut)
            turn += 1
            if first is not None:
                result.first.append(first)
            if text is not None:
                result.finished += 1
                result.tokens += count
                if text != own.text:
                    result.mixed.append(f"{text!r} for {own.text!r}")
            answered.add(number)
            if len(answered) == streams and not result.memory_before:
                result.memory_before = memory(pid)

    await asyncio.gather(*(client(number) for number in range(streams)))
    result.seconds = time.perf_counter() - begin
    await asyncio.sleep(0.5)
    before = await asyncio.to_thread(engine, port)
    result.still_running = before["running"] + before["waiting"]
    await asyncio.sleep(0.5)
    result.tokens_after = (await asyncio.to_thread(engine, port))["tokens_total"] - before["tokens_total"]
    result.memory_after = memory(pid)
    return result


def engine(port: int) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/model", timeout=60) as answer:
        return json.load(answer)["statistics"]


def memory(pid: int) -> float:
    """What the process holds, in MB."""
    [line] = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def run(what: str | Path, streams: int = 64, seconds: float = 60, slots: int = 16, tokens: int = 48,
        cuts: float = 0.2, seed: int = 0) -> Result:
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(what), json.dumps({"port": 0, "slots": slots})],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    try:
        port = int(server.stdout.readline().rpartition(":")[2])
        deadline = time.monotonic() + 300
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/model", timeout=60) as answer:
                state = json.load(answer)
            if state["state"] == "ready":
                break
            assert time.monotonic() < deadline and server.poll() is None, "the server does not come up"
            time.sleep(0.2)
        result = asyncio.run(measure(port, server.pid, state["card"]["id"], streams, seconds, tokens, cuts, seed))
        server.terminate()
        assert server.wait(60) == 0, "it did not end well"
        return result
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a run folder or an exported file")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=16, help="texts the server writes at once")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--cuts", type=float, default=0.2, help="share of answers that are cut off")
    chosen = parser.parse_args(arguments)
    result = run(chosen.run, chosen.streams, chosen.seconds, chosen.slots, chosen.tokens, chosen.cuts)
    print(result.table())
    for problem in [*result.lost[:5], *result.mixed[:5]]:
        print("   ", problem)


if __name__ == "__main__":
    main()
