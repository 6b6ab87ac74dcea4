"""A study file to a `Study`: TOML, with includes, every fault with its line."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analyses.options import defaults_of
from analyses.running.model_spec import CHOICES, ModelSpec
from analyses.studies.definition import AnalysisSpec, Override, PromptSet, Study, StudyModel
from analyses.studies.fields import Table
from analyses.studies.origin import Origin, StudyError, fault
from probes.errors import one_line, shown, unknown
from probes.input_files import kind_of, read_text
from probes.strict_json import JsonFault, check_tree

_TOP = ("name", "title", "seeds", "include", "models", "prompts", "analyses", "overrides")

MAX_NAME = 200
"""Characters of the longest name of a study, which names its folder."""


def read_study(path: str | Path) -> Study:
    """The study of a file and of the files it includes; nothing is run or loaded.

    Lists of an included file come before the file's own; its name, title and seeds stand unless the file gives others.

    Raises:
        StudyError: a fault, with file and line.
    """
    pages = list(_pages(Path(path), (), set()))
    own, seeds = pages[-1], tuple[int, ...]((0,))
    for page in pages:
        given = page.values_of("seeds", int)
        if given is not None:
            seeds = _seeds(page, given)
    title = [page.get("title", "") for page in pages if page.get("title", "")]
    name = own.get("name", "") or Path(path).stem
    if Path(name).name != name or len(name) > MAX_NAME:
        raise fault(f"name is {shown(name)}: give one of at most {MAX_NAME} characters without /", own.origin, "name")
    return Study(
        name=name,
        title=title[-1] if title else "",
        models=tuple(_model(t) for page in pages for t in page.tables("models")),
        prompts=tuple(_prompts(t) for page in pages for t in page.tables("prompts")),
        analyses=tuple(_analysis(t) for page in pages for t in page.tables("analyses")),
        overrides=tuple(_override(t) for page in pages for t in page.tables("overrides")),
        seeds=seeds,
        origin=own.origin,
    )


def _pages(path: Path, chain: tuple[Path, ...], seen: set[Path], named: Origin | None = None) -> Iterator[Table]:
    """The files of a study, each once, included ones first."""
    real = path.resolve()
    if real in chain:
        names = " -> ".join(file.name for file in (*chain[chain.index(real) :], real))
        raise fault(f"cyclic include: {names}", named)
    if real in seen:
        return
    seen.add(real)
    page = _page(path, named)
    for i, other in enumerate(page.values_of("include", str) or ()):
        yield from _pages(path.parent / other, (*chain, real), seen, page.origin.child("include", i))
    yield page


def _page(path: Path, named: Origin | None) -> Table:
    try:
        text = read_text(path, "study file", StudyError)
    except StudyError as error:
        raise fault(str(error), named) from None
    try:
        values: Any = tomllib.loads(text)
        check_tree(values)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+), ", str(error))
        line = int(found[1]) if found else text.count("\n") + 1
        raise StudyError(f"{path}:{line}: not TOML: {str(error).partition(' (at ')[0]}") from None
    except JsonFault as error:
        raise fault(str(error), Origin(path, text), *error.path) from None
    except (ValueError, RecursionError) as error:  # A number, a date or a depth that Python refuses, without its line.
        raise StudyError(
            f"{path}:{_line_of_fault(text)}: cannot be read: {one_line(error)}; write it smaller"
        ) from None
    page = Table(values, Origin(path, text))
    for key in _TOP:
        page.raw(key)
    page.close()
    return page


def _line_of_fault(text: str) -> int:
    """The first line with which the text cannot be read, for faults that name no line."""
    lines = text.split("\n")
    return 1 + bisect_left(range(1, len(lines) + 1), True, key=lambda n: _is_fault("\n".join(lines[:n])))


def _is_fault(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return False


def _seeds(page: Table, seeds: tuple[int, ...]) -> tuple[int, ...]:
    for i, seed in enumerate(seeds):
        if seed in seeds[:i]:
            raise fault(f"seed {seed} is given twice", page.origin, "seeds", i)
    if not seeds:
        raise fault("seeds is empty: give at least one, [0]", page.origin, "seeds")
    return seeds


def _model(table: Table) -> StudyModel:
    ref = table.required("ref", '"smollm2-135m"')
    beside = table.origin.file.parent / ref
    options: dict[str, Any] = {
        name: table.get(name, "" if default is None else default) or default
        for name, default in defaults_of(ModelSpec).items()
        if name != "ref"
    }
    for name, legal in CHOICES.items():
        if options[name] not in legal:
            raise fault(unknown(name, options[name], legal), table.origin, name)
    spec = ModelSpec(str(beside) if kind_of(beside) != "nothing" else ref, **options)
    model = StudyModel(spec, table.get("name", "") or ref, table.origin)
    table.close()
    return model


def _prompts(table: Table) -> PromptSet:
    name, file = table.required("name", '"mine"'), table.get("file", "")
    texts, ids, limit = table.values_of("texts", str), _token_lists(table), table.get("limit", 0)
    if bool(file) == bool(texts or ids):
        raise fault(f"prompts {name!r} need either file or texts or tokens", table.origin)
    if limit < 0:
        raise fault(f"limit is {limit}: give a number from 0, which takes all", table.origin, "limit")
    for i, text in enumerate(texts or ()):
        if not text:
            raise fault("a text is empty", table.origin, "texts", i)
    table.close()
    path = table.origin.file.parent / file if file else None
    return PromptSet(name, path, texts or (), ids, limit, origin=table.origin)


def _token_lists(table: Table) -> tuple[tuple[int, ...], ...]:
    lists = table.raw("tokens") or []
    for i, ids in enumerate(lists if isinstance(lists, list) else [None]):
        if not isinstance(ids, list) or not ids or not all(type(t) is int and t >= 0 for t in ids):
            raise fault(
                "tokens must be a list of lists of token ids, none of them empty: [[5, 6], [7]]",
                table.origin,
                "tokens",
                i,
            )
    return tuple(tuple(ids) for ids in lists)


def _analysis(table: Table) -> AnalysisSpec:
    vary = table.table("vary")
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise fault(f"vary.{key} is {shown(values)}: give a list of values", table.origin, "vary", key)
    spec = AnalysisSpec(
        analysis=table.required("analysis", '"voids"'),
        name=table.get("name", ""),
        options=table.table("options"),
        vary={key: tuple(values) for key, values in vary.items()},
        models=table.values_of("models", str),
        prompts=table.values_of("prompts", str),
        origin=table.origin,
    )
    table.close()
    return spec


def _override(table: Table) -> Override:
    spec = Override(
        model=table.get("model", "") or None,
        prompts=table.get("prompts", "") or None,
        analysis=table.get("analysis", "") or None,
        options=table.table("options"),
        skip=table.get("skip", False),
        origin=table.origin,
    )
    if not spec.options and not spec.skip:
        raise fault("an override changes nothing: give options, or skip = true", table.origin)
    table.close()
    return spec
