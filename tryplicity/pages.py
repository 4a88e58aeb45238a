"""What a person sees in the terminal: the build page, live training, tables. Loads no torch."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as _Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


class Console(_Console):
    """Leaves a closed pipe to the command, which knows what to exit with; rich itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = Console(highlight=False, soft_wrap=True)
status = Console(stderr=True, highlight=False, soft_wrap=True)

ACCENT = "#8b5cf6"


def is_live() -> bool:
    """Whether a line can be rewritten; elsewhere (a file, TERM=dumb) there are lines one below another."""
    return status.is_terminal and not status.is_dumb_terminal


@contextmanager
def working(what: str) -> Iterator[None]:
    """Something moves while a thing is done that may take more than a moment."""
    if not is_live():
        yield
        return
    with status.status(what, spinner_style=ACCENT):
        yield


def heading(text: str, command: str) -> None:
    console.print()
    console.print(Text.assemble((text, f"bold {ACCENT}"), "   ", (command, "dim")))


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 48 else f"{hours / 24:.1f}d"


def _plain_table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left")
    return table


def build_page(built: Any, verdict: Any = None) -> None:
    """The answer to: will it fit, how fast, what does it cost. verdict: of `--simulate`."""
    plan = built.plan.as_dict()
    hardware, memory, strategy = built.hardware, plan["memory"], plan["strategy"]
    console.print(Text.assemble((plan["name"], "bold"), f" on {hardware.described} "
                                f"({hardware.memory_gb:g} GB each, {hardware.precision})"))
    console.print()
    _print_layers(plan["layers"])
    console.print()
    _print_training(built.spec)
    parameters = plan["parameters"]
    facts = _plain_table("", "", right=(1,))
    facts.show_header = False
    facts.add_row("parameters", f"{parameters['total']:,}")
    facts.add_row("active on a token (all but the experts it does not choose)", f"{parameters['active']:,}")
    facts.add_row("packed bytes read per token", f"{plan['packed_bytes_per_token']:,}")
    console.print(facts)
    console.print()
    _print_memory(memory, verdict and verdict.as_dict()["simulated"])
    console.print()
    if verdict:
        _print_verdict(verdict)
    elif plan["fits"]:
        console.print(Text.assemble(("fits", "bold green"), f": {strategy['chosen']}, {memory['total_gb']:.1f} of "
                                    f"{memory['budget_gb']:g} GB, {memory['headroom_gb']:.1f} GB to spare"))
        if memory["compiled_at_most_gb"] is not None:
            console.print(f"  with blocks as eager PyTorch runs them; compiled ones (training.compile: auto) take "
                          f"{memory['compiled_at_most_gb']:.1f} GB at most, and --set training.compile=on asks the "
                          "compiler", style="dim")
        elif memory["blocks"] == "larger":
            console.print("  with the larger of blocks as eager PyTorch runs them and compiled ones "
                          "(training.compile: auto)", style="dim")
    else:
        console.print(Text.assemble(("does not fit", "bold red"), f": the nearest plan needs {memory['total_gb']:.1f} "
                                    f"of {memory['budget_gb']:g} GB"))
    for other in strategy["rejected"]:
        console.print(f"  not {other['name']}: {other['reason']}", style="dim")
    speed, cost = plan["throughput"], plan["cost"]
    console.print(f"speed: about {speed['tokens_per_second']:,.0f} tokens/s, "
                  f"{_count(speed['flops_per_token'])}FLOP a token")
    console.print(f"  {speed['basis']}", style="dim")
    saving = plan["saving"]
    console.print(f"disk: {saving['disk_gb']:,.2f} GB, {saving['checkpoint_gb']:,.2f} a checkpoint and up to "
                  f"{saving['checkpoints_at_most']} at once, one more after an interruption")
    if hardware.device != "cpu":
        console.print(f"  {saving['machine_memory_gb']:,.2f} GB of a machine's own memory while one is written",
                      style="dim")
    if cost["per_hour"]:
        console.print(f"money: ${cost['per_hour']:,.2f} an hour, ${cost['per_billion_tokens']:,.0f} per billion tokens")


