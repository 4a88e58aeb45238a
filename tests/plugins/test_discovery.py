"""One broken plugin is named with the cause on one line, and everything else goes on."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from unittest.mock import MagicMock

import pluggy
import pytest

from tryplicity import UserError, hookspecs
from tryplicity.plugins import Plugins, _load, load_plugins
from tryplicity.spec import load_spec, parse_yaml

GOOD = """
from dataclasses import dataclass
from tryplicity import Activation, hookimpl

class Good(Activation):
    name = "good"

@hookimpl
def tryplicity_layers():
    return [Good]
"""

#: what is wrong with a plugin -> its text, and what must be said of it
TRAPS = {
    "misspelt hook": ("""
        @hookimpl
        def tryplicity_layer(): return []
        """, "no hook is called 'tryplicity_layer' (did you mean tryplicity_layers?)"),
    "missing marker": ("""
        def tryplicity_layers(): return []
        """, "tryplicity_layers lacks its marker: put @hookimpl above it"),
    "marker of another project": ("""
        import pluggy
        @pluggy.HookimplMarker("pytest")
        def tryplicity_layers(): return []
        """, "tryplicity_layers lacks its marker"),
    "wrong argument": ("""
        @hookimpl
        def tryplicity_step_finished(step, metric): pass
        """, "tryplicity_step_finished takes unknown argument(s) metric (there are: run, step, metrics)"),
    "argument to a hook without any": ("""
        @hookimpl
        def tryplicity_layers(registry): return []
        """, "unknown argument(s) registry (there are: none)"),
    "wrapper": ("""
        @hookimpl(wrapper=True)
        def tryplicity_layers(): return (yield)
        """, "tryplicity_layers must be a plain function, neither a wrapper nor async"),
    "async": ("""
        @hookimpl
        async def tryplicity_step_finished(step): pass
        """, "must be a plain function"),
    "no hooks": ("""
        x = 1
        """, "it has no hooks"),
    "raising hook": ("""
        @hookimpl
        def tryplicity_layers():
            raise RuntimeError("no luck")
        """, "RuntimeError: no luck (bad.py, line 6)"),
    "broken import in a hook": ("""
        @hookimpl
        def tryplicity_layers():
            import no_such_package
        """, "ModuleNotFoundError: No module named 'no_such_package' (bad.py, line 6)"),
    "broken import": ("""
        import no_such_package
        """, "ModuleNotFoundError: No module named 'no_such_package' (bad.py, line 4)"),
    "syntax error": ("""
        def f(:
        """, "SyntaxError: invalid syntax (bad.py, line 4)"),
    "exit at import": ("""
        raise SystemExit(3)
        """, "SystemExit: 3 (bad.py, line 4)"),
    "an exception outside Exception": ("""
        import pytest
        pytest.skip("not today", allow_module_level=True)
        """, "Skipped: not today"),
    "returns no component": ("""
        @hookimpl
        def tryplicity_layers(): return [int]
        """, "tryplicity_layers returned <class 'int'>, which is not a component class"),
    "returns nothing": ("""
        @hookimpl
        def tryplicity_layers(): pass
        """, "tryplicity_layers returned None; return a list of component classes"),
    "returns a class, not a list": ("""
        @hookimpl
        def tryplicity_layers(): return Activation
        """, "return a list of component classes"),
    "wrong hook for the family": ("""
        class Fine(Activation):
            name = "fine"
        @hookimpl
        def tryplicity_parallelism(): return [Fine]
        """, "tryplicity_parallelism returned Fine of family 'activation'; "
             "return it from tryplicity_layers or tryplicity_brain_modules"),
    "no name": ("""
        class Nameless(Activation): pass
        @hookimpl
        def tryplicity_layers(): return [Nameless]
        """, 'Nameless has no name: set name = "..." on the class'),
    "config not frozen": ("""
        class Loose(Activation):
            name = "loose"
            @dataclass
            class Config: x: int = 1
        @hookimpl
        def tryplicity_layers(): return [Loose]
        """, "Loose.Config must be a dataclass marked @dataclass(frozen=True)"),
    "config that only inherits its mark": ("""
        class Loose(Activation):
            name = "loose"
            class Config(Activation.Config): x: int = 1
        @hookimpl
        def tryplicity_layers(): return [Loose]
        """, "Loose.Config must be a dataclass marked @dataclass(frozen=True)"),
    "component held without uses": ("""
        class Holder(Activation):
            name = "holder"
            @dataclass(frozen=True)
            class Config: inner: Part
        @hookimpl
        def tryplicity_layers(): return [Holder]
        """, "Holder.Config.inner holds a component: declare it as `inner: Part = uses(...)`"),
    "component of an unknown family held": ("""
        class Holder(Activation):
            name = "holder"
            @dataclass(frozen=True)
            class Config: inner: Part = uses("ruoter")
        @hookimpl
        def tryplicity_layers(): return [Holder]
        """, "Holder.Config.inner uses an unknown family 'ruoter' (did you mean router?)"),
    "name taken": ("""
        class Other(Activation):
            name = "silu"
        @hookimpl
        def tryplicity_layers(): return [Other]
        """, "activation 'silu' is provided by both plugin tryplicity.layers (tryplicity "),
    "name given twice": ("""
        class One(Activation):
            name = "one"
        @hookimpl
        def tryplicity_layers(): return [One, One]
        """, "activation 'one' is provided by both plugin bad"),
}
HEAD = "from dataclasses import dataclass\nfrom tryplicity import Activation, Part, hookimpl, uses\n"


@pytest.fixture
def plugin_file(tmp_path):
    def write(text: str, name: str = "bad.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(HEAD + textwrap.dedent(text))
        return str(path)

    return write


@pytest.mark.parametrize(("text", "cause"), TRAPS.values(), ids=TRAPS)
def test_a_broken_plugin_is_one_line_and_the_rest_go_on(plugin_file, capsys, text, cause):
    bad, good = plugin_file(text), plugin_file(GOOD, "good.py")
    plugins = load_plugins((bad, good))
    assert plugins.registry.get("activation", "good").name == "good"
    assert plugins.registry.get("activation", "silu")  # the project's own
    (failure,) = plugins.registry.failures
    assert failure.startswith(f"plugin bad ({bad}): ") and cause in failure
    assert capsys.readouterr().err.splitlines() == [f"warning: left out {failure}"]
    found = {plugin.name: plugin for plugin in plugins.found}
    assert found["bad"].cause and not found["bad"].provides
    assert found["good"].cause is None and found["good"].provides == ["activation good"]
    assert not plugins.manager.has_plugin("bad")  # none of its other hooks will be called
    assert not any(owner.startswith("plugin bad") for owner in plugins.registry._owners.values())


@pytest.mark.parametrize("trap", ["misspelt hook", "raising hook", "name taken"])
def test_strict_makes_it_fatal(plugin_file, trap, monkeypatch):
    text, cause = TRAPS[trap]
    path = plugin_file(text)
    with pytest.raises(UserError, match=re.escape(f"plugin bad ({path}): {cause}")):
        load_plugins((path,), strict=True)
    monkeypatch.setenv("TRYPLICITY_STRICT", "1")
    with pytest.raises(UserError, match=re.escape(cause.replace("bad", "worse"))):
        load_plugins((plugin_file(text, "worse.py"),))


def test_a_spec_that_needs_a_failed_plugin_is_told_why(plugin_file):
    registry = load_plugins((plugin_file(TRAPS["broken import"][0]),)).registry
    text = "name: x\nvocab_size: 300\nhidden_size: 8\ncontext_length: 8\nlayers: [{mixer: shift}]\n"
    with pytest.raises(UserError) as caught:
        load_spec(parse_yaml(text, "s.yaml"), registry)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("s.yaml:5:18: layers[0].mixer: no mixer is called 'shift'")
    assert "not loaded: plugin bad (" in line and "No module named 'no_such_package'" in line


@pytest.mark.parametrize(("name", "cause"), [
    ("none.py", "there is no file"), ("folder", "there is no file"),
    ("text.txt", "its name must end in .py")])
def test_a_file_that_is_no_plugin(tmp_path, name, cause):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (failure,) = load_plugins((str(tmp_path / name),)).registry.failures
    assert cause in failure


def test_a_plugin_name_stands_for_one_plugin(plugin_file):
    first, second = plugin_file(GOOD, "a/good.py"), plugin_file(GOOD.replace('"good"', '"better"'),
                                                                "b/good.py")
    plugins = load_plugins((first, second, first))
    assert plugins.registry.names("activation").count("good") == 1
    assert "better" not in plugins.registry.names("activation")
    assert plugins.registry.failures == [
        f"plugin good ({path}): there is already a plugin good ({first}); rename one of them"
        for path in (second, first)]


def test_what_a_plugin_prints_stays_out_of_stdout(plugin_file, capsys):
    load_plugins((plugin_file("print('hello')\n" + GOOD, "loud.py"),)).registry  # noqa: B018
    assert capsys.readouterr().out == ""


def test_a_hook_may_have_another_name(plugin_file):
    text = GOOD.replace("@hookimpl\ndef tryplicity_layers",
                        '@hookimpl(specname="tryplicity_layers")\ndef mine')
    assert "good" in load_plugins((plugin_file(text, "named.py"),)).registry.names("activation")


# --- hooks called later ---

def test_a_raising_hook_is_told_once_and_the_others_are_called(plugin_file, capsys):
    raising = plugin_file("""
        @hookimpl
        def tryplicity_step_finished(step):
            raise SystemExit(f"at {step}")
        """, "raising.py")
    counting = plugin_file("""
        @hookimpl
        def tryplicity_step_finished(step, metrics):
            return step, metrics["loss"]
        """, "counting.py")
    plugins = load_plugins((raising, counting))
    results = [plugins.call("tryplicity_step_finished", run=Path("r"), step=i, metrics={"loss": 0.5})
               for i in range(3)]
    assert results == [[(i, 0.5)] for i in range(3)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("warning: plugin raising: tryplicity_step_finished raised SystemExit: at 0 "
                    "(raising.py, line 6); going on without it")


def test_results_come_in_the_order_of_loading(plugin_file):
    files = [plugin_file(f"@hookimpl\ndef tryplicity_run_finished(): return {i}\n", f"p{i}.py")
             for i in range(3)]
    plugins = load_plugins(tuple(files))
    assert plugins.call("tryplicity_run_finished", run=Path("r"), step=1, reason="budget") == [0, 1, 2]


def test_interrupting_is_not_a_fault_of_the_plugin(plugin_file):
    path = plugin_file("@hookimpl\ndef tryplicity_run_finished(): raise KeyboardInterrupt\n", "slow.py")
    with pytest.raises(KeyboardInterrupt):
        load_plugins((path,)).call("tryplicity_run_finished", run=Path("r"), step=1, reason="budget")


# --- the same door for all ---

@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a distribution as pip would: its module, and its metadata beside it."""

    def install(name: str, text: str, entry: str) -> None:
        (tmp_path / f"{name}_module.py").write_text(text)
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[tryplicity]\n{entry} = {name}_module\n")

    monkeypatch.syspath_prepend(tmp_path)
    _load.cache_clear()
    yield install
    _load.cache_clear()
    for path in tmp_path.glob("*_module.py"):  # torch has modules that end so too
        sys.modules.pop(path.stem, None)


def test_an_installed_plugin_comes_through_the_entry_point(installed, capsys):
    installed("stranger", GOOD, "stranger")
    installed("broken", "import no_such_package\n", "plugin")
    plugins = load_plugins()
    assert plugins.registry.owner("activation", "good") == "plugin stranger (stranger 1.2)"
    (failure,) = plugins.registry.failures
    assert failure == ("plugin broken.plugin (broken 1.2): ModuleNotFoundError: "
                       "No module named 'no_such_package' (broken_module.py, line 1)")


def test_an_entry_point_that_leads_nowhere_is_named(installed):
    installed("gone", GOOD, "gone")
    (Path(sys.path[0]) / "gone_module.py").unlink()
    (failure,) = load_plugins().registry.failures
    assert failure == "plugin gone (gone 1.2): ModuleNotFoundError: No module named 'gone_module'"


def test_an_entry_point_must_name_a_module(installed):
    installed("klass", GOOD, "klass")
    info = Path(sys.path[0]) / "klass-1.2.dist-info" / "entry_points.txt"
    info.write_text("[tryplicity]\nklass = klass_module:Good\n")
    (failure,) = load_plugins().registry.failures
    assert failure.endswith("a plugin is a module; its entry point names a type")


def test_the_projects_own_plugins_come_through_the_same_entry_points():
    from importlib.metadata import distribution

    points = {point.value for point in distribution("tryplicity").entry_points if point.group == "tryplicity"}
    folders = {path.parent.name for path in (Path(__file__).parents[2] / "plugins").glob("*/__init__.py")}
    assert points == {f"tryplicity_plugins.{folder}" for folder in folders}
    plugins = load_plugins()
    own = {plugin.name: plugin for plugin in plugins.found if plugin.origin.startswith("tryplicity ")}
    assert set(own) == {f"tryplicity.{folder}" for folder in folders}
    assert not plugins.registry.failures and all(plugin.provides for plugin in own.values())


def test_where_nothing_is_named_a_plugin_says_what_its_source_is_for(plugin_file):
    """A stranger's does not take the place of the project's own, and has a purpose of its own."""
    file = plugin_file("""
        from tryplicity import Source, hookimpl

        class Mine(Source):
            name = "mine"
            default_for = ("pretrain", "dreaming")

        @hookimpl
        def tryplicity_components():
            return [Mine]
    """)
    registry = load_plugins((str(file),)).registry
    assert [registry.default("source", purpose) for purpose in ("pretrain", "chat", "path", "dreaming")] == [
        "python-docs", "python-docs-chat", "files", "mine"]
    with pytest.raises(UserError, match="no source is meant for waking: name one"):
        registry.default("source", "waking")


def test_every_own_component_resolves_from_its_name_or_says_what_it_needs():
    registry = load_plugins().registry
    for component in registry.components():
        try:
            part = registry.part(component.family, component.name)
        except UserError as error:
            assert "is missing; add it" in str(error)
        else:
            assert registry.part(component.family, part.as_dict()) == part


# --- the hook specifications ---

HOOKS = [name for name in vars(hookspecs) if name.startswith("tryplicity_")]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_an_example_that_works(hook, plugin_file, tmp_path, capsys):
    """The example in its docstring, with the names it supposes, is a plugin, and the hook can be called."""
    doc = inspect.getsource(getattr(hookspecs, hook)).split('"""')[1]  # from 3.13 on __doc__ is not indented
    example = textwrap.dedent("\n".join(line for line in doc.splitlines() if line.startswith(" " * 8) or not line))
    supposed = """
        from unittest.mock import MagicMock
        from tryplicity import Brain, Mixer, NamedModel, Objective, Optimizer, Parallelism, Report, Source, Stage
        class Shift(Mixer): name = "shift"
        class PipelineParallel(Parallelism): name = "pipeline"
        class Lion(Optimizer): name = "lion"
        class GutenbergSource(Source): name = "gutenberg"
        my_click_command = my_handler = my_dashboard = find_mine = upload = notify = MagicMock()
        """
    plugins = load_plugins((plugin_file(textwrap.dedent(supposed) + example, "example.py"),))
    assert not plugins.registry.failures
    arguments = {name: {"loss": 1.0} if name == "metrics" else MagicMock()
                 for name in inspect.signature(getattr(hookspecs, hook)).parameters}
    assert any(i.plugin_name == "example" for i in getattr(plugins.manager.hook, hook).get_hookimpls())
    plugins.call(hook, **arguments)
    assert "raised" not in capsys.readouterr().err
    if hook in hookspecs.COMPONENT_HOOKS:
        assert {plugin.name: plugin for plugin in plugins.found}["example"].provides


def test_pluggy_still_passes_over_what_is_caught_here(plugin_file):
    """If pluggy itself refuses these one day, the checks here can go."""
    plugins = Plugins()
    module = type(sys)("silent")
    module.tryplicity_layer = hookspecs.hookimpl(lambda: [])
    module.tryplicity_layers = lambda: []
    manager = pluggy.PluginManager("tryplicity")
    manager.add_hookspecs(hookspecs)
    manager.register(module, "silent")  # neither the misspelt hook nor the missing marker is told
    assert manager.hook.tryplicity_layers() == []
    with pytest.raises(UserError):
        plugins._check_hooks(module)
