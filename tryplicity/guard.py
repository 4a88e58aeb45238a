"""Who is to blame when something fails: a call into a plugin's part that raises is named, with what to do.

Nothing is wrapped around the hot paths: whatever escapes from them is looked at here, once, and its traceback says
whose code it was in. Loads no torch.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tryplicity.errors import PluginFault, Refused, UserError
from tryplicity.parts import OWNERS, Component

SHOW = "TRYPLICITY_TRACEBACK"  # set to 1, the whole traceback is printed too
_CORE = __package__


def called(component: Any) -> str:
    """A component, or its class, as messages name it: "mixer 'gqa' of plugin tryplicity.layers (tryplicity 0.1.0)"."""
    kind = component if isinstance(component, type) else type(component)
    owner = _owner(kind)
    label = f"{getattr(kind, 'family', 'component')} {getattr(kind, 'name', kind.__name__)!r}"
    return label + (f" of {owner}" if owner else "")


def broken(component: Any, promise: str) -> PluginFault:
    """The fault of a component that did its work and broke a promise: `promise` says what came and what was due."""
    kind = component if isinstance(component, type) else type(component)
    return PluginFault(f"{called(component)}: {promise}{_class_home(kind)}; {_remedy(component)}")


def fault(error: BaseException, component: Any = None) -> PluginFault | None:
    """A PluginFault that names whose code raised, file, line and what to do; None when no plugin's code was in it.

    component: who is called, for what raises before its code is reached. The part nearest to where it happened is
    named: a layer rather than the layer that holds it.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = [(held, frame, line) for frame, line in reversed(frames) if (held := _component(frame)) is not None]
    if inside:
        # what a stranger's part hands to one of the project's own shows there first
        strangers = [one for one in inside if not _is_own(one[0]) and getattr(one[0], "family", "") != "residual"]
        held, frame, line = (strangers or inside)[0]
        return PluginFault(f"{_line(called(held), error, _home(held, frame, line), frame)}; {_remedy(held)}{_shown()}")
    for frame, line in reversed(frames):
        if owner := _owner_of_module(frame.f_globals.get("__name__", "")):
            at = _place(frame.f_code.co_filename, line)
            return PluginFault(f"{_line(owner, error, at, frame)}; mend it, or go on without that plugin{_shown()}")
    if component is None:
        return None
    kind = component if isinstance(component, type) else type(component)
    return PluginFault(f"{called(component)} failed: {cause(error)}{_class_home(kind)}; {_remedy(component)}{_shown()}")


@contextmanager
def guarded(component: Any = None) -> Iterator[None]:
    """What a plugin's code raises inside becomes PluginFault; a UserError or Refused that it raises stays one."""
    try:
        yield
    except (UserError, Refused, PluginFault):
        raise
    except (Exception, SystemExit) as error:
        found = None if lacks_memory(error) else fault(error, component)
        if found is None:
            raise
        if os.environ.get(SHOW) == "1":
            traceback.print_exception(error, file=sys.stderr)
        raise found from error


def lacks_memory(error: BaseException) -> bool:
    """Whether it is the machine's fault rather than anyone's code."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def cause(error: BaseException) -> str:
    """What went wrong, without where, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def place(error: BaseException) -> str:
    """'planner/count.py, line 3': the innermost place that is in no library."""
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = [one for one in frames if "site-packages" not in one[0].f_code.co_filename] or frames
    return _place(inside[-1][0].f_code.co_filename, inside[-1][1]) if inside else "nowhere"


def _line(who: str, error: BaseException, at: str, frame: FrameType) -> str:
    return f"{who} failed in {frame.f_code.co_name}: {cause(error)} ({at})"


def _place(file: str, line: int) -> str:
    return f"{'/'.join(Path(file).parts[-2:])}, line {line}"


def _home(held: Any, frame: FrameType, line: int) -> str:
    """Where in its own file a component failed; where its class stands when that was in what it inherits."""
    kind = held if isinstance(held, type) else type(held)
    with suppress(Exception):
        if inspect.getsourcefile(kind) != frame.f_code.co_filename:
            return _class_home(kind)[2:-1]
    return _place(frame.f_code.co_filename, line)


def _class_home(kind: type) -> str:
    """' (file.py, line 3)' of a class, where that is known."""
    with suppress(Exception):
        return f" ({_place(inspect.getsourcefile(kind), inspect.getsourcelines(kind)[1])})"
    return ""


def _remedy(component: Any) -> str:
    family = getattr(component, "family", None)
    return f"mend it, or choose another {family}" if family else "mend it, or go on without it"


def _shown() -> str:
    return "" if os.environ.get(SHOW) == "1" else f" ({SHOW}=1 shows the traceback)"


def _component(frame: FrameType) -> Any:
    """The component of a plugin whose method a frame is of."""
    code = frame.f_code
    first = code.co_varnames[0] if code.co_argcount else None
    held = frame.f_locals[first] if first in ("self", "cls") and first in frame.f_locals else None
    kind = held if isinstance(held, type) else type(held)
    return held if issubclass(kind, Component) and _owner(kind) else None


def _owner(kind: type) -> str | None:
    return next((OWNERS[cls] for cls in kind.__mro__ if cls in OWNERS), None)


def _is_own(component: Any) -> bool:
    """Whether it is of the project's own plugins."""
    owner = _owner(component if isinstance(component, type) else type(component)) or ""
    return owner.startswith(f"plugin {_CORE}.")


def _owner_of_module(name: str) -> str | None:
    """The plugin that a module is of: one with components in it, or beside one in a package."""
    modules = {cls.__module__: owner for cls, owner in OWNERS.items()}
    package = name.rpartition(".")[0]
    beside = (owner for module, owner in modules.items() if package and module.rpartition(".")[0] == package)
    return modules.get(name) or next(beside, None)
