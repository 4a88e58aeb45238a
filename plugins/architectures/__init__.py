"""Published architectures: how their files read as specs."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_components():
    from tryplicity_plugins.architectures.llama import Llama

    return [Llama]
