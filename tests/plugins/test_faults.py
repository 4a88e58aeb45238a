"""A plugin that fails after it was loaded is named in one line; what needs it ends with 3, the rest goes on."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from tests.command_line import call
from tryplicity.cli import main

SMALL = Path(__file__).parents[1] / "small.yaml"
HEAD = """\
import torch
from dataclasses import dataclass
from torch import nn
from tryplicity import (Brain, Head, Linear, MemoryPlan, Mixer, Norm, Objective, Optimizer, Parallelism, Router,
    Routing, Report, Schedule, Source, Stage, Document, UserError, hookimpl)
class Wrong(Exception): pass
class Whole(Mixer):
    def __init__(self, config, site): super().__init__()
"""
#: family -> (the base class, its hook, what in the spec asks for it)
USES = {
    "mixer": ("Whole", "layers", ["layers=[{mixer: bad}]"]),
    "linear": ("Linear", "layers", ["linear=bad"]),
    "norm": ("Norm", "layers", ["norm=bad"]),
    "head": ("Head", "layers", ["heads=[bad]"]),
    "router": ("Router", "layers", ["layers=[{mixer: gqa, feed_forward: {type: moe, inner_size: 8, router: bad}}]"]),
    "objective": ("Objective", "brain_modules", ["brain=[bad]"]),
    "brain": ("Brain", "brain_modules", ["brain=[bad]"]),
    "optimizer": ("Optimizer", "components", ["training.optimizer=bad"]),
    "schedule": ("Schedule", "components", ["training.schedule=bad"]),
    "source": ("Source", "components", []),
    "parallelism": ("Parallelism", "parallelism", ["hardware.strategy=bad"]),
}

#: (family, body of the class, what the line says); the spec is built
AT_BUILD = {
    "a constructor": ("mixer", "def __init__(self, config, site): raise Wrong('oh')", "failed in __init__: Wrong: oh"),
    "check": ("mixer", "@classmethod\ndef check(cls, config, site): raise Wrong('oh')", "failed in check: Wrong: oh"),
    "a forward": ("mixer", "def forward(self, x_BTD, *, state=None, doc_ids=None): raise Wrong('oh')",
                  "failed in forward: Wrong: oh"),
    "a forward without its arguments": ("mixer", "def forward(self, x): return x", "unexpected keyword argument"),
    "a forward of another shape": ("mixer", "def forward(self, x, *, state=None, doc_ids=None): return x[:, 1:]",
                                   "the shape must stay"),
    "a forward that gives nothing": ("mixer", "def forward(self, x_BTD, *, state=None, doc_ids=None): pass",
                                     "forward gave None"),
    "a weight of another shape": ("linear", "def effective_weight(self, weight): return weight[:3]",
                                  "effective_weight gave [3, "),
    "a norm": ("norm", "def __init__(self, config, size): super().__init__()\ndef forward(self, x): return x / 0 + y",
               "failed in forward: NameError"),
    "a head that gives no Mean": ("head", """
        def __init__(self, config, site): super().__init__()
        def targets(self, ids, targets, docs): return targets
        def forward(self, h_BTD, targets, w): return h_BTD.sum()
        """, "not a Mean"),
    "token weights of the wrong shape": ("objective", "def token_weights(self, nll, valid): return nll.mean(1)",
                                         "token_weights gave"),
    "a stage": ("brain", "def stage(self, spent, context_length): raise Wrong('oh')", "failed in stage: Wrong: oh"),
    "a stage that is none": ("brain", "def stage(self, spent, context_length): return 'short'", "not a Stage"),
    "a stage with a negative rate": ("brain", "def stage(self, spent, context_length):"
                                     " return Stage('s', 8, learning_rate_factor=-1.0)", "learning_rate_factor -1.0"),
    "a state that JSON cannot hold": ("brain", "def state(self): return {'x': {1, 2}}", "JSON can hold"),
    "an optimizer": ("optimizer", "def __init__(self, config): pass\ndef build(self, a, b): raise Wrong('oh')",
                     "failed in build: Wrong: oh"),
    "an optimizer that forgets": ("optimizer", "def __init__(self, config): pass\n"
                                  "def build(self, decayed, undecayed): return torch.optim.SGD(decayed, lr=0.1)",
                                  "build forgets parameters that it was given"),
    "an optimizer that is none": ("optimizer", "def __init__(self, config): pass\n"
                                  "def build(self, decayed, undecayed): return None", "not a torch.optim.Optimizer"),
    "a schedule": ("schedule", "def __init__(self, config): pass\ndef factor(self, progress, step): return 1 / 0",
                   "failed in factor: ZeroDivisionError"),
    "a schedule below nothing": ("schedule", "def __init__(self, config): pass\n"
                                 "def factor(self, progress, step): return 0.5 - progress", "factor gave -0.02"),
    "a schedule that is no number": ("schedule", "def __init__(self, config): pass\n"
                                     "def factor(self, progress, step): return float('nan')", "factor gave nan"),
    "a strategy that is asked for": ("parallelism", "def __init__(self, config): pass\n"
                                     "def memory(self, facts, hardware): raise Wrong('oh')",
                                     "failed in memory: Wrong: oh"),
    "a strategy that refuses wrongly": ("parallelism", "def __init__(self, config): pass\n"
                                        "def refuses(self, hardware): raise Wrong('oh')",
                                        "failed in refuses: Wrong: oh"),
}
#: the same; the model is trained for two steps
AT_TRAINING = {
    "parameters left as they are": ("mixer", """
        def __init__(self, config, site):
            super().__init__(config, site)
            self.gain = nn.Parameter(torch.empty(site.hidden_size))
        def forward(self, x_BTD, *, state=None, doc_ids=None): return x_BTD * self.gain
        """, "gain is uninitialised"),
    "reset_parameters": ("mixer", """
        def forward(self, x_BTD, *, state=None, doc_ids=None): return x_BTD
        def reset_parameters(self): raise Wrong('oh')
        """, "failed in reset_parameters: Wrong: oh"),
    "experts out of range": ("router", """
        def __init__(self, config, site, experts, top_k):
            super().__init__()
            self.max_k, self.mean_k, self.most = top_k, float(top_k), experts
        def forward(self, x_BTD):
            N = x_BTD.shape[0] * x_BTD.shape[1]
            ids_NK = torch.full((N, self.max_k), self.most + 3, device=x_BTD.device)
            return Routing(ids_NK, x_BTD.new_ones(N, self.max_k), Report())
        """, "chose expert"),
    "observe": ("brain", "def observe(self, documents, losses, seed): raise Wrong('oh')",
                "failed in observe: Wrong: oh"),
    "wants_sleep": ("brain", "def wants_sleep(self, step): raise Wrong('oh')", "failed in wants_sleep: Wrong: oh"),
    "sleep": ("brain", "def wants_sleep(self, step): return step == 1\ndef sleep(self, night): raise Wrong('oh')",
              "failed in sleep: Wrong: oh"),
    "a source": ("source", """
        def __init__(self, config): pass
        def fingerprint(self): return "x"
        def documents(self):
            yield Document("a", "some text", "text", "http://a")
            raise Wrong("oh")
        """, "failed in documents: Wrong: oh"),
}


@pytest.fixture
def plugin(tmp_path):
    """A file with one component called `bad`."""

    def write(family: str, body: str) -> str:
        base, hook, _ = USES[family]
        text = f"{HEAD}\nclass Bad({base}):\n    name = 'bad'\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        text += f"\n@hookimpl\ndef tryplicity_{hook}(): return [Bad]\n"
        path = tmp_path / "faulty.py"
        path.write_text(text)
        return str(path)

    return write


def settings_of(family: str) -> list[str]:
    return [word for setting in USES[family][2] for word in ("--set", setting)]


@pytest.mark.parametrize(("family", "body", "said"), AT_BUILD.values(), ids=AT_BUILD)
def test_at_build(plugin, capfd, family, body, said):
    path = plugin(family, body)
    code, _, err = call(capfd, "build", str(SMALL), "--hw", "cpu", "--plugin", path, *settings_of(family))
    (line,) = err.splitlines()
    assert code == 3 and said in line and f"{family} 'bad' of plugin faulty ({path})" in line, line
    assert "mend it, or choose another" in line
    assert re.search(r"faulty\.py, line \d+\)", line)


@pytest.mark.parametrize(("family", "body", "said"), AT_TRAINING.values(), ids=AT_TRAINING)
def test_at_training(plugin, capfd, tmp_path, corpus, monkeypatch, family, body, said):
    monkeypatch.setenv("TRYPLICITY_CACHE", str(tmp_path / "cache"))
    path = plugin(family, body)
    data = "bad" if family == "source" else str(corpus)
    code, _, err = call(capfd, "train", str(SMALL), "--hw", "cpu", "--plugin", path, *settings_of(family),
                        "--data", data, "--run", str(tmp_path / "run"), "--steps", "2")
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert code == 3 and said in line and f"{family} 'bad' of plugin faulty ({path})" in line, line


@pytest.mark.parametrize("body", [
    "def __init__(self, config): raise Wrong('oh')",
    "def __init__(self, config): pass\ndef memory(self, facts, hardware): raise Wrong('oh')",
    "def __init__(self, config): pass\ndef memory(self, facts, hardware): raise UserError('oh')",
    "def __init__(self, config): pass\ndef memory(self, facts, hardware): return MemoryPlan({'weights': -1}, 'oh')",
    "def __init__(self, config): pass\ndef memory(self, facts, hardware): return MemoryPlan({'x': float('nan')}, 'oh')",
    "def __init__(self, config): pass\ndef memory(self, facts, hardware): return 'oh'",
    "def __init__(self, config): pass\ndef memory(self, facts, hardware): return MemoryPlan({}, 'oh')\n"
    "def refuses(self, hardware): raise SystemExit('oh')",
], ids=["constructor", "memory", "a UserError", "negative", "not a number", "no plan", "refuses"])
def test_a_strategy_that_nobody_asked_for_is_listed_as_rejected(plugin, capfd, body):
    """And is not taken, though it is the first that would fit."""
    path = plugin("parallelism", "order = 1\n" + body)
    code, out, _ = call(capfd, "build", str(SMALL), "--hw", "cpu", "--plugin", path, "--json")
    plan = json.loads(out)
    (bad,) = [one for one in plan["strategy"]["rejected"] if one["name"] == "bad"]
    assert code == 0 and plan["strategy"]["chosen"] == "single"
    assert bad["total_gb"] is None and ("oh" in bad["reason"] or "gave" in bad["reason"] or "NaN" in bad["reason"])
    code, page, _ = call(capfd, "build", str(SMALL), "--hw", "cpu", "--plugin", path)
    assert code == 0 and re.search(r"not bad: .*(oh|gave|NaN)", page)


def test_a_mistake_that_a_plugin_reports_stays_a_users(plugin, capfd):
    path = plugin("mixer", "def __init__(self, config, site): raise UserError('bad: give it more room')")
    code, _, err = call(capfd, "build", str(SMALL), "--hw", "cpu", "--plugin", path, *settings_of("mixer"))
    assert (code, err) == (2, "error: bad: give it more room\n")


def test_a_fault_of_the_projects_own_parts_is_named_too(capfd, monkeypatch):
    from tryplicity import load_plugins

    component = load_plugins().registry.get("mixer", "gqa")

    def forward(self, x_BTD, *, state=None, doc_ids=None):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(component, "forward", forward)
    code, _, err = call(capfd, "build", str(SMALL), "--hw", "cpu", "--set", "layers=[{mixer: gqa}]")
    (line,) = err.splitlines()
    assert code == 3 and "mixer 'gqa' of plugin tryplicity.layers (tryplicity " in line


def test_what_a_stranger_hands_to_a_part_of_the_project_is_the_strangers_fault(plugin, capfd):
    """The product that does not fit is raised inside the project's linear."""
    path = plugin("mixer", """
        def __init__(self, config, site):
            super().__init__(config, site)
            self.out = site.linear(site.hidden_size, site.hidden_size)
        def forward(self, x_BTD, *, state=None, doc_ids=None): return self.out(x_BTD[..., :5])
        """)
    code, _, err = call(capfd, "build", str(SMALL), "--hw", "cpu", "--plugin", path, *settings_of("mixer"))
    assert code == 3 and re.search(r"mixer 'bad' of plugin faulty \(\S+\) failed in forward: .*faulty\.py, line", err)


def test_a_fault_of_the_core_says_so_and_how_to_see_more(capfd, monkeypatch):
    import tryplicity.builder

    def build(*arguments):
        raise KeyError("oh")

    monkeypatch.setattr(tryplicity.builder, "build", build)
    code, _, err = call(capfd, "build", str(SMALL), "--hw", "cpu")
    (line,) = err.splitlines()
    assert code == 3 and "KeyError: 'oh'" in line and "a fault of tryplicity itself; TRYPLICITY_TRACEBACK=1" in line
    monkeypatch.setenv("TRYPLICITY_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        main(["build", str(SMALL), "--hw", "cpu"])
    assert "Traceback" in capfd.readouterr().err
