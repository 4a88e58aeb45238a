"""`tryplicity train`: check, prepare the data once, and train, alone or with others; loads torch when it runs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from tryplicity.commands.options import (
    Number,
    build_options,
    forget_what_cannot_be_written,
    given_plugins,
    named,
    plugin_options,
    resolved,
)
from tryplicity.errors import Refused, UserError


@dataclass(frozen=True)
class Training:
    """What is to be trained on what, and where. line: how a worker of several is started with the same request."""

    spec: str
    hardware: str
    folder: Path
    settings: tuple[str, ...] = ()
    data: str | None = None
    chat_data: str | None = None
    tokenizer: Path | None = None
    resume: bool = False
    other_data: bool = False
    copy_to: str | None = None
    resume_from: str | None = None
    start: str | None = None
    plugin_files: tuple[str, ...] = ()
    line: tuple[str, ...] = ()


@click.command()
@build_options
@click.option("--data", metavar="SOURCE",
              help="A folder or file of text, huggingface:NAME, another source's name, or {type: ..., ...} as YAML. By "
                   "default the text that comes with Python: python-docs.")
@click.option("--chat-data", metavar="SOURCE",
              help="Conversations for the chat phases: a source, a .jsonl file, huggingface:NAME. By default what the "
                   "spec says, or questions about Python: python-docs-chat.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="FILE",
              help="A tokenizer.json of the spec's vocab_size (tryplicity tokenizer train). By default one is trained "
                   "on the data.")
@click.option("--run", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The run folder.")
@click.option("--steps", type=Number(1, whole=True), help="End after so many optimizer steps.")
@click.option("--tokens", type=Number(1, 1e18, whole=True), help="End after so many tokens (2e6 will do).")
@click.option("--minutes", type=Number(0, 1e9, min_open=True), help="End after so many minutes of training.")
@click.option("--dollars", type=Number(0, 1e9, min_open=True),
              help="End when so much is spent, at the profile's price of all its devices.")
@click.option("--resume", is_flag=True, help="Go on exactly where the newest complete checkpoint stands.")
@click.option("--other-data", is_flag=True, help="With --resume: even if the data is not what the run was begun with.")
@click.option("--copy-to", metavar="URL",
              help="Copy every complete checkpoint there too: a folder (file:///mnt/disk/first), s3://, gs://, sftp:// "
                   "and whatever else fsspec knows. With --resume and nothing in the run folder, go on from there.")
@click.option("--from", "start", metavar="RUN",
              help="Begin from trained weights: a run folder, a checkpoint, a file of weights, a model's name "
                   "(smollm2). What has the same name and shape is taken, the rest initialised; the tokenizer is "
                   "RUN's.")
@click.option("--resume-from", metavar="URL", help="Fetch a run that was copied there, and go on with it.")
@plugin_options
def train(spec: str, hardware: str, settings: tuple[str, ...], data: str | None, chat_data: str | None,
          tokenizer: Path | None, folder: Path, steps: int | None, tokens: int | None, minutes: float | None,
          dollars: float | None, resume: bool, other_data: bool, copy_to: str | None, start: str | None,
          resume_from: str | None, plugins: Any) -> None:
    """Train SPEC, from scratch or from trained weights, into a run folder. Ctrl-C and SIGTERM save first.

    Where the profile has several devices, each gets a process of its own, started here; started by torchrun or by
    srun, on one machine or several (hardware.nodes), this is one of theirs.

    \b
    Example: tryplicity train tiny --hw cpu --data python-docs --run runs/first --minutes 2
             tryplicity train tiny --hw cpu --set hardware.count=2 --set hardware.strategy=ddp --run runs/two --steps 40
    """
    budget = {"steps": steps, "tokens": tokens, "minutes": minutes, "dollars": dollars}
    if sum(x is not None for x in budget.values()) != 1:
        raise UserError("say when to end: exactly one of --steps, --tokens, --minutes and --dollars")
    context = click.get_current_context()
    request = Training(spec, hardware, folder, settings, data, chat_data, tokenizer, resume or bool(resume_from),
                       other_data, copy_to, resume_from, start, given_plugins(context),
                       ("train", *options_of(context)))
    train_into(request, plugins, **budget)


def options_of(context: click.Context) -> list[str]:
    """The arguments that call a command the same way again."""
    said, behind = [], []
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if isinstance(parameter, click.Argument):
            behind.append(str(value))
        elif getattr(parameter, "is_flag", False):
            said += [parameter.opts[0]] if value else []
        elif value is not None:
            for one in value if parameter.multiple else [value]:
                said += [parameter.opts[0], str(one)]
    return [*said, "--", *behind]


def train_into(request: Training, plugins: Any, **budget: Any) -> Any:
    """Train in the folder, which is this process's alone, or its launcher's; end as a signal asks."""
    from tryplicity.run import Run
    from tryplicity.training import launching
    from tryplicity.training.process import exit_code, limit_spinning

    limit_spinning()
    launching.adopt_slurm()
    rank = launching.rank()
    launching.tie_to_parent()
    run = Run(request.folder)
    with _folder(run, request) if rank == 0 and not launching.launched() else contextlib.nullcontext():
        outcome = _train_in(run, request, plugins, budget)
    if outcome is not None and outcome.signal is not None:
        forget_what_cannot_be_written()
        sys.exit(exit_code(outcome.signal))
    return outcome


@contextlib.contextmanager
def _folder(run: Any, request: Training) -> Iterator[None]:
    from tryplicity.training.folder import alone, check_free

    with alone(run):
        if run.exists() and not request.resume:
            raise UserError(f"{run.folder}: a run is there already; add --resume to go on with it, or give another "
                            "--run")
        check_free(run, request.resume)
        if request.copy_to or request.resume_from:
            from tryplicity.training.copying import begin

            begin(run, request.resume, request.copy_to, request.resume_from)
        yield


def _train_in(run: Any, request: Training, plugins: Any, budget: dict[str, Any]) -> Any:
    """Check, prepare the data, and train; or start those that do, and see them through."""
    from tryplicity import pages
    from tryplicity.hardware import load_hardware
    from tryplicity.training import launching
    from tryplicity.training.folder import check_room
    from tryplicity.training.process import allocator_settings, tune_malloc

    own = [s.removeprefix("hardware.") for s in request.settings if s.startswith("hardware.")]
    profile = load_hardware(request.hardware, plugins.registry, own)
    allocator_settings(profile)
    if budget.get("dollars") is not None and not profile.price_per_hour:
        raise UserError(f"--dollars: {profile.name} has no price; give one (--set hardware.price_per_hour=2.5), or end "
                        "by --minutes")
    from tryplicity.builder import build as assemble

    built = assemble(request.spec, request.hardware, plugins.registry, request.settings)
    if not built.plan.fits:
        pages.build_page(built)
        raise Refused(f"{built.spec.name} does not fit on {built.hardware.name}")
    wanted = built.strategy.ranks(built.hardware)
    _check_processes(built, wanted)
    _check_devices(built.hardware, 1 if launching.is_worker() else wanted)
    if launching.rank() == 0 and not launching.launched():
        check_room(run, built.plan.saving)
    start = _start(run, request, plugins)
    if start is not None and not (request.resume and run.exists()):
        request = replace(request, tokenizer=start.tokenizer)
    pages.status.quiet = launching.rank() != 0 or launching.launched()  # who launched them has said it
    try:
        with contextlib.nullcontext() if launching.launched() or not launching.is_worker() else launching.in_turn():
            prepared, phase_data, left_out = _prepare(run, built, request, plugins, budget)
    finally:
        pages.status.quiet = False
    tune_malloc()
    if not run.exists() and launching.rank() == 0:
        from tryplicity.spec import dump_yaml

        run.create(spec=built.spec.as_yaml(), hardware=dump_yaml(asdict(built.hardware)),
                   build=built.plan.as_dict(), tokenizer=prepared.tokenizer_path.read_text(encoding="utf-8"),
                   tokenizer_config=prepared.tokenizer_config,
                   data={"source": named(request.data, plugins, "pretrain"), "fingerprint": prepared.identity,
                         "left_out": {what: passed_over.as_dict() for what, passed_over in left_out.items()}})
    if launching.rank() == 0:
        run.remember(request.plugin_files)
    if wanted > 1 and not launching.is_worker():
        pages.status.print(f"on {wanted} ranks of this machine, {built.plan.chosen.name}", markup=False)
        if code := launching.supervise(request.line, wanted, run):
            forget_what_cannot_be_written()
            sys.exit(code)
        return None
    return _train_with_all(run, built, prepared, phase_data, request, plugins, budget, start)


def _check_processes(built: Any, wanted: int) -> None:
    """Raises UserError where a launcher started other ranks than the profile has devices, or somebody has to start
    those of several machines."""
    from tryplicity.training import launching

    hardware = built.hardware
    if not launching.is_worker():
        if wanted > hardware.count:
            raise UserError(f"{hardware.name}: {hardware.nodes} machines are to train together, and each has to be "
                            f"told: torchrun --nnodes={hardware.nodes} --nproc-per-node={hardware.count} "
                            "--node-rank=0 (then 1, ...) --master-addr=ADDRESS-OF-THE-FIRST --no-python -- tryplicity "
                            "train ...; `tryplicity launch` writes that for Slurm and SkyPilot")
        return
    size, here = launching.world_size(), launching.local_world_size()
    machines = f" --set hardware.nodes={size // here}" if size > here or hardware.nodes > 1 else ""
    if size != wanted:
        raise UserError(f"{size} processes were started, and {hardware.name} with {built.plan.chosen.name} wants "
                        f"{wanted}: start {wanted}, or --set hardware.count={here}{machines}")
    if here != min(hardware.count, wanted):
        raise UserError(f"{here} of the {size} processes were started on this machine, and {hardware.name} has "
                        f"{hardware.count} devices in each: --set hardware.count={here}{machines}")


def _check_devices(hardware: Any, wanted: int) -> None:
    """Raises UserError where this machine is not the one that the profile describes."""
    import torch

    if hardware.torch_device == "cuda" and (offered := torch.cuda.device_count()) < wanted:
        raise UserError(f"{hardware.name}: {wanted} x {hardware.accelerator} wanted, and torch sees {offered} GPUs on "
                        "this machine; train on one that has them, or with another profile (--hw)")


def _prepare(run: Any, built: Any, request: Training, plugins: Any, budget: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The data, that of the phases which have their own, and what was left out of each; warnings are said."""
    from tryplicity import pages
    from tryplicity.data import parse_source, prepare, prepare_conversations
    from tryplicity.training.stages import Stages, brains_of, data_of_phases

    chat_data, vocab_size, phases = request.chat_data, built.spec.vocab_size, built.spec.phases
    source = parse_source(plugins.registry, named(request.data, plugins, "pretrain"))
    if chat_data and all(phase.kind != "chat" for phase in phases):
        raise UserError("--chat-data: the spec has no chat phase to learn it in; leave it out, or add one: --set "
                        "'phases=[{kind: pretrain, share: 0.8}, {kind: chat, share: 0.2}]'")
    own = {i: part.build() for i, part in built.data.items()}
    for i, phase in enumerate(phases):
        if phase.kind == "chat" and (chat_data or i not in own):
            own[i] = parse_source(plugins.registry, named(chat_data, plugins, "chat"), "--chat-data")
        if phase.kind == "chat" and not chat_data and request.data is not None:
            pages.status.print(f"the chat phase learns {own[i].name}; another: --chat-data, none: --set phases=[]")
    with pages.preparation() as progress:
        prepared = prepare(source, vocab_size, progress=progress,
                           tokenizer=_tokenizer(run, request))
        words = prepared.tokenizer_path
        phase_data = {i: prepare_conversations(own[i], words, vocab_size, progress=progress)
                      if phases[i].kind == "chat" else prepare(own[i], vocab_size, progress=progress, tokenizer=words)
                      for i in own}
        of_phases = data_of_phases(built.spec, prepared, phase_data)
        stages = Stages(built.spec, brains_of(built.spec), of_phases, plugins.registry, built.spec.training.seed,
                        progress)
        left_out = {"data": prepared.left_out, **{f"phases[{i}]": phase_data[i].left_out for i in own}}
        for name, passed_over in zip((source.name, *(own[i].name for i in own)), left_out.values(), strict=True):
            if passed_over:
                pages.status.print(f"{name}: {passed_over}", markup=False)
        pages.status.print(prepared.yardsticks(progress).sentences()[-1], markup=False)
        for warning in stages.warnings(budget.get("tokens")):
            pages.status.print(f"warning: {warning}")
    return prepared, phase_data, left_out


