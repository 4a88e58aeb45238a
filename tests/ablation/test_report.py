"""The figures of the report, against numbers worked out by hand or looked up."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from tryplicity.ablation.picture import svg
from tryplicity.ablation.report import COLUMNS, NOTE, Effect, cells_of, holm, judge, markdown, page


def test_an_interval_worked_out_by_hand():
    # mean 0.02; deviations -0.01, 0, 0.01: variance 0.0002 / 2, sd 0.01; half-width 4.302653 * 0.01 / sqrt(3)
    effect = Effect([0.01, 0.02, 0.03])
    assert effect.mean == pytest.approx(0.02) and effect.deviation == pytest.approx(0.01)
    assert effect.interval == pytest.approx((0.02 - 0.0248414, 0.02 + 0.0248414), abs=1e-6)
    # t = 0.02 / (0.01 / sqrt(3)) = 3.4641; with two degrees of freedom p = 1 - t / sqrt(2 + t^2) = 1 - sqrt(12 / 14)
    assert effect.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)


def test_the_interval_holds_the_true_effect_19_times_in_20():
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        low, high = Effect([rng.gauss(0.3, 2.0) for _ in range(3)]).interval
        held += low <= 0.3 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.017)


def test_holms_correction_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, and none below the one before
    assert holm([0.03, 0.01, None, 0.04, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06], nan_ok=True)
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]


def test_of_modules_that_do_nothing_one_in_twenty_tables_finds_one_that_does_something():
    """Ten comparisons at once: uncorrected, two of five tables would."""
    rng, found, naive = random.Random(1), 0, 0
    for _ in range(150):
        effects = [Effect([rng.gauss(0.0, 1.0) for _ in range(3)]) for _ in range(10)]
        rows = [{"held_out_bits_per_byte": {}} for _ in effects]
        judge(rows, effects)
        found += any(row["verdict"] != "within noise" for row in rows)
        naive += any(row["held_out_bits_per_byte"]["p"] < 0.05 for row in rows)
    assert found / 150 < 0.12 and naive / 150 > 0.25


@pytest.mark.parametrize("differences, verdict", [
    ([-0.03, -0.031, -0.029], "pays"), ([0.03, 0.031, 0.029], "costs"), ([-0.03, 0.01, -0.02], "within noise"),
    ([-0.03], "one seed"), ([], "not finished"), ([-0.01, -0.01], "pays"), ([0.0, 0.0], "within noise"),
    ([-0.03, -0.02], "within noise"),  # one degree of freedom: 12.7 standard errors
])
def test_verdicts(differences, verdict):
    effect = Effect(differences)
    assert effect.verdict(effect.p) == verdict


def test_one_of_ten_must_be_ten_times_as_sure():
    strong, weak = Effect([-0.03, -0.031, -0.029]), Effect([-0.03, -0.04, -0.02])
    assert strong.p < 0.005 < weak.p < 0.05
    rows = [{"held_out_bits_per_byte": {}} for _ in range(10)]
    judge(rows, [weak, strong, *(Effect([-0.03, 0.01, 0.0]) for _ in range(8))])
    assert [row["verdict"] for row in rows[:3]] == ["within noise", "pays", "within noise"]
    assert rows[1]["held_out_bits_per_byte"]["p_holm"] == pytest.approx(10 * strong.p)


def rows():
    def row(module, differences, cost=None):
        effect = Effect(differences)
        with_it = None if not differences else 2.0 + effect.mean
        return {"module": module, "with": "baseline", "without": f"without-{module}",
                "held_out_bits_per_byte": {"with": with_it, "without": 2.0 if differences else None,
                                           "change": effect.mean, "standard_deviation": effect.deviation,
                                           "interval_95": effect.interval, "p": effect.p, "p_holm": effect.p,
                                           "by_seed": {}},
                "seeds": len(differences), "verdict": effect.verdict(effect.p), "cost": cost}

    cost = {"step_time_ratio": 1.034, "step_time_quartiles": [1.021, 1.05], "peak_memory_ratio": 1.2,
            "peak_memory_bytes": {"with": [120_000_000, 130_000_000], "without": [100_000_000, 104_000_000]}}
    return [row("spike", [-0.03, -0.031, -0.029], cost), row("a<b", [0.5]), row("sleep", [])]


@pytest.fixture
def report():
    return {"spec": "small", "command": "tryplicity ablate small.yaml --without spike", "alone": False,
            "tokens": 1000, "seeds": 3, "rows": 8, "data": "texts", "data_identity": "0123456789abcdef",
            "commits": ["abc"], "torch": ["2.13"], "processor": "a processor", "cores": 2, "modules": rows(),
            "cells": {"finished": 4, "total": 12, "each": []}}


def test_a_row_in_words():
    assert cells_of(rows()[0]) == (
        "spike", "1.9700", "2.0000", "-0.0300", "0.0010", "-0.0325 to -0.0275", "0.000", "3",
        "+3.4% (+2.1 to +5.0)", "+23 MB (+16 to +30)", "pays")
    assert cells_of(rows()[2]) == ("sleep", "-", "-", "-", "-", "-", "-", "0", "-", "-", "not finished")


def test_markdown_holds_the_command_and_a_whole_table(report):
    text = markdown(report)
    assert "    tryplicity ablate small.yaml --without spike\n" in text and NOTE in text
    assert "commit abc; torch 2.13; a processor, 2 cores" in text and "1,000 tokens a cell, 3 seeds" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and {line.count("|") for line in table} == {len(COLUMNS) + 1}


@pytest.mark.parametrize("width, terminal, shown", [(80, False, True), (90, True, False), (200, True, True)])
def test_the_page_is_whole_at_any_width(report, capsys, width, terminal, shown):
    from rich.console import Console

    page(report, Console(width=width, force_terminal=terminal, color_system=None, highlight=False, soft_wrap=True))
    out = capsys.readouterr().out
    assert "…" not in out and "-0.0325 to -0.0275" in out and ("1.9700" in out) == shown


def test_the_picture_parses_and_puts_dots_where_they_belong(report):
    drawing = ElementTree.fromstring(svg(report))
    tag = "{http://www.w3.org/2000/svg}"
    texts = {t.text: t for t in drawing.iter(f"{tag}text")}
    dots = list(drawing.iter(f"{tag}circle"))
    assert {"spike", "a<b", "sleep", "-0.0300  pays", "+0.5000  one seed", "not finished"} <= set(texts)
    assert len(dots) == 2  # none for what is not finished
    zero, tick = float(texts["0"].get("x")), float(texts["+0.2"].get("x"))
    at = [float(dot.get("cx")) for dot in dots]
    assert at == pytest.approx([zero + change / 0.2 * (tick - zero) for change in (-0.03, 0.5)], abs=0.2)
    whole = drawing.get("width"), drawing.get("height")
    assert all(0 <= float(t.get("x")) <= float(whole[0]) and 0 <= float(t.get("y")) <= float(whole[1])
               for t in texts.values())


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 50.0])
def test_the_axis_has_a_few_round_ticks_at_any_scale(report, scale):
    for row in report["modules"]:
        change = row["held_out_bits_per_byte"]
        if change["change"] is not None:
            change["change"] *= scale
            change["interval_95"] = change["interval_95"] and [scale * end for end in change["interval_95"]]
    drawing = ElementTree.fromstring(svg(report))
    middle = [t.text for t in drawing.iter("{http://www.w3.org/2000/svg}text") if t.get("text-anchor") == "middle"]
    assert 3 <= len(middle) <= 9 and len(set(middle)) == len(middle) and "0" in middle


def test_measured_pairs_by_seed_and_leaves_out_half_pairs(monkeypatch):
    from tryplicity.ablation import report as module

    monkeypatch.setattr(module, "cell", lambda variant, seed, setting: SimpleNamespace(key=f"{variant.label}{seed}"))
    row = SimpleNamespace(module="m", with_it=SimpleNamespace(label="with"), without_it=SimpleNamespace(label="out"))
    finished = {"with0": 2.0, "out0": 2.5, "with1": 2.1, "out1": 2.2, "with2": 9.0}  # seed 2 has no partner
    found = module.measured([row], 3, None, {k: {"held_out_bits_per_byte": v} for k, v in finished.items()}, {})[0]
    figures = found["held_out_bits_per_byte"]
    assert figures["change"] == pytest.approx(-0.3) and found["seeds"] == 2
    assert (figures["with"], figures["without"]) == pytest.approx((2.05, 2.35))
    assert math.isclose(figures["standard_deviation"], 0.2 * math.sqrt(2))
    assert json.loads(json.dumps(found))["cost"] is None


def test_the_published_table_is_its_figures_and_names_no_folder_of_a_machine():
    """The rows of docs/results.md out of docs/ablation.json, and that judged anew from its own differences."""
    docs = Path(__file__).parents[2] / "docs"
    text, results = (docs / "ablation.json").read_text(), (docs / "results.md").read_text()
    published = json.loads(text)
    assert not re.search(r"(?<![\w.:/-])/[a-z]+/", text)
    effects = [Effect([pair["change"] for pair in row["held_out_bits_per_byte"]["by_seed"].values()])
               for row in published["modules"]]
    for row, effect, corrected in zip(published["modules"], effects, holm([e.p for e in effects]), strict=True):
        assert row["held_out_bits_per_byte"]["p_holm"] == pytest.approx(corrected)
        assert row["verdict"] == effect.verdict(corrected)
        assert "| " + " | ".join(cells_of(row)) + " |" in results, row["module"]
    assert published["command"] in results and svg(published) == (docs / "ablation.svg").read_text()
