"""Where passages for a question come from."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_components():
    from tryplicity_plugins.retrievers.passages import Passages
    from tryplicity_plugins.retrievers.searxng import SearXNG
    from tryplicity_plugins.retrievers.semantic import Semantic

    return [Passages, SearXNG, Semantic]
