"""The `tryplicity` command. Each command imports what it needs when it runs, so that --help is instant."""

from __future__ import annotations

import codecs
import functools
import io
import sys
from typing import Any

import click

from tryplicity.commands import ending
from tryplicity.commands.ablate import ablate
from tryplicity.commands.brain import brain
from tryplicity.commands.build import build
from tryplicity.commands.data import data
from tryplicity.commands.doctor import doctor
from tryplicity.commands.eval import eval_
from tryplicity.commands.export import export
from tryplicity.commands.generate import generate
from tryplicity.commands.import_ import import_
from tryplicity.commands.launch import launch
from tryplicity.commands.options import given_plugins, plugin_switches
from tryplicity.commands.plugins import plugins
from tryplicity.commands.quickstart import quickstart
from tryplicity.commands.schema import schema
from tryplicity.commands.search import search
from tryplicity.commands.serve import serve
from tryplicity.commands.tokenizer import tokenizer
from tryplicity.commands.train import train
from tryplicity.commands.version import version_option
from tryplicity.errors import UserError


class _Group(click.Group):
    """Every command ends with one of CODES, and every failure with one line; plugins' commands are found here."""

    def main(self, args: Any = None, prog_name: str | None = None, complete_var: str | None = None,
             **extra: Any) -> None:
        alone = extra.pop("standalone_mode", True)  # False: whoever calls goes on, unless it failed
        prog_name = prog_name or "tryplicity"
        self._main_shell_completion(extra, prog_name, complete_var)
        _say_in_any_alphabet()
        ending.verdict = 0
        code = self._code(list(sys.argv[1:] if args is None else args), prog_name, extra)
        if code or alone:
            sys.exit(code)

    def _code(self, args: list[str], prog_name: str, extra: dict[str, Any]) -> int:
        """Run a command; what to exit with."""
        try:
            try:
                with self.make_context(prog_name, args, **extra) as context:
                    self.invoke(context)
                code = 0
            except click.exceptions.Exit as end:
                code = end.exit_code
            except SystemExit as end:
                if not isinstance(end.code, int | None):
                    raise UserError(str(end.code)) from None
                code = end.code or 0
            sys.stdout.flush()
            return code if code in ending.CODES else ending.complain(f"the command ended with {code}", 3)
        except BaseException as error:
            return ending.failed(error)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_foreign_commands(given_plugins(ctx))})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, name) or _foreign_commands(given_plugins(ctx)).get(name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """A command that a plugin brings may have the plugin's file behind it: `tryplicity mine --plugin mine.py`."""
        if super().get_command(ctx, args[0]) is None and args[0] not in _foreign_commands(given_plugins(ctx)):
            files, rest = _taken(args[1:])
            if files and args[0] in _foreign_commands((*given_plugins(ctx), *files)):
                ctx.params["plugin_files"] = (*given_plugins(ctx), *files)
                args = [args[0], *rest]
        return super().resolve_command(ctx, args)


def _taken(args: list[str]) -> tuple[list[str], list[str]]:
    """The files of `--plugin FILE` and `--plugin=FILE`, and what else there is."""
    files, rest, left = [], [], iter(args)
    for arg in left:
        if arg == "--plugin":
            files += [next(left, "")]
        elif arg.startswith("--plugin="):
            files += [arg.partition("=")[2]]
        else:
            rest.append(arg)
    return [file for file in files if file], rest


@functools.cache
def _foreign_commands(files: tuple[str, ...]) -> dict[str, click.Command]:
    from tryplicity.plugins import load_commands

    found = {}
    for command in load_commands(files):
        if isinstance(command, click.Command) and command.name in main.commands:
            print(f"warning: a plugin brings a command called {command.name}, which is there already; it needs another "
                  "name", file=sys.stderr)
        elif isinstance(command, click.Command):
            found[command.name] = command
    return found


#: what is drawn -> what stands for it where only ASCII can be written
_PLAIN = dict(zip("▁▂▃▄▅▆▇█━╸╺─│┤├┼┌┐└┘╭╮╰╯·…→", "__..--==-- -||++++++++++..>", strict=True))


def _say_in_any_alphabet() -> None:
    """A terminal or pipe of another encoding (ASCII, say) gets signs that it can show, never an error."""

    def shown(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return "".join(_PLAIN.get(sign) or ("*" if "\u2800" <= sign <= "\u28ff" else  # a spinner's
                                           sign.encode("ascii", "backslashreplace").decode())
                       for sign in error.object[error.start:error.end]), error.end

    codecs.register_error("tryplicity", shown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tryplicity")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--plugin", "plugin_files", multiple=True, is_eager=True, metavar="FILE.py",
              help="Load a plugin from a file, whose commands are then here too. May be repeated.")
@plugin_switches
@version_option
def main(plugin_files: tuple[str, ...]) -> None:
    """Invent, budget, train and talk to hybrid language models declared in YAML.

    \b
    tryplicity build full --hw h200                       will it fit, how fast, what does it cost
    tryplicity train tiny --hw cpu --run runs/first --minutes 2
    tryplicity generate runs/first "The list type"
    """


for command in (ablate, brain, build, data, doctor, eval_, export, generate, import_, launch, plugins, quickstart,
                schema, search, serve, tokenizer, train):
    main.add_command(command)


if __name__ == "__main__":
    main()
