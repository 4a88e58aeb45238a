"""How far a reader goes: the product's files that are entered on three ways through the program, and the lines of the
functions entered there.

    python -m tests.walks [--files]

- hidden_size from the YAML to a product: functions that hold the number, or an object with it for an attribute, from
  reading the spec to the logits;
- a token from its file to the loss: all that runs from the end of a training step to the next backward pass;
- a request from the socket to its token: all that runs from a request to the first piece of its answer, in a server
  that has answered one before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import tryplicity
import tryplicity_plugins

HERE = Path(__file__).parent
CORE, PLUGINS = (Path(package.__file__).parent for package in (tryplicity, tryplicity_plugins))
HIDDEN = 88  # no other number of the spec
SETTINGS = (f"hidden_size={HIDDEN}",)


class Walk:
    """The functions of the product that begin or end, in any thread, while `on`, and of which `holds` is true then."""

    def __init__(self, holds: Callable[[FrameType], bool] = lambda frame: True) -> None:
        self.holds, self.on, self.entered = holds, False, set[CodeType]()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if (self.on and event in ("call", "return") and code not in self.entered and code.co_name != "<module>"
                and code.co_filename.startswith((f"{CORE}{os.sep}", f"{PLUGINS}{os.sep}")) and self.holds(frame)):
            self.entered.add(code)

    def told(self, way: str, files: bool) -> None:
        lines: dict[str, set[int]] = {}
        names: dict[str, set[str]] = {}
        for code in self.entered:
            lines.setdefault(code.co_filename, set()).update(line for *_, line in code.co_lines() if line)
            names.setdefault(code.co_filename, set()).add(code.co_qualname.replace(".<locals>", ""))
        print(f"{way}: {len(lines)} files, {sum(map(len, lines.values()))} lines")
        for name, own in sorted(lines.items()) if files else ():
            place = next(Path(folder, Path(name).relative_to(package)) for folder, package in
                         (("tryplicity", CORE), ("plugins", PLUGINS)) if Path(name).is_relative_to(package))
            print(f"    {place} {len(own)}: {', '.join(sorted(names[name]))}")


def hidden_size(registry: Any) -> Walk:
    from tryplicity.model import assemble, initialise
    from tryplicity.spec import load_spec

    def is_it(value: Any) -> bool:
        return type(value) is int and value == HIDDEN

    walk = Walk(lambda frame: any(is_it(value) or any(map(is_it, getattr(value, "__dict__", {}).values()))
                                  for value in frame.f_locals.values()))
    sys.setprofile(walk)
    walk.on = True
    initialise(assemble(load_spec(str(HERE / "small.yaml"), registry, SETTINGS)), "cpu", 0)(torch.zeros(1, 8).long())
    sys.setprofile(None)
    return walk


def token(folder: Path) -> Walk:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from tryplicity.cli import main

    (folder / "texts").mkdir()
    for i in range(40):
        text = f"the model {i} reads a list of numbers and returns their sum.\n" * 12
        (folder / "texts" / f"{i}.txt").write_text(text)
    walk, backward = Walk(), torch.Tensor.backward

    def stop(*arguments: Any, **options: Any) -> Any:
        walk.on = False
        return backward(*arguments, **options)

    hook = register_optimizer_step_post_hook(lambda *_: setattr(walk, "on", not walk.entered))
    torch.Tensor.backward = stop
    sys.setprofile(walk)
    try:
        main(["train", str(HERE / "small.yaml"), "--hw", "cpu", "--data", str(folder / "texts"), "--run",
              str(folder / "run"), "--steps", "3"])
    except SystemExit as end:
        assert not end.code, end.code
    finally:
        sys.setprofile(None)
        torch.Tensor.backward = backward
        hook.remove()
    return walk


def _once_ready(wanted: urllib.request.Request) -> Any:
    while True:
        try:
            return urllib.request.urlopen(wanted)
        except urllib.error.HTTPError as error:  # the model is being loaded
            if error.code != 503:
                raise
            time.sleep(0.2)


def request(folder: Path) -> Walk:
    from tryplicity import load_plugins
    from tryplicity.server.app import serve

    walk = Walk()

    def ask(url: str) -> None:
        try:
            for walk.on, prompt in (False, "the model"), (True, "numbers, and returns"):     # no prefix is remembered
                body = {"model": "small", "prompt": prompt, "max_tokens": 1, "stream": True}
                wanted = urllib.request.Request(f"{url.rstrip('/')}/v1/completions", json.dumps(body).encode(),
                                                {"Content-Type": "application/json"})
                with _once_ready(wanted) as answer:
                    while not answer.readline().startswith(b"data:"):  # a ping may come first
                        pass
                    walk.on = False
                    answer.read()
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    threading.setprofile(walk)
    sys.setprofile(walk)
    serve(folder / "run", plugins=load_plugins(), port=0, search="none",  # whose loading would end the process with it
          say=lambda url: threading.Thread(target=ask, args=(url,), daemon=True).start())
    sys.setprofile(None)
    threading.setprofile(None)
    return walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="also which they are, and the functions")
    files = parser.parse_args().files
    walks = {"hidden_size from the YAML to a product": hidden_size(tryplicity.load_plugins().registry)}
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRYPLICITY_CACHE"] = f"{name}/cache"
        walks["A token from its file to the loss"] = token(Path(name))
        walks["A request from the socket to its token"] = request(Path(name))
    for way, walk in walks.items():
        walk.told(way, files)


if __name__ == "__main__":
    main()
