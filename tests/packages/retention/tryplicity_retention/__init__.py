"""Retention, a mixer of another project's: a package that imports what `tryplicity` exports and nothing else."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_layers():
    from tryplicity_retention.mixer import Retention

    return [Retention]
