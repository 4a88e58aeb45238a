"""Nucleus routing, a router of another project's: a package that imports what `tryplicity` exports and nothing else."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_layers():
    from tryplicity_nucleus.router import Nucleus

    return [Nucleus]
