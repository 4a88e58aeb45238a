"""Judges of the project: what is worth learning from."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_components():
    from tryplicity_plugins.judges.embedding import Embedding
    from tryplicity_plugins.judges.neural import FineWebEdu, LanguageModelRater
    from tryplicity_plugins.judges.perplexity import Perplexity
    from tryplicity_plugins.judges.reading_level import ReadingLevel
    from tryplicity_plugins.judges.statistical import Statistical

    return [Embedding, FineWebEdu, LanguageModelRater, Perplexity, ReadingLevel, Statistical]
