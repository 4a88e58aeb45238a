"""Sources of training text of the project."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_components():
    from tryplicity_plugins.sources.corpus import Corpus
    from tryplicity_plugins.sources.damaged import Damaged
    from tryplicity_plugins.sources.files import Files
    from tryplicity_plugins.sources.huggingface import HuggingFace
    from tryplicity_plugins.sources.python_docs import PythonDocs
    from tryplicity_plugins.sources.python_docs_chat import PythonDocsChat
    from tryplicity_plugins.sources.python_reference import PythonReference

    return [Corpus, Damaged, Files, HuggingFace, PythonDocs, PythonDocsChat, PythonReference]
