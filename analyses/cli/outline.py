"""The options of an analysis as its source spells them: read without importing it, which takes seconds."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any

from analyses.options import types_of, validate
from analyses.registry import get_analysis, paths


def options_of(name: str) -> Any:
    """Return a dataclass with the options, name, title and docstring of the analysis of that name.

    It says of itself whether it makes its prompts, as the analysis does. It is put together from the source, and checks values as the analysis itself does, but for what only its code can tell;
    where the source says them in another way than a literal or a constant, the analysis is imported and returned.
    """
    module, _, attribute = paths()[name].partition(":")
    try:
        spelled = _source(module).spelled_class(attribute)
        if spelled is None:
            raise LookupError(attribute)
        own = {"__post_init__": validate, "name": name, "title": spelled.value("title")}
        own["makes_prompts"] = spelled.answer("makes_prompts")
        fields = [(field, kind, default) for field, (kind, default) in spelled.options().items()]
        outline = dataclasses.make_dataclass(attribute, fields, namespace=own, frozen=True)
        outline.__doc__ = ast.get_docstring(spelled.node)
        types_of(outline)
    except (LookupError, SyntaxError, OSError, TypeError, ValueError, AttributeError, NameError, StopIteration):
        return get_analysis(name)
    return outline


@dataclasses.dataclass(frozen=True)
class _Class:
    """A class in the source of a module."""

    node: ast.ClassDef
    names: _Names

    def options(self) -> dict[str, tuple[Any, Any]]:
        """Return type and dataclass field of each option, in the order that a dataclass has them in."""
        options: dict[str, tuple[Any, Any]] = {}
        for base in reversed(self.node.bases):
            if (spelled := self.names.spelled_class(ast.unparse(base))) is not None:
                options |= spelled.options()
        is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in self.node.decorator_list)
        for field in self.node.body if is_dataclass else ():
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).startswith("ClassVar"):
                if not (isinstance(field.value, ast.Call) and ast.unparse(field.value.func) == "option"):
                    raise LookupError(ast.unparse(field))
                kind, default = self.names.value_of(field.annotation), self.names.value_of(field.value)
                options[ast.unparse(field.target)] = kind, default
        return options

    def answer(self, name: str) -> property | None:
        """Return a property of the class or of one that it is made of, where it returns one expression and does no more."""
        for statement in self.node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                said = statement.body[ast.get_docstring(statement) is not None :]
                if len(said) != 1 or not isinstance(said[0], ast.Return) or said[0].value is None:
                    raise LookupError(ast.unparse(statement))
                return property(partial(_worth, compile(ast.Expression(said[0].value), "options", "eval"), self.names))
        bases = (self.names.spelled_class(ast.unparse(base)) for base in self.node.bases)
        return next(filter(None, (base.answer(name) for base in bases if base is not None)), None)

    def value(self, name: str) -> Any:
        """Return what the class says of itself under a name."""
        return _Names(self.node)[name]


class _Names(dict[str, Any]):
    """The names of a module or a class, worked out from its source when they are asked for."""

    def __init__(self, tree: ast.Module | ast.ClassDef) -> None:
        super().__init__()
        self.tree = tree

    def value_of(self, expression: ast.expr | None) -> Any:
        """Return what an expression of the module is worth."""
        return eval(compile(ast.Expression(expression), "options", "eval"), {}, self)  # type: ignore[arg-type]

    def __missing__(self, name: str) -> Any:
        for statement in self._that_bind(name):
            if isinstance(statement, ast.ImportFrom):
                return _imported(str(statement.module), _original(statement, name))
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                return self.value_of(statement.value)
        raise KeyError(name)  # a built-in, or nothing that can be read

    def spelled_class(self, name: str) -> _Class | None:
        """Return the class of that name; None for one of the standard library, which has no options."""
        for statement in self._that_bind(name):
            if isinstance(statement, ast.ClassDef):
                return _Class(statement, self)
            if isinstance(statement, ast.ImportFrom) and not _is_standard(str(statement.module)):
                return _source(str(statement.module)).spelled_class(_original(statement, name))
            if isinstance(statement, ast.ImportFrom):
                return None
        raise LookupError(name)

    def _that_bind(self, name: str) -> Iterator[ast.stmt]:
        for statement in self.tree.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            bound = {target.id for target in targets if isinstance(target, ast.Name)}
            if isinstance(statement, ast.ImportFrom):
                bound = {alias.asname or alias.name for alias in statement.names}
            if name in bound or name == getattr(statement, "name", None):
                yield statement


def _worth(code: CodeType, names: _Names, self: Any) -> Any:
    return eval(code, {"self": self}, names)


def _original(statement: ast.ImportFrom, name: str) -> str:
    return next(alias.name for alias in statement.names if name in (alias.asname, alias.name))


def _imported(module: str, name: str) -> Any:
    """Return a name of another module, which is imported only where that takes no time."""
    if module in sys.modules or _is_standard(module):
        return getattr(import_module(module), name)
    return _source(module)[name]


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


@cache
def _source(module: str) -> _Names:
    top, *inner = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise LookupError(module)
    place = Path(spec.origin).parent.joinpath(*inner) if inner else Path(spec.origin)
    file = next(path for path in (place, place.with_suffix(".py"), place / "__init__.py") if path.is_file())
    return _Names(ast.parse(file.read_text(encoding="utf-8")))
