"""Optimizers and schedules of the project."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_components():
    from tryplicity_plugins.optimization.adamw import AdamW
    from tryplicity_plugins.optimization.wsd import WarmupStableDecay

    return [AdamW, WarmupStableDecay]