def _start(run: Any, request: Training, plugins: Any) -> Any:
    """The trained weights to begin from, where nothing is gone on from; a run that was begun from some and has no
    checkpoint yet begins from them again. Raises UserError where they cannot be read."""
    from tryplicity.training import checkpoint, starting

    if request.start is not None and request.tokenizer is not None:
        raise UserError("--tokenizer: with --from the tokenizer is that of the weights; leave it out")
    if request.resume and checkpoint.steps(run.checkpoints):
        return None
    place = request.start if request.start is not None else starting.begun_from(run)
    return None if place is None else starting.opened(resolved(place, plugins).path)


def _tokenizer(run: Any, request: Training) -> Path | None:
    """The tokenizer that is given: the run's own, where it goes on. Raises UserError for another one."""
    if not (request.resume and run.exists()):
        return request.tokenizer
    if request.tokenizer is not None:
        from tryplicity.data import load_tokenizer

        if load_tokenizer(request.tokenizer).to_str() != load_tokenizer(run.tokenizer).to_str():
            raise UserError(f"--tokenizer: {request.tokenizer} is not the tokenizer of the run in {run.folder}, whose "
                            "weights are of no use with another; leave it out")
    return run.tokenizer


def _train_with_all(run: Any, built: Any, prepared: Any, phase_data: Any, request: Training, plugins: Any,
                    budget: dict[str, Any], start: Any) -> Any:
    """Join the other ranks, if there are any; train with a live line, and sum up, which rank 0 does for all."""
    from tryplicity import pages
    from tryplicity.training import launching, peers
    from tryplicity.training.loop import Budget, train
    from tryplicity.training.process import exit_code

    outcome, first = None, launching.rank() == 0
    budget = Budget(**budget, dollars_per_hour=built.hardware.machine_price_per_hour)
    try:
        with peers.together(built.hardware.torch_device, run) as world:
            data = {i: part.identity for i, part in {-1: prepared, **phase_data}.items()}
            peers.check_alike(world, {**peers.said_of(built), "data": data, "budget": asdict(budget),
                                      "resume": request.resume, "from": start and str(start.place)})
            peers.check_shared(world, run)
            with pages.training() if first else contextlib.nullcontext() as watcher:
                outcome = train(built, prepared, run, budget, plugins, phase_data=phase_data, resume=request.resume,
                                other_data=request.other_data, watcher=watcher, world=world,
                                copy_to=request.copy_to, start=start)
            if outcome.cut_short and world.size > 1:  # the others may be waiting for this one in the middle of a step
                os._exit(launching.NOTHING_LOST if launching.launched() else exit_code(outcome.signal))
        if first:
            pages.training_summary(run, outcome, prepared)
    except OSError:
        if outcome is None or outcome.signal is None:
            raise  # else the terminal went, and all is saved
    return outcome
