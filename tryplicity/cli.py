"""The `tryplicity` command. Each command imports what it needs when it runs, so that --help is instant."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from tryplicity import __version__
from tryplicity.commands.data import data
from tryplicity.commands.eval import eval_
from tryplicity.commands.launch import launch
from tryplicity.commands.options import (
    SEED,
    Number,
    build_options,
    forget_what_cannot_be_written,
    given_plugins,
    named,
    plugin_options,
)
from tryplicity.commands.tokenizer import tokenizer
from tryplicity.commands.train import Training, train, train_into
from tryplicity.errors import PluginFault, Refused, UserError

CODES = (0, 1, 2, 3, 130, 143)  # what this command may end with; README says what each means


class _Group(click.Group):
    """Every command ends with one of CODES, and every failure with one line; plugins' commands are found here."""

    #: what the command has found out already, for the case that nobody reads what it has to say about it
    verdict = 0

    def main(self, args: Any = None, prog_name: str | None = None, complete_var: str | None = None,
             **extra: Any) -> None:
        alone = extra.pop("standalone_mode", True)  # False: whoever calls goes on, unless it failed
        prog_name = prog_name or "tryplicity"
        self._main_shell_completion(extra, prog_name, complete_var)
        _say_in_any_alphabet()
        _Group.verdict = 0
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
            return code if code in CODES else _say(f"the command ended with {code}", 3)
        except BaseException as error:
            return _failed(error)

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

    return {command.name: command for command in load_commands(files)
            if isinstance(command, click.Command) and command.name not in main.commands}


def _failed(error: BaseException) -> int:
    """One line about what ended a command, and the code it ends with."""
    from tryplicity import guard

    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _say(str(error) or "interrupted", 130)  # training says what is lost
    if isinstance(error, BrokenPipeError):  # who reads the output has seen enough: the answer is the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _Group.verdict
    if isinstance(error, click.ClickException):
        error.show()
        return 2
    if isinstance(error, UserError):
        return _say(error, 2)
    if isinstance(error, Refused):
        return _say(error, 1)
    if os.environ.get(guard.SHOW) == "1" and not isinstance(error, PluginFault):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, PluginFault):
        return _say(error, 3)
    if guard.lacks_memory(error):
        return _say(f"this machine has too little memory for it: {guard.cause(error)}", 3)
    if (fault := guard.fault(error)) is not None:
        return _say(fault, 3)
    if isinstance(error, OSError):
        name = str(error.filename or "the system")
        name = name if len(name) < 100 else f"{name[:97]}..."
        forget_what_cannot_be_written()
        return _say(f"{name}: {error.strerror or error}", 2)
    return _say(f"{guard.cause(error)} ({guard.place(error)}): a fault of tryplicity itself; {guard.SHOW}=1 shows the "
                "traceback, which belongs in a report of it", 3)


def _say(error: object, code: int) -> int:
    with contextlib.suppress(OSError):
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    return code


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
@click.version_option(__version__, prog_name="tryplicity")
@click.option("--plugin", "plugin_files", multiple=True, is_eager=True, metavar="FILE.py",
              help="Load a plugin from a file, whose commands are then here too. May be repeated.")
def main(plugin_files: tuple[str, ...]) -> None:
    """Invent, budget, train and talk to hybrid language models declared in YAML.

    \b
    tryplicity build full --hw h200                       will it fit, how fast, what does it cost
    tryplicity train tiny --hw cpu --run runs/first --minutes 2
    tryplicity generate runs/first "The list type"
    """


@main.command()
@build_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--simulate", "simulating", is_flag=True,
              help="Run a training step on tensors without data too (a minute for nine billion parameters): the memory "
                   "it takes, and the fastest batch, checkpointing and strategy that fit.")