def _print_memory(memory: dict[str, Any], simulated: dict[str, Any] | None) -> None:
    """The peak part by part: as planned, and as simulated."""
    plans = [memory, simulated] if simulated else [memory]
    heads = ("planned, GB", "simulated, GB") if simulated else ("GB",)
    table = _plain_table("memory per device", *heads, right=(1, 2))
    for name in dict.fromkeys(name for plan in plans for name in plan["parts"]):
        sizes = [plan["parts"].get(name, 0.0) for plan in plans]
        if max(sizes) >= 0.005:
            table.add_row(f"  {name}", *(f"{size:.2f}" for size in sizes))
    table.add_row(Text("  peak", style="bold"), *(Text(f"{plan['total_gb']:.2f}", style="bold") for plan in plans))
    if simulated is None or simulated["moment"] == memory["moment"]:
        table.add_row(f"  at the {memory['moment']}")
    console.print(table)
    if simulated and simulated["moment"] != memory["moment"]:
        console.print(f"  planned at the {memory['moment']}, simulated at the {simulated['moment']}")
    if simulated:
        differs = simulated["closed_form_differs"]
        console.print(f"  the closed form is {abs(differs):.2%} {'above' if differs >= 0 else 'below'} what the "
                      f"simulation counted ({simulated['seconds']:.0f} s of processor time, "
                      f"{simulated['resident_gb']:.1f} GB)", style="dim")


def _print_verdict(verdict: Any) -> None:
    """Whether the simulated step fits, and what would be faster."""
    said, asked = verdict.as_dict(), verdict.asked
    word, style = ("fits", "bold green") if verdict.fits else ("does not fit", "bold red")
    console.print(Text.assemble((word, style), f", simulated: {asked.strategy}, {said['simulated']['total_gb']:.1f} of "
                                f"{asked.hardware.memory_gb:g} GB"))
    table = _plain_table("neighbours", "batch", "checkpointing", "GB", "tokens/s", "", right=(3, 4))
    unfit = 0
    for one in said["neighbours"]:
        if not one["fits"] and one["simulated_gb"] is None:
            unfit += 1
            continue
        size = one["simulated_gb"] or one["total_gb"]
        notes = ["simulated" if one["simulated_gb"] else "", "" if one["fits"] else "does not fit",
                 "fastest" if said["fastest"] == {name: one[name] for name in said["fastest"] or {}} else ""]
        table.add_row(f"  {one['strategy']}", f"{one['batch']} x {one['accumulation']}",
                      "yes" if one["activation_checkpointing"] else "no", f"{size:.1f}",
                      f"{one['tokens_per_second']:,.0f}", ", ".join(filter(None, notes)))
    console.print(table)
    if unfit:
        console.print(f"  and {unfit} that do not fit", style="dim")
    if verdict.fastest not in (None, asked):
        settings = (f"--set hardware.{name}={str(value).lower()}" for name, value in said["fastest"].items())
        console.print(f"the fastest that fits: {' '.join(settings)}", markup=False)


def _print_training(spec: Any) -> None:
    """The brain modules of the whole model, and the phases where there are several."""
    facts = _plain_table("", "")
    facts.show_header = False
    if spec.brain:
        facts.add_row("brain", ", ".join(part.name for part in spec.brain))
    if len(spec.phases) > 1:
        shares = sum(phase.share or 1 for phase in spec.phases if phase.kind != "sleep")
        facts.add_row("phases", ", ".join(
            phase.kind if phase.kind == "sleep" else f"{phase.kind} {(phase.share or 1) / shares:.0%}"
            for phase in spec.phases))
    if facts.row_count:
        console.print(facts)
        console.print()


