"""English and examples out of docstrings, without importing anything."""

import ast

import pytest

from tryplicity_plugins.sources.harvest import Block, Docstring, blocks, clean, docstrings, reads_as_prose


def prose(text):
    return [block.text for block in blocks(text) if block.kind == "prose"]


def test_docstrings_and_what_they_document():
    source = '''"""Module text."""
x = """assigned"""
call("""not at the start of a line""")

class Thing(Base):
    r"""Raw \\alpha."""

    async def method(self, a,
                     b):
        \'\'\'Escaped \\"quotes\\" here.\'\'\'

add_docstr(
    torch.abs,
    r"""
abs(input)
""",
)
'''
    assert list(docstrings(source)) == [
        Docstring("", "Module text."), Docstring("", "assigned"), Docstring("Thing", "Raw \\alpha."),
        Docstring("method", 'Escaped "quotes" here.'), Docstring("torch.abs", "\nabs(input)\n")]


@pytest.mark.parametrize("module", ["textwrap", "heapq", "json.decoder", "asyncio.tasks", "difflib"])
def test_every_docstring_that_the_syntax_tree_has_is_found(module):
    import importlib.util
    from pathlib import Path

    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    found = [d.text for d in docstrings(source)]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    expected = [ast.get_docstring(node, clean=False) for node in nodes]
    triple = [text for text in expected if text and "\n" in text and "\\" not in text]
    assert triple and not [text for text in triple if text not in found]


def test_prose_stays_and_the_rest_goes():
    text = """Return the sum of all elements in the given axis.

    The elements are added
    one after the other in `float64`.

    .. versionadded:: 1.2
       Something that was not there before is there now.

    .. note:: This is slow on the first call of a process.

    .. math::

       a = b + c is the rule of the game for it

    Parameters
    ----------
    axis : int
        The axis along which the elements are to be added.

    Notes
    -----
    It is fast because it does the work in blocks. For example::

        this_is(code) and it is not a sentence for anyone.

    See Also
    --------
    prod : The product of all the elements of an array.

    Examples
    --------
    Adding two numbers is as easy as this, as you can see.

    >>> add(1,
    ...     2)
    3

    =====  =====
    A      B
    =====  =====
    """
    assert list(blocks(text)) == [
        Block("prose", "Return the sum of all elements in the given axis."),
        Block("prose", "The elements are added one after the other in float64."),
        Block("prose", "This is slow on the first call of a process."),
        Block("prose", "It is fast because it does the work in blocks."),
        Block("prose", "Adding two numbers is as easy as this, as you can see."),
        Block("example", ">>> add(1,\n...     2)\n3")]


def test_the_style_of_google_and_of_sphinx():
    assert prose("""Computes the thing that it is meant to compute.

    Args:
        x (Tensor): the input tensor which is not to be kept.

    Returns:
        The output of the function on the input.

    The rest of the text is here again.

    :param y: another thing that is left out of the text
        with a second line that belongs to it.
    :returns: nothing that anyone would read
    """) == ["Computes the thing that it is meant to compute.", "The rest of the text is here again."]


def test_lists_become_paragraphs():
    assert prose("""The rules of the game are these.

    1. The first player moves one piece
       of the board.
    2. The second player does the same.
    """) == ["The rules of the game are these.", "The first player moves one piece of the board.",
             "The second player does the same."]


@pytest.mark.parametrize("marked, plain", [
    ("See :class:`~torch.nn.Linear` and :func:`len <builtins.len>`.", "See Linear and len."),
    ("Uses ``x`` and `y` from `the page <https://x.org>`_ of [1]_.", "Uses x and y from the page of [1]."),
    ("This is **strong** and *weak* but 2 * 3 * 4 stays.", "This is strong and weak but 2 * 3 * 4 stays."),
    ("It is this", "It is this."),
    ("The first sentence stands. The second announces something:", "The first sentence stands."),
    ("It announces something::", ""),
    ("The matrix Q is such that", ""),
])
def test_markup_is_removed(marked, plain):
    assert clean(marked) == plain


@pytest.mark.parametrize("text", [
    "add(x, y) -> the sum of the two numbers.", "x = y + z; w = {a: b} is it.", "TODO: this is to be done by "
                                                                                "you.",
    "lower case at the start of the sentence.", "Short.", "Alpha beta gamma delta epsilon zeta eta theta.",
    "The {name} is put in the place of the name.", "alpha beta gamma delta"])
def test_what_is_not_prose(text):
    assert not reads_as_prose(text)