@plugin_options
def build(spec: str, hardware: str, settings: tuple[str, ...], as_json: bool, simulating: bool, plugins: Any) -> None:
    """Check SPEC on a machine before renting it: parameters, memory, strategy, speed, money.

    SPEC is a YAML file or the name of an installed spec (tiny, 5090, full). Exits with 1 if it does not fit.

    Active parameters are all but those of the experts that a token does not choose, as model cards count: embeddings
    and heads are in them.

    Example: tryplicity build specs/full.yaml --hw hardware/h200.yaml
    """
    import gc

    gc.disable()  # a short life: collecting takes a tenth of it
    from tryplicity import pages
    from tryplicity.builder import build as assemble

    with pages.working("planning"):
        built = assemble(spec, hardware, plugins.registry, settings)
    verdict = None
    if simulating:
        from tryplicity.planner.verdict import judge, question_of

        files = given_plugins(click.get_current_context())
        with pages.working("simulating a training step"):
            verdict = judge(built.model, built.plan, built.registry,
                            question_of(spec, hardware, settings, files, built.plan))
    _Group.verdict = 0 if (verdict or built.plan).fits else 1
    if as_json:
        click.echo(json.dumps(built.plan.as_dict() | (verdict.as_dict() if verdict else {}), indent=1))
    else:
        pages.build_page(built, verdict)
    sys.exit(_Group.verdict)


main.add_command(train)
main.add_command(launch)
main.add_command(eval_)


def sampling_options(command: Callable) -> Callable:
    for option in reversed([
        click.option("--max-tokens", default=200, show_default=True, type=click.IntRange(1)),
        click.option("--temperature", default=0.8, show_default=True, help="0: always the likeliest token."),
        click.option("--top-k", default=0, show_default=True, help="Choose among the k likeliest; 0: all."),
        click.option("--top-p", default=0.95, show_default=True, help="Choose among the likeliest of this mass."),
        click.option("--min-p", default=0.0, show_default=True,
                     help="Choose among those at least so many times as probable as the likeliest."),
        click.option("--repetition-penalty", default=1.1, show_default=True, help="1: none."),
        click.option("--presence-penalty", default=0.0, show_default=True, help="Off what was written already."),
        click.option("--frequency-penalty", default=0.0, show_default=True, help="Likewise, each time it was."),
        click.option("--seed", type=SEED, help="The same seed writes the same text."),
    ]):
        command = option(command)
    return command


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt")
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated.")
@click.option("--chat", is_flag=True, help="PROMPT is a question; the model answers it.")
@click.option("--system", metavar="TEXT", help="With --chat: what the model is told before the question.")
@click.option("--device", default="cpu", show_default=True, help="What the model runs on: cpu, cuda, cuda:1, mps.")
@plugin_options
def generate(run: Path, prompt: str, max_tokens: int, stop: tuple[str, ...], chat: bool, system: str | None,
             device: str, plugins: Any, **sampling: Any) -> None:
    """Write on from PROMPT with the model of a run folder, as it comes; or answer it.

    \b
    Example: tryplicity generate runs/first "A list is" --temperature 0.7 --seed 1
             tryplicity generate runs/first --chat "What is os.path.join?" --temperature 0
    """
    if system and not chat:
        raise UserError("--system is for --chat; add --chat, or leave it out")
    from tryplicity.training.process import polite_threads, tune_malloc

    polite_threads()
    tune_malloc()
    from tryplicity import kernels
    from tryplicity.inference.engine import Engine
    from tryplicity.inference.sampler import Sampling

    chosen = Sampling(**sampling)

    engine = Engine.load(run, plugins.registry, device)
    if device == "cpu" and (reason := kernels.why_not()):
        click.echo(reason, err=True)
    if chat:
        from tryplicity.inference.chat import dialogue, reply

        if not engine.card.chat:
            click.echo(f"warning: {run}: a base model: it has learned no conversations, and what follows is its guess "
                       "at how a text goes on; a chat phase in `phases` teaches them", err=True)
        _print(reply(engine, dialogue(prompt, system), chosen, max_tokens, stop))
    else:
        _write(engine, prompt, chosen, max_tokens, stop)


def _echo(text: str = "", nl: bool = True) -> None:
    """As click's, which by itself writes UTF-8 to what can only take ASCII."""
    click.echo(text, file=sys.stdout, nl=nl)


def _write(engine: Any, prompt: str, sampling: Any, max_tokens: int, stop: tuple[str, ...] = ()) -> None:
    """The prompt, and the model's text as it comes."""
    pieces = engine.stream(prompt, sampling, max_tokens, stop)
    _echo(click.style(prompt, bold=True), nl=False)
    _print(pieces)


