"""What README and docs/ say is so: links lead somewhere, commands exist, specs and fragments of them are taken."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from tests import generated
from tryplicity.cli import main
from tryplicity.spec import load_spec, parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMANDS = sorted({(page, line.split(" #")[0].strip()) for page, text in PAGES.items()
                   for line in re.findall(r"^(?:    )?(?:\$ )?((?:[A-Z_]+=\S+ )*tryplicity [a-z].*)$", text, re.M)})
BLOCKS = [(page, kind, code) for page, text in PAGES.items()
          for kind, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)]


def anchors(text: str) -> set[str]:
    """As a forge makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page):
    here = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", PAGES[page]):
        path, _, anchor = "".join(target).partition("#")
        if "://" in path:
            continue
        assert not path or (here / path).exists(), f"{page}: {path}"
        if anchor:
            text = PAGES[page] if not path else (here / path).read_text(encoding="utf-8")
            assert anchor in anchors(text), f"{page}: #{anchor}"


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), {"README.md", "CONTRIBUTING.md"}
    while ahead:
        reached |= ahead
        ahead = {(Path(page).parent / target.partition("#")[0]).as_posix() for page in ahead if page in PAGES
                 for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page])} & set(PAGES) - reached
    assert set(PAGES) == reached


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_its_commands_exist_with_these_options(page, line, tmp_path, monkeypatch):
    (tmp_path / "my_tasks").mkdir()
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(re.split(r" [>|&] ", line)[0]) if not re.match(r"^[A-Z_]+=", word)][1:]
    group = main
    while isinstance(group, click.Group):
        group = group.commands[words.pop(0)]
    if words != ["--help"]:
        group.make_context("tryplicity", words)


SMALL = {"name": "small", "vocab_size": 512, "hidden_size": 64, "context_length": 64, "layers": ["memory"],
         "blocks": {"memory": {"mixer": {"type": "gqa", "heads": 4}, "feed_forward": "gated_mlp"}}}


@pytest.mark.parametrize(("page", "code"), [(page, code) for page, kind, code in BLOCKS if kind == "yaml"])
def test_its_yaml_is_taken(page, code, registry, tmp_path):
    said, file = yaml.safe_load(code), tmp_path / "said.yaml"
    file.write_text(code)
    if "sources" in said:
        from tryplicity.corpus.recipe import load_recipe

        load_recipe(file, registry)
    elif "count" in said or "price_per_hour" in said:
        from tryplicity.hardware import load_hardware

        load_hardware(file, registry)
    else:  # a spec, or what is to be laid over one
        load_spec(parse_yaml(yaml.safe_dump(said if "base" in said else SMALL | said), page), registry)


@pytest.mark.parametrize(("page", "code"), [(page, code) for page, kind, code in BLOCKS if kind == "python"])
def test_its_python_is_python(page, code):
    ast.parse(re.sub(r"^    ", "", code, flags=re.M) if code.startswith("    ") else code)


def test_the_readmes_plugin_works(tmp_path):
    code = next(code for page, kind, code in BLOCKS if page == "README.md" and kind == "python")
    command = next(line for page, line in COMMANDS if page == "README.md" and "--plugin mish.py" in line)
    (tmp_path / "mish.py").write_text(code)
    words = shlex.split(command.replace("mish.py", str(tmp_path / "mish.py")))[1:]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0


def test_the_long_plugin_is_the_tested_one():
    example = (ROOT / "tests" / "plugins" / "example_plugin.py").read_text(encoding="utf-8")
    shown = next(code for page, kind, code in BLOCKS if page == "docs/plugins.md" and kind == "python")
    assert shown.strip() == example.partition("from __future__ import annotations\n\n")[2].strip()


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in {"".join(found) for text in PAGES.values()
                   for found in re.findall(r"^(?:    )?make (\w+)|`make (\w+)`", text, re.M)}:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("name", generated.FILES)
def test_what_is_made_from_the_code_is_the_codes(name):
    made = generated.FILES[name]()
    assert (ROOT / name).read_text(encoding="utf-8") == made, "python -m tests.generated writes it anew"
