"""Strategies of the project."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_parallelism():
    from tryplicity_plugins.parallelism.ddp import DistributedData
    from tryplicity_plugins.parallelism.fsdp import FullyShardedData
    from tryplicity_plugins.parallelism.single import SingleDevice

    return [SingleDevice, DistributedData, FullyShardedData]