def _print(pieces: Iterable[str]) -> None:
    """Text as it comes; Ctrl-C ends it where it stands."""
    stopped = False
    try:
        for piece in pieces:
            _echo(piece, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stopped = True
    _echo()
    if stopped:
        sys.exit(130)  # as a shell says of what Ctrl-C ended


@main.command()
@click.argument("run")
@click.option("--format", "format_", type=click.Choice(["packed", "ternary"]), default="packed", show_default=True,
              help="packed: every linear as it packs itself, bitlinear at 1.6 bits a weight; ternary: the same.")
@click.option("--rest", type=click.Choice(["bf16", "int8", "fp32"]), default="bf16", show_default=True,
              help="What is not packed; int8: the embedding, with a scale for each row, all else in bf16.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="By default RUN/model-FORMAT.safetensors, such as model-ternary.safetensors.")
@click.option("--initialised", is_flag=True, help="RUN is a spec: pack its initial weights, module by module.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="FILE",
              help="With --initialised: the tokenizer.json to put inside.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def export(run: str, format_: str, rest: str, out: Path | None, initialised: bool, tokenizer: Path | None,
           as_json: bool, plugins: Any) -> None:
    """Pack the model of a run folder into one file, with its spec and tokenizer inside.

    \b
    Example: tryplicity export runs/first --format ternary
             tryplicity export full --initialised --rest int8 --out full.safetensors
    """
    from tryplicity import pages
    from tryplicity.inference import packed

    with pages.preparation() as progress:
        sizes = packed.export(run, plugins.registry, out, rest, initialised=initialised, tokenizer=tokenizer,
                              progress=lambda done, total: progress("packing", done, total))
    if as_json:
        click.echo(json.dumps({"path": str(sizes.path), "format": sizes.packed_as, "rest": sizes.rest,
                               "packed_weights": sizes.packed_weights, "packed_bytes": sizes.packed_bytes,
                               "rest_bytes": sizes.rest_bytes, "file_bytes": sizes.file_bytes,
                               "smaller_than_fp16": round(sizes.ratio, 3)}, indent=1))
    else:
        pages.export_page(sizes)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--follow", is_flag=True, help="Draw it anew every few seconds, until Ctrl-C.")
def brain(run: Path, as_json: bool, follow: bool) -> None:
    """What the layers and brain modules of a run did: statistics by layer and over time, stages, phases, sleeps.

    Example: tryplicity brain runs/first --follow
    """
    from tryplicity.brain_page import show

    show(run, as_json=as_json, follow=follow)


@main.command()
@click.argument("run", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; wider than this machine needs a "
                                                                     "key, or --allow-public.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--api-key", metavar="KEY", help="What clients must send; also from TRYPLICITY_API_KEY.")
@click.option("--allow-public", is_flag=True, help="Listen wider than this machine without a key.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Another page that may call, as https://example.org.")
@click.option("--name", "hosts", multiple=True, metavar="HOST", help="A name under which the server may be reached.")
@click.option("--search", default="passages", show_default=True, metavar="RETRIEVER",
              help="passages, semantic, '{type: passages, index: FILE}', '{type: searxng, url: ...}', or none.")
@click.option("--conversations", metavar="FILE",
              help="Where they are kept, by default in the run folder, or without one in your data folder; none: not "
                   "at all.")
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1), help="Texts written at once.")
@click.option("--device", default="cpu", show_default=True, help="What the model runs on: cpu, cuda, cuda:1, mps.")
@click.option("--max-tokens", default=2048, show_default=True, type=click.IntRange(1), help="Most of one request.")
@plugin_options
def serve(run: str | None, plugins: Any, cors: tuple[str, ...], hosts: tuple[str, ...], **options: Any) -> None:
    """A page to ask and search on, and OpenAI's API, from the model of RUN: a run folder or an exported file.

    Without RUN there is search alone. Ctrl-C and SIGTERM let what runs end first.

    Example: tryplicity serve runs/first --port 5000
    """
    from tryplicity.server.app import serve as run_server
    from tryplicity.training.process import polite_threads, tune_malloc

    polite_threads()
    tune_malloc()
    run_server(run, plugins=plugins, cors=cors, hosts=hosts, **options)


main.add_command(data)
main.add_command(tokenizer)


@main.group()
def search() -> None:
    """An index of passages on this machine, for `serve` and for you.

    Example: tryplicity search ask "How do I join two paths?"
    """


