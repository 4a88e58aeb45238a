"""Components that a test adds."""

from tryplicity.plugins import _load
from tryplicity.registry import Registry


def unshared() -> Registry:
    """All installed components, in a registry that a test may add to: `load_plugins` gives everybody the same one."""
    return _load.__wrapped__((), False).registry