def _print_layers(layers: list[dict[str, Any]]) -> None:
    """Runs of equal layers as one row each."""
    table = _plain_table("layers", "mixer", "feed-forward", "parameters each", right=(3,))
    start = 0
    kinds = [(layer["mixer"], layer["feed_forward"], layer["parameters"], layer.get("shared_with")) for layer in layers]
    for i in range(1, len(layers) + 1):
        same = i < len(layers) and kinds[i] == kinds[start]
        if not same:
            label = f"{start}" if i - start == 1 else f"{start}-{i - 1}"
            first = layers[start]
            own = f"those of {first['shared_with']}" if "shared_with" in first else f"{first['parameters']:,}"
            table.add_row(label, first["mixer"] or "-", first["feed_forward"] or "-", own)
            start = i
    console.print(table)


@contextmanager
def preparation() -> Iterator[Any]:
    """A progress callback `(what, done, total)` for preparing data; total None where unknown."""
    columns = (SpinnerColumn(style=ACCENT), TextColumn("{task.description}"), BarColumn(complete_style=ACCENT),
               TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=status, transient=False, disable=not is_live()) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: float, total: float | None = None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
                if not is_live():
                    status.print(what)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


@contextmanager
def training() -> Iterator[Any]:
    """A watcher for the training loop: a live line on a terminal, a line every ten seconds elsewhere."""
    if not is_live():
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16, complete_style=ACCENT),
               TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=status) as bar:
        yield _Live(bar)


class _Live:
    """One line that is rewritten at each step."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.task = bar, bar.add_task("starting", total=1.0, figures="")
        self.smooth, self.held_out = _Smooth(), ""

    def step(self, progress: Any, metrics: dict[str, Any], spent: float, left: float) -> None:
        loss, speed = self.smooth(metrics), metrics["tokens_per_second"]
        if (held_out := _held_out(metrics)) is not None:
            self.held_out = f"  held-out {held_out:.2f} bits/byte"
        figures = f"loss {loss:.3f}  {speed:,.0f} tokens/s  {duration(left)} left{_cost(metrics)}{self.held_out}"
        self.bar.update(self.task, completed=spent, description=f"step {progress.step}", figures=figures)

    def note(self, text: str) -> None:
        self.bar.console.print(text)

    def scoring(self, share: float, left: float) -> None:
        self.bar.update(self.task, completed=share, description="scoring held-out text",
                        figures=f"{duration(left)} left")


def _held_out(metrics: dict[str, Any]) -> float | None:
    """The score of the phase's own held-out part, at the steps that have one."""
    return next((value for key, value in metrics.items() if key.endswith("validation_bits_per_byte")), None)


def _cost(metrics: dict[str, Any]) -> str:
    """What was spent so far, where the machine has a price."""
    return f"  ${metrics['dollars']:,.2f}" if "dollars" in metrics else ""


class _Smooth:
    """The running mean of the loss, so that the live line can be read."""

    def __init__(self) -> None:
        self.loss = None

    def __call__(self, metrics: dict[str, Any]) -> float:
        loss = metrics["loss"]
        self.loss = loss if self.loss is None or loss != loss else 0.9 * self.loss + 0.1 * loss
        return self.loss


class _Lines:
    """A line every ten seconds, and at each validation."""

    def __init__(self) -> None:
        self.smooth, self.last = _Smooth(), 0.0

    def step(self, progress: Any, metrics: dict[str, Any], spent: float, left: float) -> None:
        loss, speed = self.smooth(metrics), metrics["tokens_per_second"]
        text = f"step {progress.step}  {spent:4.0%}  loss {loss:.3f}  {speed:,.0f} tokens/s  {duration(left)} left"
        text += _cost(metrics)
        if (held_out := _held_out(metrics)) is not None:
            self._print(f"{text}  held-out {held_out:.3f} bits/byte")
        elif time.monotonic() - self.last > 10:
            self._print(text)

    def note(self, text: str) -> None:
        self._print(text)

    def scoring(self, share: float, left: float) -> None:
        if time.monotonic() - self.last > 10:
            self._print(f"scoring held-out text  {share:4.0%}  {duration(left)} left")

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        print(text, file=sys.stderr, flush=True)


