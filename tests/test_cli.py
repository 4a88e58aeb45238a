"""The command line as a user meets it: pages, JSON, exit codes, no traceback."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tryplicity.cli import main

ROOT = Path(__file__).parent.parent
SMALL = str(ROOT / "tests" / "small.yaml")


def call(capfd, *arguments):
    """Exit code, stdout, stderr of `tryplicity ARGUMENTS`, run as the console script runs it."""
    code = 0
    try:
        main(list(arguments), prog_name="tryplicity")
    except SystemExit as end:
        code = end.code or 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


EXPECTED = {  # what the project's own specs must come out as: strategy, budget, and the figures asked of them
    ("full", "h200"): ("fsdp", 150.7), ("full", "b200"): ("ddp", 191.5), ("full", "mi300x"): ("ddp", 206.1),
    ("5090", "5090"): ("single", 33.7), ("tiny", "cpu"): ("single", 8)}


@pytest.mark.parametrize("spec, hardware", EXPECTED, ids=["-on-".join(k) for k in EXPECTED])
def test_build_json_of_the_installed_specs(capfd, spec, hardware):
    code, out, _ = call(capfd, "build", str(ROOT / "specs" / f"{spec}.yaml"), "--hw", hardware, "--json")
    plan, (strategy, budget) = json.loads(out), EXPECTED[spec, hardware]
    assert code == 0 and plan["fits"] and plan["strategy"]["chosen"] == strategy
    assert set(plan) == {"name", "fits", "parameters", "packed_bytes_per_token", "memory", "strategy", "throughput",
                         "cost", "saving", "layers"}
    memory = plan["memory"]
    assert memory["budget_gb"] == budget and sum(memory["parts"].values()) == pytest.approx(memory["total_gb"])
    assert memory["headroom_gb"] == pytest.approx(budget - memory["total_gb"]) and memory["headroom_gb"] > 0
    assert sum(plan["parameters"]["by_component"].values()) == plan["parameters"]["total"]
    assert plan["cost"]["per_billion_tokens"] == pytest.approx(
        plan["cost"]["per_hour"] / 3600 / plan["throughput"]["tokens_per_second"] * 1e9)
    if spec == "full":
        assert plan["parameters"]["total"] == pytest.approx(9.4e9, rel=0.02)
        assert plan["parameters"]["active"] == pytest.approx(3.0e9, rel=0.05)
        assert [layer["index"] for layer in plan["layers"] if layer["mixer"] == "gqa"] == [7, 15, 23, 31]
        rejected = {other["name"]: other for other in plan["strategy"]["rejected"]}
        if hardware == "h200":
            assert rejected["ddp"]["total_gb"] > 150.7 and "150.7 GB" in rejected["ddp"]["reason"]
    if spec == "5090":
        assert 1.0e9 <= plan["parameters"]["total"] <= 1.1e9


def test_the_page_says_what_the_json_says(capfd):
    _, out, _ = call(capfd, "build", "tiny", "--hw", "cpu", "--json")
    plan = json.loads(out)
    code, page, _ = call(capfd, "build", "tiny", "--hw", "cpu")
    assert code == 0
    for text in (f"{plan['parameters']['total']:,}", f"{plan['parameters']['active']:,}", "fits: single",
                 f"{plan['memory']['total_gb']:.1f} of 8 GB",
                 f"{plan['throughput']['tokens_per_second']:,.0f} tokens/s"):
        assert text in page, text


def test_what_does_not_fit_exits_with_1_and_says_by_how_much(capfd):
    code, out, _ = call(capfd, "build", "full", "--hw", "5090")
    assert code == 1 and "does not fit" in out and "of 33.7 GB" in out
    code, out, _ = call(capfd, "build", "full", "--hw", "5090", "--json")
    assert code == 1 and json.loads(out)["fits"] is False


def test_training_for_a_machine_that_this_is_not_says_so_in_one_line(capfd, tmp_path):
    code, _, err = call(capfd, "train", "full", "--hw", "h200", "--run", str(tmp_path / "r"), "--steps", "1")
    assert code == 2 and err.count("\n") == 1 and "on this machine; train on one that has them" in err


@pytest.mark.parametrize("settings, message", [
    (["expect={total_parameters: 1e6}"], "expect.total_parameters: the model has"),
    (["expect={active_parameters: 9.9e9, within: 0.5}"], "active parameters"),
])
def test_a_missed_expectation_is_an_error_at_its_place(capfd, settings, message):
    options = [x for s in settings for x in ("--set", s)]
    code, _, err = call(capfd, "build", SMALL, "--hw", "cpu", *options)
    assert code == 2 and message in err and "--set expect=" in err


def test_a_met_expectation_is_silent(capfd):
    code, _, err = call(capfd, "build", SMALL, "--hw", "cpu", "--set", "expect={total_parameters: 41e3, within: 0.9}")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("arguments, message", [
    (["build", "nothing.yaml", "--hw", "cpu"], "nothing.yaml"),
    (["build", SMALL, "--hw", "h2000"], "h2000"),
    (["build", SMALL, "--hw", "cpu", "--set", "hiden_size=3"], "did you mean hidden_size"),
    (["build", SMALL, "--hw", "cpu", "--set", "hardware.bach=3"], "did you mean batch"),
    (["generate", "nowhere", "hello"], "no such run folder"),
    (["generate", "nowhere", "hello", "--top-p", "7"], "top_p is 7.0"),
    (["train", SMALL, "--hw", "cpu", "--run", "x"], "exactly one of --steps"),
    (["build", SMALL], "Missing option '--hw'"),
    (["bild"], "No such command"),
])
def test_wrong_input_exits_with_2_and_one_clear_message(capfd, arguments, message):
    code, _, err = call(capfd, *arguments)
    assert code == 2 and message in err


def test_schema_is_json_and_plugins_list_names_everything(capfd):
    code, out, _ = call(capfd, "schema")
    assert code == 0 and "feed_forward.moe" in json.loads(out)["$defs"]
    code, out, _ = call(capfd, "plugins", "list", "--json")
    provided = [p for plugin in json.loads(out)["plugins"] for p in plugin["provides"]]
    assert code == 0 and {"mixer mamba2", "mixer gqa", "router dynamic_sparsity", "activation spike", "head "
                          "multi_token_prediction", "parallelism fsdp", "source python-docs"} <= set(provided)


def test_plugins_list_names_the_broken_one(capfd, tmp_path):
    (tmp_path / "bad.py").write_text("import not_there_at_all\n")
    code, out, _ = call(capfd, "plugins", "list", "--plugin", str(tmp_path / "bad.py"))
    assert code == 1 and "bad" in out and "not_there_at_all" in out and "tryplicity.layers" in out
    code, _, err = call(capfd, "build", SMALL, "--hw", "cpu", "--plugin", str(tmp_path / "bad.py"), "--strict")
    assert code == 2 and "not_there_at_all" in err


@pytest.mark.parametrize("command", [c for c in main.commands if c != "plugins"])
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0 and f"Example: tryplicity {command}" in result.output


def test_every_yaml_of_the_project_is_read_and_assembled(registry):
    from tryplicity.hardware import load_hardware
    from tryplicity.model import assemble
    from tryplicity.spec import load_spec

    in_tests = [path for path in ROOT.glob("tests/**/*.yaml") if path.parent.name != "search"]
    specs = [*ROOT.glob("specs/*.yaml"), *in_tests]
    assert len(specs) >= 5 and all(assemble(load_spec(str(path), registry)) is not None for path in specs)
    assert {load_hardware(str(p), registry).name for p in ROOT.glob("hardware/*.yaml")} == {
        "cpu", "5090", "b200", "mi300x", "h200", "h100"}


def test_the_version_names_what_works_together(capfd, monkeypatch, tmp_path):
    import torch

    (tmp_path / "mine.py").write_text("from tryplicity import hookimpl\n\n\n@hookimpl\ndef tryplicity_layers():\n"
                                      "    return []\n")
    monkeypatch.setenv("TRYPLICITY_KERNELS", "0")
    code, out, _ = call(capfd, "--plugin", str(tmp_path / "mine.py"), "--version")
    assert code == 0 and f"torch {torch.__version__}" in out and "kernels: TRYPLICITY_KERNELS=0" in out
    assert "tryplicity.layers (tryplicity " in out and "mine.py" in out


@pytest.mark.parametrize("words, wanted", [
    ("tryplicity da", {"plain,data"}), ("tryplicity build fu", {"plain,full", "file,fu"}),
    ("tryplicity build tiny --hw h", {"plain,h100", "plain,h200", "file,h"})])
def test_a_shell_completes_commands_and_names(capfd, monkeypatch, words, wanted):
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    monkeypatch.setenv("_TRYPLICITY_COMPLETE", "bash_complete")
    code, out, _ = call(capfd)
    assert code == 0 and set(out.split()) == wanted
    assert "file" not in "".join(out.split()[1:])  # bash forgets what stands before one
