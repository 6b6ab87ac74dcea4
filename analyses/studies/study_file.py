"""A study file to a `Study`: TOML with includes, checked by pydantic, every fault with its line."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, InstanceOf, TypeAdapter, ValidationError, create_model, field_validator

from analyses.options import NAMES, defaults_of, types_of
from analyses.running.model_spec import CHOICES, ModelSpec
from analyses.studies.definition import AnalysisSpec, Name, Override, PromptSet, Study, StudyModel, Text, without_nul
from analyses.studies.file_lines import Key, Origin, StudyError, fault, located
from probes.errors import one_line, shown, unknown
from probes.input_files import kind_of, read_text
from probes.strict_json import JsonFault, check_tree


class _Closed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    no_nul = field_validator("*")(without_nul)


_MODEL_OPTIONS = {
    name: (Literal[CHOICES[name]] if name in CHOICES else kind, defaults_of(ModelSpec)[name])
    for name, kind in types_of(ModelSpec).items()
}
_ModelTable = create_model(
    "_ModelTable",
    __base__=_Closed,
    name=(Text, ""),
    origin=(InstanceOf[Origin], ...),
    **{**_MODEL_OPTIONS, "ref": (Name, ...)},  # type: ignore[call-overload]
)
_MODELS: Any = tuple[_ModelTable, ...]  # type: ignore[valid-type]
_TABLES: dict[str, Any] = {
    "models": _ModelTable.model_fields,
    "prompts": PromptSet.__dataclass_fields__,
    "analyses": AnalysisSpec.__dataclass_fields__,
    "overrides": Override.__dataclass_fields__,
}
"""The keys of each kind of table."""
_TYPES = {"string_type": str, "path_type": str, "int_type": int, "bool_type": bool}
_EXAMPLES = {"ref": "smollm2-135m", "name": "mine", "analysis": "voids"}


def read_study(path: str | Path) -> Study:
    """Return the study of a file and of the files it includes; nothing is run or loaded.

    Lists of an included file come before the file's own; its name, title and seeds stand unless the file gives others.

    Raises:
        StudyError: a fault, with file and line.
    """
    pages = list(_pages(Path(path), (), set()))
    own, tables = pages[-1][0], [page for page, _ in pages]
    return Study(
        name=own.name,
        title=next((page.title for page in reversed(tables) if page.title), ""),
        seeds=next((page.seeds for page, keys in reversed(pages) if "seeds" in keys), (0,)),
        origin=own.origin,
        **{kind: tuple(spec for page in tables for spec in getattr(page, kind)) for kind in _TABLES},
    )


def _pages(
    path: Path, chain: tuple[Path, ...], seen: set[Path], named: Origin | None = None
) -> Iterator[tuple[Study, set[str]]]:
    """Yield the files of a study with the keys that each gives, each file once, included ones first."""
    real = path.resolve()
    if real in chain:
        names = " -> ".join(file.name for file in (*chain[chain.index(real) :], real))
        raise fault(f"cyclic include: {names}", named)
    if real in seen:
        return
    seen.add(real)
    text, values = _read(path, named)
    origin = Origin(path, text)
    for i, other in enumerate(_validated(tuple[Name, ...], values.pop("include", ()), origin, "include")):
        yield from _pages(path.parent / other, (*chain, real), seen, origin.child("include", i))
    yield _page(values, origin), set(values)


def _page(values: dict[str, Any], origin: Origin) -> Study:
    """Return what one file says, each of its tables with its place."""
    for kind in _TABLES:
        for i, table in enumerate(values[kind] if isinstance(values.get(kind), list) else ()):
            if isinstance(table, dict):
                table.setdefault("origin", origin.child(kind, i))
    models = _validated(_MODELS, values.get("models", ()), origin, "models")
    page = {
        "analyses": (),
        "origin": origin,
        **values,
        "name": values.get("name", "") or origin.file.stem,
        "models": tuple(map(_model, models)),
    }
    return _validated(Study, page, origin)


def _model(table: Any) -> StudyModel:
    options = table.model_dump(exclude={"name", "origin"})
    beside = table.origin.file.parent / table.ref
    if kind_of(beside) != "nothing":
        options["ref"] = str(beside)
    with located(table.origin):
        return StudyModel(ModelSpec(**options), table.name or table.ref, table.origin)


def _validated(kind: Any, values: Any, origin: Origin, *keys: Key) -> Any:
    """Return the values as what they should be, or raise the first fault at its line."""
    try:
        return TypeAdapter(kind).validate_python(values, context=origin.file.parent)
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        path = (*keys, *first["loc"])
        raise fault(_message(first, path), origin, *path) from None


def _message(error: Any, path: tuple[Any, ...]) -> str:
    """Return one line for a fault that pydantic met at `path`: the value, and what to write in its place."""
    value, context = error["input"], error.get("ctx", {})
    name = ".".join(key for key in path[2:] if isinstance(key, str)) or str(path[0] if path else "")
    if path[2:3] == ("tokens",):
        return "tokens must be a list of lists of token ids, none of them empty: [[5, 6], [7]]"
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "missing":
            return f"{name!r} is missing: write {name} = {_EXAMPLES.get(name, '')!r}"
        case "extra_forbidden" | "unexpected_keyword_argument" | "is_instance_of":
            legal = _TABLES[path[0]] if len(path) > 2 else {*Study.__dataclass_fields__, "include"}
            return unknown("key", path[-1], sorted({*legal} - {"origin"}))
        case "literal_error":
            return unknown(name, value, CHOICES[name])
        case "tuple_type" if isinstance(value, dict):
            return f"{name} is one table: write its header as [[{name}]]"
        case "too_short" if value == "":
            return f"{name} is empty: give a text"
        case "tuple_type" | "too_short":
            return f"{name} is {shown(value)}: give a list of values"
        case "dict_type" | "dataclass_type" | "model_type":
            return f"{shown(value)} is not a table: write keys and values"
        case "greater_than_equal":
            return f"{name} is {shown(value)}: give a number from {context['ge']}"
    return f"{name} is {shown(value)}: give {NAMES[_TYPES[error['type']]]}"


def _read(path: Path, named: Origin | None) -> tuple[str, dict[str, Any]]:
    """Return the text of a file and what it says."""
    try:
        text = read_text(path, "study file", StudyError)
    except StudyError as error:
        raise fault(str(error), named) from None
    try:
        values: dict[str, Any] = tomllib.loads(text)
        check_tree(values)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r" \(at line (\d+), ", str(error))
        number = int(line[1]) if line else text.count("\n") + 1
        raise StudyError(f"{path}:{number}: not TOML: {str(error).partition(' (at ')[0]}") from None
    except JsonFault as error:
        raise fault(str(error), Origin(path, text), *error.path) from None
    except (ValueError, RecursionError) as error:  # A number, a date or a depth that Python refuses, without its line.
        lines = text.split("\n")
        number = 1 + bisect_left(range(1, len(lines) + 1), True, key=lambda n: _breaks_python("\n".join(lines[:n])))
        raise StudyError(f"{path}:{number}: cannot be read: {one_line(error)}; write it smaller") from None
    return text, values


def _breaks_python(text: str) -> bool:
    """Whether a text is refused by Python rather than by the grammar of TOML."""
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return False