def training_summary(run: Any, outcome: Any, prepared: Any) -> None:
    """The loss curve, the held-out figure beside what everyone could have without a model, and where things are."""
    from tryplicity.training.metrics import curve, read_lines

    lines = read_lines(run.metrics)
    drawn = curve([line["loss"] for line in lines if line.get("loss") is not None])
    if drawn:
        console.print(Text("training loss (nats a token)", style="dim"))
        console.print(Text(drawn, style=ACCENT))
    progress = outcome.progress
    cost = f", ${outcome.dollars:,.2f}" if outcome.dollars else ""
    console.print(f"{progress.step:,} steps, {_count(progress.tokens)} tokens, {duration(progress.seconds)}{cost}")
    if outcome.left_out:
        console.print(str(outcome.left_out))
    if outcome.reason == "interrupted":
        console.print(f"interrupted; all is saved at step {progress.step}. Go on with the same command and --resume")
    else:
        own = "none" if outcome.bits_per_byte is None else f"{outcome.bits_per_byte:.3f}"
        console.print(f"held-out bits per byte: {own}, and a byte bigram model of the same text: "
                      f"{prepared.bigram_bits_per_byte():.3f}")
        for sentence in prepared.yardsticks().sentences():
            console.print(sentence, style="dim", markup=False)
        if outcome.chat_bits_per_byte is not None:
            console.print(f"held-out bits per byte of the assistant's answers: {outcome.chat_bits_per_byte:.3f}")
        console.print(f"weights: {run.weights}   every step: {run.metrics}", style="dim")
    _print_measured(json.loads(run.build.read_text(encoding="utf-8")))


def _print_measured(build: dict[str, Any]) -> None:
    """What was planned and what it came to."""
    measured = build.get("measured")
    if measured is None:
        return
    tensors = (f"; tensors {measured['tensors_gb']:.2f} GB (planned {measured['planned_tensors_gb']:.2f})"
               if "tensors_gb" in measured else "")
    console.print(f"peak memory of a device: {measured['peak_gb']:.2f} GB "
                  f"(planned {measured['planned_peak_gb']:.2f}){tensors}", style="dim")
    if "utilisation" in measured:
        console.print(f"speed: {measured['tokens_per_second']:,.0f} tokens/s (planned "
                      f"{measured['planned_tokens_per_second']:,.0f}); for plans as fast as this, the profile's "
                      f"utilisation: {measured['utilisation']:.2g}", style="dim")


def plugin_table(plugins: Any) -> None:
    table = _plain_table("plugin", "from", "provides")
    for plugin in plugins.found:
        if plugin.cause:
            what = Text(f"left out: {plugin.cause}", style="dim" if plugin.disabled else "red")
        else:
            kinds = {**plugin.families, **({"hooks": plugin.hooks} if plugin.hooks else {})}
            what = Text("\n".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items()))
        table.add_row(plugin.name, plugin.origin, what)
    Console(highlight=False).print(table)


def next_steps(folder: Path, models: Iterable[Any] = ()) -> None:
    """What can be done after the quickstart; models: NamedModels, trained by others, to talk to beside it."""
    heading("Next", "")
    steps = [(f'tryplicity generate {folder} "A dictionary is"', "let it write more"),
             (f"tryplicity brain {folder}", "spikes, experts, surprise, stages, sleeps: by layer and over time"),
             ("tryplicity build full --hw h200", "plan the 9-billion model on eight H200"),
             ("cp specs/tiny.yaml my.yaml", "make it yours, then: tryplicity build my.yaml --hw cpu"),
             ("tryplicity train my.yaml --hw cpu --data path/to/texts --run runs/mine --minutes 10",
              "train on your own text")]
    for model in models:
        there = model.find() is not None
        steps.append((f"tryplicity serve {model.name}" if there else model.install,
                      f"talk to a model that others trained: {model.about}"
                      + ("" if there else f"; then: tryplicity serve {model.name}")))
    if shutil.which("tryplicity") is None:
        steps.insert(0, (f"source {Path(sys.prefix) / 'bin' / 'activate'}", "so that your shell finds tryplicity"))
    for command, what in steps:
        console.print(Text.assemble("  ", (command, "bold"), "   ", (what, "dim")))