@search.command("index")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="By default in the user's cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def search_index(source: str, out: Path | None, as_json: bool, plugins: Any) -> None:
    """Index the passages of SOURCE: a folder or file of text, python-docs, or what else --data takes.

    Example: tryplicity search index my_notes --out notes.sqlite
    """
    from tryplicity import pages
    from tryplicity.search import command

    with pages.preparation() as progress:
        answer = command.index(source, out, plugins.registry, progress)
    _echo(command.as_json(answer) if as_json else command.index_page(answer))


@search.command("ask")
@click.argument("question")
@click.option("--index", "path", type=click.Path(path_type=Path), metavar="FILE",
              help="By default the documentation of this installation.")
@click.option("--limit", default=5, show_default=True, type=click.IntRange(1, 50))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def search_ask(question: str, path: Path | None, limit: int, as_json: bool, plugins: Any) -> None:
    """The passages for QUESTION, best first.

    Example: tryplicity search ask "How do I join two paths?"
    """
    from tryplicity import pages
    from tryplicity.search import command

    with pages.preparation() as progress:
        answer = command.ask(question, path, limit, plugins.registry, progress)
    _echo(command.as_json(answer) if as_json else command.ask_page(answer))


@main.group()
def plugins() -> None:
    """Who provides what, and what failed and why."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def list_plugins(as_json: bool, plugins: Any) -> None:
    """Every plugin found: where it comes from, what it provides, why it was left out.

    Example: tryplicity plugins list --plugin my_layer.py
    """
    from dataclasses import asdict

    from tryplicity.pages import plugin_table

    _Group.verdict = 1 if plugins.registry.failures else 0
    if as_json:
        click.echo(json.dumps({"plugins": [asdict(p) for p in plugins.found]}, indent=1))
    else:
        plugin_table(plugins)
    sys.exit(_Group.verdict)


@main.command()
@click.option("--hardware", is_flag=True, help="Of a hardware profile instead.")
@plugin_options
def schema(hardware: bool, plugins: Any) -> None:
    """Print the JSON Schema of a spec, composed from the installed plugins, for your editor.

    Example: tryplicity schema > spec.schema.json
    """
    from tryplicity.hardware import hardware_schema
    from tryplicity.spec import spec_schema

    compose = hardware_schema if hardware else spec_schema
    click.echo(json.dumps(compose(plugins.registry), indent=1))


@main.command()
@build_options
@click.option("--data", metavar="SOURCE", help="As of `train`.")
@click.option("--without", "modules", multiple=True, required=True, metavar="TYPE[,TYPE...]",
              help="A component that the spec names by this type (spike, hyper_connections, ...): a row of the table. "
                   "May be repeated.")
@click.option("--alone", is_flag=True, help="Add each module to the spec without any of them, instead of taking it "
                                            "from the spec as it is.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Trainings of each variant.")
@click.option("--tokens", required=True, type=Number(1, 1e18, whole=True),
              help="Tokens of each training (2e6 will do).")
@click.option("--rows", default=256, show_default=True, type=click.IntRange(0),
              help="Held-out rows that a finished training is scored on, spread evenly; 0: all.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Where cells and reports are kept; what is finished there is not done again.")
@click.option("--jobs", type=click.IntRange(1), help="Trainings at once, by default one for each core.")
@click.option("--report", "report_only", is_flag=True, help="Only report what is finished.")
@click.option("--no-cost", is_flag=True, help="Do not measure step time and memory.")
@click.option("--cost-only", is_flag=True, help="Measure step time and memory, and train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def ablate(plugins: Any, modules: tuple[str, ...], data: str | None, tokens: int, report_only: bool, no_cost: bool,
           cost_only: bool, as_json: bool, **options: Any) -> None:
    """What each module of SPEC buys: train with and without it, from the same seeds and data, and compare.

    Ctrl-C and SIGTERM save; the same command goes on, and never trains the same cell twice.

    Example: tryplicity ablate tiny --hw cpu --without spike,bitlinear --seeds 3 --tokens 2e6 --out ablations/tiny
    """
    if report_only + no_cost + cost_only > 1:
        raise UserError("give one of --report, --no-cost and --cost-only")
    from tryplicity.ablation.command import Request
    from tryplicity.ablation.command import ablate as run

    without = tuple(name.strip() for text in modules for name in text.split(",") if name.strip())
    request = Request(modules=without, data=named(data, plugins, "pretrain"), tokens=tokens,
                      plugin_files=given_plugins(click.get_current_context()), **options)
    code = run(request, plugins, train=not (report_only or cost_only), cost=not (report_only or no_cost),
               as_json=as_json)
    if code:
        sys.exit(code)


@main.command()
@click.argument("spec", default="tiny")
@click.option("--hw", "hardware", metavar="HW", help="Examine it as this profile says: device, precision. By default "
                                                     "what is here.")
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="As of `build`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@plugin_options
def doctor(spec: str, hardware: str | None, settings: tuple[str, ...], as_json: bool, plugins: Any) -> None:
    """What this machine has, which way the layers of SPEC go on it, and whether the fast ways are right here.

    One block of each kind is tried: compiled, with packed documents, token by token, packed. Exits with 1 if one of
    these differs from the plain way.

    Example: tryplicity doctor 5090
    """
    from tryplicity import doctor as examination
    from tryplicity import pages
    from tryplicity.hardware import load_hardware
    from tryplicity.spec import load_spec

    own = [s for s in settings if not s.startswith("hardware.")]
    profile = load_hardware(hardware, plugins.registry, [s.removeprefix("hardware.") for s in settings
                                                         if s not in own]) if hardware else None
    loaded = load_spec(spec, plugins.registry, own)
    with pages.working("trying"):
        findings = examination.examine(loaded, profile)
    _Group.verdict = 0 if findings.healthy else 1
    if as_json:
        click.echo(json.dumps(findings.as_dict(), indent=1))
    else:
        pages.doctor_page(findings)
    sys.exit(_Group.verdict)


@main.command()
@click.option("--minutes", default=2.0, show_default=True, type=Number(0, 1e9, min_open=True), help="Of training.")
@click.option("--run", "folder", default="runs/quickstart", show_default=True, type=click.Path(path_type=Path))
@click.option("--port", default=5000, show_default=True, type=click.IntRange(0, 65535), help="Of the page.")
@click.option("--no-page", is_flag=True, help="End before the page.")
@plugin_options
def quickstart(minutes: float, folder: Path, port: int, no_page: bool, plugins: Any) -> None:
    """The whole way on this machine: plan, prepare, train a tiny model, let it write and answer, open its page.

    Example: tryplicity quickstart --minutes 2
    """
    from tryplicity import pages
    from tryplicity.builder import build as assemble

    pages.heading("1  Plan", "tryplicity build tiny --hw cpu")
    pages.build_page(assemble("tiny", "cpu", plugins.registry))
    folder = _free(folder)
    pages.heading("2  Train", f"tryplicity train tiny --hw cpu --run {folder} --minutes {minutes:g}")
    train_into(Training("tiny", "cpu", folder), plugins, minutes=minutes)
    from tryplicity.inference.chat import dialogue, reply
    from tryplicity.inference.engine import Engine
    from tryplicity.inference.sampler import Sampling

    prompts = ("The function returns", "A list is")
    pages.heading("3  Write", f'tryplicity generate {folder} "{prompts[0]}"')
    engine = Engine.load(folder, plugins.registry)
    for prompt in prompts:
        _write(engine, prompt, Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.1, seed=1), 60)
        _echo()
    question = "What is list.append?"
    pages.heading("4  Ask", f'tryplicity generate {folder} --chat "{question}" --temperature 0')
    _echo(click.style(question, bold=True))
    _print(reply(engine, dialogue(question), Sampling(temperature=0), 60))
    engine.close()
    pages.next_steps(folder)
    if no_page:
        return
    from tryplicity.server.app import serve as run_server

    port = _free_port(port)
    pages.heading("5  Talk to it", f"tryplicity serve {folder} --port {port}")
    run_server(folder, plugins=plugins, port=port,
               say=lambda address: click.echo(f"\nopen {address} in a browser; Ctrl-C ends it"))


def _free_port(wanted: int) -> int:
    """The port, or the next one that is free."""
    import socket

    for port in range(wanted, min(wanted + 20, 65536)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    return wanted


def _free(folder: Path) -> Path:
    """The folder, or with a number behind its name if a run is there already."""
    from tryplicity.run import Run

    number, free = 2, folder
    while Run(free).exists():
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free


if __name__ == "__main__":
    main()
