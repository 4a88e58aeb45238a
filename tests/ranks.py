"""Several ranks on one machine: the conformance kit's own way."""

from tryplicity.testing.ranks import together

__all__ = ["together"]