def export_page(sizes: Any) -> None:
    """What an export wrote, and how much smaller it is."""
    table = _plain_table("", "MB", "", right=(1,))
    table.add_row(f"{sizes.packed_as} weights", f"{sizes.packed_bytes / 1e6:,.2f}",
                  f"{sizes.packed_weights:,} weights; {sizes.ratio:.2f} times smaller than in fp16")
    forms = ", ".join(f"{bytes_ / 1e6:,.2f} in {form.lower()}" for form, bytes_ in sorted(sizes.rest.items()))
    table.add_row("everything else", f"{sizes.rest_bytes / 1e6:,.2f}", forms)
    table.add_row("file", f"{sizes.file_bytes / 1e6:,.2f}", str(sizes.path))
    Console(highlight=False, soft_wrap=True).print(table)


def evaluation_page(said: dict[str, Any]) -> None:
    """A model's bits per byte by domain, and beside them what needs no model."""
    from tryplicity.evaluation.report import sentences

    table = _plain_table("held-out text", "bits per byte", "xz alone", "documents", "bytes", right=(1, 2, 3, 4))
    for domain, figures in said["domains"].items():
        own = "-" if figures["bits_per_byte"] is None else f"{figures['bits_per_byte']:.3f}"
        table.add_row(domain, own, f"{figures['xz']:.3f}", f"{figures['documents']:,}", f"{figures['bytes']:,}")
    table.add_row("all", f"{said['bits_per_byte']:.3f}", f"{said['yardsticks']['xz']:.3f}", f"{said['documents']:,}",
                  f"{said['bytes']:,}")
    console.print(table)
    for sentence in sentences(said):
        console.print(sentence, style="dim", markup=False)


def tasks_page(said: dict[str, Any]) -> None:
    """A model's results in tasks, as the harness names them."""
    table = _plain_table("task", "metric", "value", "standard error", right=(2, 3))
    for name, metrics in said["tasks"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{kind}")
                table.add_row(name, metric if kind == "none" else f"{metric} ({kind})", f"{value:.4f}",
                              f"{error:.4f}" if isinstance(error, int | float) else "-")
    console.print(table)
    limit = f", the first {said['limit']} documents of each" if said["limit"] else ""
    console.print(f"lm-eval {said['lm_eval']}{limit}", style="dim")


def doctor_page(findings: Any) -> None:
    """What a machine has, which way the parts of a spec go on it, and what came of trying."""
    found = Console(highlight=False, soft_wrap=True)
    machine, table = dict(findings.machine), _plain_table("", "")
    for device in machine.pop("devices"):
        table.add_row("device", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items()))
    for name, value in machine.items():
        table.add_row(name.replace("_", " "), "none" if value is None else str(value))
    found.print(table)
    for line in findings.known_wrong:
        found.print(Text(f"known to be wrong: {line}", style="yellow"))
    table = _plain_table("layers", "part", "in training")
    for path in findings.paths:
        table.add_row(_ranges(path["layers"]), path["part"], path["path"])
    found.print(table)
    table = _plain_table("layers", "tried", "", "seconds", "", right=(3,))
    for trial in findings.trials:
        verdict = Text("good", style="green") if trial.ok else Text("WRONG", style="bold red")
        table.add_row(_ranges(trial.layers), trial.what, verdict, f"{trial.seconds:.1f}", trial.said)
    found.print(table)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 4] as 0-2, 4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
