"""The brain page: real runs and files made line by line, read through the command as a user runs it."""

import json
import math
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from tryplicity import load_plugins
from tryplicity.brain_page import bars, sparkline
from tryplicity.brain_summary import Log, summary
from tryplicity.cli import main
from tryplicity.run import Run
from tryplicity.training.loop import Budget, train
from tryplicity.training.metrics import read_lines


@pytest.fixture
def make_run(tmp_path):
    """`make_run(lines, tail)`: a run folder whose metrics are these objects, and a tail that is no whole line."""

    def make(lines, tail="", name="run", spec="name: made\n"):
        run = Run(tmp_path / name)
        run.folder.mkdir(exist_ok=True)
        run.spec.write_text(spec)
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        return run

    return make


@pytest.fixture
def call(capfd, monkeypatch):
    """`call(run, columns=80)`: exit code, stdout and stderr of `tryplicity brain`."""

    def start(run, *options, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        code = 0
        try:
            main(["brain", str(run.folder), *options], prog_name="tryplicity")
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return start


def step(number, **values):
    return {"step": number, "tokens": 10 * number, "loss": 1.0 / number, "seconds": 0.5 * number, **values}


def statistics(told):
    return {statistic["name"]: statistic for statistic in told["statistics"]}


def test_a_real_run_shows_every_statistic_of_its_metrics_by_layer(make_build, prepared, tmp_path, call):
    build, run = make_build(), Run(tmp_path / "run")
    run.create(spec=build.spec.as_yaml(), hardware="", build={}, data={},
               tokenizer=prepared.tokenizer_path.read_text())
    train(build, prepared, run, Budget(steps=12), load_plugins())
    code, out, err = call(run, "--json")
    told, lines = json.loads(out), [line for line in read_lines(run.metrics) if "loss" in line]
    assert (code, err) == (0, "") and (told["step"], told["lines"], told["lines_read"]) == (12, 13, 13)
    rows = {row["key"]: row for statistic in told["statistics"] for row in statistic["rows"]}
    logged = {key for line in lines for key in line if "." in key}
    assert set(rows) == logged and len(logged) > 20
    for key, row in rows.items():
        values = [line[key] for line in lines if key in line]
        assert row["layer"] == int(key.split(".")[1])
        if isinstance(values[-1], list):
            assert (row["now"], row["lowest"], row["highest"]) == (values[-1], min(values[-1]), max(values[-1]))
        else:
            assert (row["now"], row["lowest"], row["highest"]) == (values[-1], min(values), max(values))
            assert len(row["over_time"]) == 12 and row["over_time"][-1] == values[-1]
    for columns in (80, 120, 200):
        code, page, _ = call(run, columns=columns)
        assert code == 0 and max(map(len, page.splitlines())) <= columns and "…" not in page
        for statistic in told["statistics"]:
            assert statistic["title"] in page
        assert f"{lines[-1]['loss']:.3f}" in page
        assert f"{100 * rows['layers.0.feed_forward.activation.zero_rate']['now']:.1f}%" in page


def test_a_strangers_statistics_show_under_their_own_names(make_run, call):
    lines = [step(i, **{"layers.0.mixer.zap_count": float(i), "layers.2.mixer.zap_count": 3.0 * i,
                        "objectives.dream.colour": 0.5}) for i in range(1, 5)]
    told = summary(make_run(lines))
    assert list(statistics(told)) == ["colour", "zap_count"]
    zap, colour = statistics(told)["zap_count"], statistics(told)["colour"]
    assert zap["title"] == "zap count"
    assert [(row["layer"], row["where"], row["now"], row["lowest"]) for row in zap["rows"]] == [
        (0, "mixer", 4.0, 1.0), (2, "mixer", 12.0, 3.0)]
    assert (colour["rows"][0]["layer"], colour["rows"][0]["where"]) == (None, "objectives.dream")
    _, page, _ = call(make_run(lines))
    assert "zap count" in page and "colour" in page and "dream" in page


def test_places_are_told_apart_where_a_layer_has_several(make_run, call):
    lines = [step(1, **{f"layers.{i}.feed_forward.{place}.zero_rate": 0.1 * i for i in (0, 1)
                        for place in ("activation", "shared_activation")})]
    _, page, _ = call(make_run(lines))
    for label in ("0 activation", "1 activation", "0 shared_activation", "1 shared_activation"):
        assert label in page


def changing(count):
    """Names that change at steps 301, 501 and 801 of 1000, and sleeps whose lines stand right before a change."""
    for i in range(1, count + 1):
        names = {"phase": "pretrain" if i <= count * 0.8 else "chat"}
        if i <= count * 0.8:
            names["stage"] = "infancy" if i <= count * 0.3 else "childhood" if i <= count * 0.5 else "mastery"
        yield step(i, **names, context_length=32 if i <= count * 0.3 else 64, **{"layers.0.x.y": float(i)})
        if i in (count * 0.5, count * 0.8):
            yield {"step": i, "tokens": 10 * i, "sleep": {
                "bits_per_byte_before": 2.5, "bits_per_byte_after": 2.25, "layers.0.moe.revived": 1.0,
                "layers.1.moe.revived": 2.0, "layers.0.spike.zero_rate_before": 0.5,
                "layers.1.spike.zero_rate_before": 0.75, "layers.0.spike.zero_rate_expected": 0.625,
                "layers.1.spike.zero_rate_expected": 0.875}}


@pytest.mark.parametrize("count", [10, 1000, 20_000])
def test_stages_phases_and_sleeps_are_exact_however_few_lines_are_read(make_run, call, count):
    run = make_run(changing(count))
    told = summary(run)
    assert told["lines"] == count + 2 and told["lines_read"] <= min(1100, count + 2)
    a, b, c = int(count * 0.3), int(count * 0.5), int(count * 0.8)
    spans = {key: [(s["name"], s["first_step"], s["last_step"], s["context_length"]) for s in spans]
             for key, spans in told["spans"].items()}
    assert spans == {"phase": [("pretrain", 1, c, 64), ("chat", c + 1, count, 64)],
                     "stage": [("infancy", 1, a, 32), ("childhood", a + 1, b, 64), ("mastery", b + 1, c, 64)]}
    assert told["spans"]["phase"][0]["tokens"] == 10 * c and told["spans"]["phase"][1]["last_loss"] == 1 / count
    assert told["now"] == {"phase": "chat"}
    assert [(sleep["step"], sleep["bits_per_byte_before"], sleep["bits_per_byte_after"])
            for sleep in told["sleeps"]] == [(b, 2.5, 2.25), (c, 2.5, 2.25)]
    _, page, _ = call(run)
    rows = {line.split("  ")[0]: line.split() for line in page.splitlines()}
    assert rows["bits per byte"][3:5] == ["2.500", "2.250"]
    assert rows["zero rate"][2:4] == ["0.6250", "0.7500"] and rows["revived"][1] == "3"  # a mean, and a sum
    assert max(map(len, page.splitlines())) <= 80 and "…" not in page
    assert ("evenly spread" in page) == (told["lines_read"] < told["lines"])


def test_a_long_file_is_sampled_and_the_newest_line_is_always_read(make_run):
    count = 20_000
    run = make_run([step(i, **{"layers.0.a.b": math.sin(i / count)}) for i in range(1, count + 1)])
    told = summary(run)
    assert 500 < told["lines_read"] <= 1001
    row = statistics(told)["b"]["rows"][0]
    assert told["step"] == count and row["now"] == pytest.approx(math.sin(1))
    for i, value in enumerate(row["over_time"]):  # means of forty equal stretches
        assert value == pytest.approx(math.sin((i + 0.5) / 40), abs=2e-3)


def test_a_cut_last_line_is_left_out_and_nan_and_null_are_no_numbers(make_run, call):
    lines = [step(1, **{"layers.0.a.b": 0.25}), step(2, **{"layers.0.a.b": float("nan")}),
             step(3, **{"layers.0.a.b": None}), {**step(4), "loss": None}, {**step(5), "loss": float("nan")}]
    run = make_run(lines, '{"step": 6, "lo')
    log = Log(run.metrics)
    assert (len(log.lines), log.total, log.unreadable) == (5, 6, 1)
    code, out, _ = call(run, "--json")
    told = json.loads(out)
    row = statistics(told)["b"]["rows"][0]
    assert (row["now"], row["lowest"], row["highest"]) == (0.25, 0.25, 0.25)
    assert told["losses_not_a_number"] == 2 and code == 0 and "NaN" not in out
    code, page, _ = call(run)
    assert code == 0 and "in 2 of the lines read the loss is not a number" in page


@pytest.mark.parametrize("text", ["", "\n", "not json\n", "[1]\n", "7\n", '{"loss": 1}\n', '{"step": 1}\n'])
def test_files_with_little_or_nothing_in_them_are_a_page_too(make_run, call, text):
    code, page, err = call(make_run([], text))
    assert (code, err) == (0, "") and page.strip()
    if "step" not in text:
        assert "no step is logged yet" in " ".join(page.split())
    code, out, _ = call(make_run([], text), "--json")
    assert code == 0 and json.loads(out)["statistics"] == []


def test_no_metrics_file_yet_and_no_run_at_all(make_run, call, tmp_path):
    run = make_run([])
    run.metrics.unlink()
    code, page, _ = call(run)
    assert code == 0 and "no step is logged yet" in " ".join(page.split())
    code, _, err = call(Run(tmp_path / "nowhere"))
    assert code == 2 and err.count("\n") == 1 and "no such run folder" in err


def test_a_run_without_brain_modules_says_so_in_one_line_and_shows_its_losses(make_run, call):
    code, page, _ = call(make_run([step(i) for i in range(1, 9)]), columns=200)
    assert code == 0 and sum("logs statistics" in line for line in page.splitlines()) == 1
    assert "activation: spike" in page and "loss (nats a token)" in page and "0.125" in page.replace("0.1250", "0.125")


def test_modules_that_log_nothing_by_layer_are_not_denied(make_run, call):
    """A curriculum and a sleep act on the run: no layer of it has statistics."""
    spec = "name: x\nbrain: [sleep_consolidation, {type: neuro_curriculum}]\n"
    run = make_run([step(i) for i in range(1, 9)], spec=spec)
    code, page, _ = call(run, columns=200)
    assert code == 0 and "its brain modules (sleep_consolidation, neuro_curriculum)" in page
    assert "One line of YAML brings" not in page
    assert json.loads(call(run, "--json")[1])["brain"] == ["sleep_consolidation", "neuro_curriculum"]


def test_what_is_the_same_in_all_layers_all_the_time_is_one_row(make_run, call):
    lines = [step(1, **{f"layers.{i}.router.experts_per_token": 2.0 for i in range(30)})]
    _, page, _ = call(make_run(lines))
    assert "all 30" in page and len(page.splitlines()) < 15


def test_sparkline_and_bars_say_what_they_draw():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, None, 7.0], 3) == "▁ █"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"  # means of neighbours
    assert sparkline([5.0, 5.0], 2) == "▄▄" and sparkline([], 5) == ""
    assert bars([0.25, 0.25, 0.25, 0.25], 8) == "▄▄▄▄"  # an even load
    assert bars([0.5, 0.25, 0.25, 0.0], 8) == "█▄▄·"  # a dead expert
    assert bars([1.0, 0.0, 0.0, 0.0], 2) == "█·" and bars([0.0, 0.0], 2) == "··"
    assert bars([-1.0, 1.0], 2) == "▁█"


