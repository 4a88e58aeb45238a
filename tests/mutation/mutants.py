"""The one-place changes that a test should notice, found in a file's syntax tree."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
                ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is"}
_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
               ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
               ast.MatMult: ast.Mult}


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes `start` to `end` of the file become `after`."""

    file: str  # from the root of the repository
    line: int
    start: int
    end: int
    before: str
    after: str
    scope: str  # the function or class that holds it, dotted

    @property
    def key(self) -> str:
        """The same as long as the function's name and the changed text stay; survivors are noted under it."""
        return f"{self.file}::{self.scope}: {' '.join(self.before.split())} -> {' '.join(self.after.split())}"

    @property
    def lot(self) -> str:
        """A number drawn from the mutant itself: samples and parts are the same on every machine."""
        return hashlib.sha256(f"{self.key}@{self.line}:{self.start}".encode()).hexdigest()

    def apply(self, source: bytes) -> bytes:
        return source[:self.start] + self.after.encode() + source[self.end:]


class _Finder:
    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def mutant(self, node: ast.AST, after: str, scope: tuple[str, ...]) -> Mutant:
        start = self.lines[node.lineno - 1] + node.col_offset
        end = self.lines[node.end_lineno - 1] + node.end_col_offset
        return Mutant(self.file, node.lineno, start, end, self.source[start:end].decode(), after, ".".join(scope))

    def walk(self, node: ast.AST, scope: tuple[str, ...]) -> Iterator[Mutant]:
        # messages, types, decorators and what is only for type checkers are not what tests are for
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        skipped = {id(child) for name in ("annotation", "returns", "decorator_list", "bases")
                   for child in _as_list(getattr(node, name, None))}
        yield from ((self.mutant(place, after, scope)) for place, after in _changes(node))
        for child in ast.iter_child_nodes(node):
            if id(child) not in skipped:
                yield from self.walk(child, scope)


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(what is replaced, by which text) for one node."""
    match node:
        case ast.Compare(left=left, ops=ops, comparators=rights):
            for i, op in enumerate(ops):
                sides = [left, *rights]
                signs = [_COMPARISONS[type(op)] if j == i else _sign(o) for j, o in enumerate(ops)]
                text = ast.unparse(sides[0]) + "".join(f" {s} {ast.unparse(r)}"
                                                       for s, r in zip(signs, rights, strict=True))
                yield node, f"({text})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC and not _is_text(left):
            yield node, f"({ast.unparse(ast.BinOp(left, _ARITHMETIC[type(op)](), right))})"
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in _ARITHMETIC:
            yield node, ast.unparse(ast.AugAssign(target, _ARITHMETIC[type(op)](), value))
        case ast.BoolOp(op=op, values=values):
            yield node, f"({ast.unparse(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, f"bool({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)):
            yield node, str(value + 1)
        case ast.Constant(value=float(value)):
            yield node, repr(value * 2 if value else 1.0)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            if not isinstance(test, ast.Compare | ast.BoolOp | ast.Constant) and not (
                    isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):  # changed above already
                yield test, f"(not {ast.unparse(test)})"
        case ast.Return(value=ast.AST() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield node, "return None"
        case ast.Expr(value=ast.Call() | ast.Await()):
            yield node, "pass"


def _sign(op: ast.cmpop) -> str:
    return {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.In: "in",
            ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not"}[type(op)]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Every mutant of a file, in order of place."""
    source = (root / file).read_bytes()
    found = _Finder(file, source).walk(ast.parse(source), ())
    return sorted(found, key=lambda m: (m.start, m.end, m.after))


#: what the score is given for, and the files it counts
PACKAGES = {
    "training": ["tryplicity/training"],
    "planner": ["tryplicity/planner"],
    "data": ["tryplicity/data"],
    "search": ["tryplicity/search"],
    "server": ["tryplicity/server"],
    "inference": ["tryplicity/inference"],
    "plugins": ["plugins"],
}


def files_of(root: Path, package: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for folder in PACKAGES[package]
                  for path in (root / folder).rglob("*.py") if path.stat().st_size)
