"""What several commands have in common: numbers, SPEC with --hw and --set, --plugin."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import click


def given_plugins(ctx: click.Context) -> tuple[str, ...]:
    """The files given as --plugin, before the command and behind it."""
    own = () if ctx.parent is None else ctx.params.get("plugin_files", ())
    return tuple(dict.fromkeys((*ctx.find_root().params.get("plugin_files", ()), *own)))


class Number(click.FloatRange):
    """A number that is one: neither nan nor infinite. whole: 2e6 and 2000000, but not 2.5."""

    def __init__(self, low: float, high: float = 1e15, *, whole: bool = False, **options: Any) -> None:
        super().__init__(low, high, **options)
        self.whole, self.name = whole, "integer" if whole else "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not math.isfinite(number) or (self.whole and number != int(number)):
            self.fail(f"{value} is not a {'whole' if self.whole else 'finite'} number", param, ctx)
        number = super().convert(number, param, ctx)
        return int(number) if self.whole else number


SEED = click.IntRange(0, 2**63 - 1)


def plugin_switches(command: Callable) -> Callable:
    """--without-plugin and --trace-plugins, which hold for every process that the command starts."""

    def without(ctx: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> None:
        if names:
            before = os.environ.get("TRYPLICITY_DISABLE_PLUGINS")
            os.environ["TRYPLICITY_DISABLE_PLUGINS"] = ",".join([*([before] if before else []), *names])

    def trace(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
        if wanted:
            os.environ["TRYPLICITY_TRACE_PLUGINS"] = "1"

    command = click.option("--trace-plugins", is_flag=True, is_eager=True, expose_value=False, callback=trace,
                           help="Say on stderr what each call of a plugin's hook took.")(command)
    return click.option("--without-plugin", multiple=True, metavar="NAME", is_eager=True, expose_value=False,
                        callback=without, help="Leave out an installed plugin. May be repeated.")(command)


def plugin_options(command: Callable) -> Callable:
    """--plugin, --strict and the switches; the command gets the loaded `plugins`."""

    @plugin_switches
    @click.option("--plugin", "plugin_files", multiple=True, metavar="FILE.py",
                  help="Load a plugin from a file, beside the installed ones. May be repeated.")
    @click.option("--strict", is_flag=True, help="Fail when any plugin cannot be loaded.")
    @functools.wraps(command)
    def with_plugins(*args: Any, plugin_files: tuple[str, ...], strict: bool, **kwargs: Any) -> Any:
        from tryplicity.plugins import load_plugins, remembered

        context = click.get_current_context()
        context.params["plugin_files"] = given = given_plugins(context)
        run = kwargs.get("folder") if kwargs.get("resume") else kwargs.get("run")
        return command(*args, plugins=load_plugins((*given, *remembered(run, given)), strict), **kwargs)

    return with_plugins


def weights_option(command: Callable) -> Callable:
    """--weights, in which form a command that decodes keeps what is else floats."""
    return click.option("--weights", type=click.Choice(["int8", "bf16", "fp32"]),
                        help="Keep plain linears and tables as int8 rows or in bf16, on a CPU; by default as they lie "
                             "in the file, those of a run in fp32, and those of a model by name as it says."
                        )(command)


def resolved(run: Any, plugins: Any) -> Any:
    """RUN as the user gave it, or what it names: see tryplicity.named.resolve."""
    from tryplicity import pages
    from tryplicity.named import resolve

    with pages.preparation() as progress:
        return resolve(run, plugins, lambda done, total: progress(f"importing {run}", done, total))


def installed(kind: str) -> Callable:
    """A shell's completion of the name of an installed "spec", "hardware" or "recipe", or of a YAML file."""

    def complete(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from tryplicity.spec.installed import installed_files

        names = [CompletionItem(name) for name in sorted(installed_files(kind)) if name.startswith(begun)]
        return [CompletionItem(begun, type="file"), *names]  # bash forgets what stands before a file

    return complete


def build_options(command: Callable) -> Callable:
    """SPEC, --hw and --set."""
    command = click.option("--set", "settings", multiple=True, metavar="PATH=VALUE",
                           help="Change a value of the spec (hidden_size=512, blocks.attention.mixer.heads=8) or of "
                                "the profile (hardware.batch=2).")(command)
    command = click.option("--hw", "hardware", required=True, metavar="HW", shell_complete=installed("hardware"),
                           help="A hardware profile: a YAML file, or the name of an installed one (cpu, 5090, b200, "
                                "mi300x, h200, h100).")(command)
    return click.argument("spec", shell_complete=installed("spec"))(command)


def named(data: str | None, plugins: Any, purpose: str) -> str:
    """The source that a user names, or the one that is meant for the purpose."""
    return plugins.registry.default("source", purpose) if data is None else data


def forget_what_cannot_be_written() -> None:
    """Python writes what is left of its output at the very end, and would end with another code where it cannot."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str = "", nl: bool = True) -> None:
    """As click's echo, which by itself writes UTF-8 to what can only take ASCII."""
    click.echo(text, file=sys.stdout, nl=nl)