def test_json_and_follow_together_are_refused(make_run, call):
    code, _, err = call(make_run([step(1)]), "--json", "--follow")
    assert code == 2 and "leave --follow away" in err


def test_follow_draws_a_new_step_and_ends_well_on_ctrl_c(make_run):
    run = make_run([step(1, **{"layers.0.a.b": 1.0})])
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "tryplicity.cli", "brain", str(run.folder), "--follow"],
                               stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_control,
                               env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"})
    os.close(slave)
    seen = b""

    def wait_for(text):
        nonlocal seen
        until = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < until, seen[-2000:]
            if select.select([master], [], [], 1)[0]:
                try:
                    seen += os.read(master, 65536)
                except OSError:
                    break

    wait_for(b"step 1,")
    with run.metrics.open("a") as file:
        file.write(json.dumps(step(2, **{"layers.0.a.b": 2.0})) + "\n")
    wait_for(b"step 2,")
    os.write(master, b"\x03")
    wait_for(b"\x1b[?1049l")  # the terminal's own screen is back
    assert process.wait(60) == 0
    os.close(master)
    assert b"Traceback" not in seen


def _control():
    """Make the terminal the process's own, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_it_loads_no_torch(make_run):
    run = make_run([step(1, **{"layers.0.a.b": 1.0})])
    program = (f"import sys; from pathlib import Path; from tryplicity.brain_page import show; "
               f"show(Path({str(run.folder)!r})); print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
