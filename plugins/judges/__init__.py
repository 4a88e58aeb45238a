"""Judges of the project: what is worth learning from."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_components():
    from tryplicity_plugins.judges.statistical import Statistical

    return [Statistical]
