"""Brain-inspired modules of the project."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_brain_modules():
    from tryplicity_plugins.brain.dynamic_sparsity import DynamicSparsityRouter
    from tryplicity_plugins.brain.lateral_inhibition import LateralInhibitionRouter
    from tryplicity_plugins.brain.spike import Spike

    return [Spike, DynamicSparsityRouter, LateralInhibitionRouter]
