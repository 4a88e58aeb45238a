"""The arrows of the house run one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tryplicity

ROOT = Path(__file__).parents[1]

#: from what everything stands on to what stands on everything; a module imports from its own floor or below
FLOORS = [
    {"bounds", "errors", "hookspecs", "leftout", "names", "progress"},
    {"parts", "functional", "kernels", "guard", "world"},
    {"components", "configs", "registry"},
    {"watching", "plugins", "spec", "hardware", "files", "run"},
    {"model", "planner", "promises"},
    {"builder"},
    {"training", "inference", "search", "data", "launch"},
    {"corpus", "evaluation", "exchange", "named"},
    {"cli", "commands", "server", "ablation", "pages", "brain_page", "brain_summary", "doctor", "reference", "scaffold",
     "testing", "contract", "__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules(folder: str) -> dict[str, Path]:
    """Every module below a folder, by its dotted name."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, types_too: bool = False) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, module, names) of a file's imports, inside functions too; for type checkers only if asked."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not types_too:
            skipped |= {inner for child in node.body for inner in ast.walk(child)}
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides where its arrow leads"
            yield node.lineno, node.module, tuple(alias.name for alias in node.names)


CORE, PLUGINS = modules("tryplicity"), modules("plugins")


def room(module: str) -> str | None:
    """The room of the house a core module is in: tryplicity.spec.loader -> spec."""
    return module.split(".")[1] if module.startswith("tryplicity.") else None


@pytest.mark.parametrize("module", [m for m in CORE if m != "tryplicity"])
def test_arrows_run_one_way(module):
    assert room(module) in FLOOR, f"{module} has no floor yet: add it to FLOORS"
    backwards = []
    for line, target, names in imports(CORE[module]):
        targets = [f"tryplicity.{name}" for name in names] if target == "tryplicity" else [target]
        for to in targets:
            if to.startswith("tryplicity.") and to not in ("tryplicity.__version__",):
                home = tryplicity._HOME.get(to.partition(".")[2], to)  # an exported name lives elsewhere
                if FLOOR[room(home)] > FLOOR[room(module)]:
                    backwards.append(f"{CORE[module]}:{line}: {module} imports {home}")
    assert not backwards


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_no_plugin(module):
    targets = {target.partition(".")[0] for _, target, _ in imports(CORE[module], types_too=True)}
    assert "tryplicity_plugins" not in targets


@pytest.mark.parametrize("module", PLUGINS)
def test_plugins_use_only_what_the_package_exports(module):
    for line, target, names in imports(PLUGINS[module], types_too=True):
        where = f"{PLUGINS[module]}:{line}"
        assert not target.startswith("tryplicity."), f"{where}: import it from tryplicity itself"
        if target == "tryplicity":
            assert names and set(names) <= set(tryplicity.__all__), f"{where}: not exported"


def test_no_core_module_needs_itself():
    """No import at the head of a module leads back to it (those inside functions run later)."""
    heads = {}
    for module, path in CORE.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = [(node.module, f"{node.module}.{alias.name}") for node in tree.body
                 if isinstance(node, ast.ImportFrom) for alias in node.names]
        heads[module] = {inner if inner in CORE else outer for outer, inner in named} & set(CORE)

    def reached(module: str, seen: set[str]) -> set[str]:
        for target in heads[module] - seen:
            seen |= {target} | reached(target, seen | {target})
        return seen

    assert not [module for module in CORE if module in reached(module, set())]


def test_every_exported_name_is_there():
    for name in tryplicity.__all__:
        assert getattr(tryplicity, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Mixxer'"):
        tryplicity.Mixxer  # noqa: B018


@pytest.mark.parametrize("code", [
    "import tryplicity",
    "from tryplicity import UserError, hookimpl, load_plugins; load_plugins()",
    "import tryplicity.spec, tryplicity.hardware",
    "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('tryplicity.cli', run_name='__main__')",
], ids=["the package", "plugins before their components", "specs", "the command line's help"])
def test_without_torch(code):
    program = ("import atexit, sys; atexit.register(lambda: print('LOADED', 'torch' in sys.modules, "
               f"'transformers' in sys.modules)); {code}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED False False"


def test_the_packages_of_setup_cfg_are_the_folders():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    mapped = dict(line.split(" = ") for line in config["options"]["package_dir"].split("\n") if line)
    folders = set()
    for package, folder in mapped.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            folders.add(".".join((package, *path.parent.relative_to(ROOT / folder).parts)))
    assert set(config["options"]["packages"].split()) == folders
