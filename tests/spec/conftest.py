import pytest
from small_components import COMPONENTS, VALID

from tryplicity.registry import Registry


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    registry.add_all(COMPONENTS, "plugin tests")
    return registry


@pytest.fixture
def valid() -> str:
    return VALID
