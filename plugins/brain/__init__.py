"""Brain-inspired modules of the project."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_brain_modules():
    from tryplicity_plugins.brain.dynamic_sparsity import DynamicSparsityRouter
    from tryplicity_plugins.brain.hebbian_loss import HebbianLoss
    from tryplicity_plugins.brain.lateral_inhibition import LateralInhibition, LateralInhibitionRouter
    from tryplicity_plugins.brain.neuro_curriculum import NeuroCurriculum
    from tryplicity_plugins.brain.predictive_coding import PredictiveCoding
    from tryplicity_plugins.brain.sleep_consolidation import SleepConsolidation
    from tryplicity_plugins.brain.spike import Spike

    return [HebbianLoss, NeuroCurriculum, PredictiveCoding, SleepConsolidation, Spike, DynamicSparsityRouter,
            LateralInhibition, LateralInhibitionRouter]
