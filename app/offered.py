"""The registered analyses. Their names are known at once; their code brings torch, which takes seconds, and is imported when needed."""

from __future__ import annotations

import ast
import sys
import threading
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analyses.base import Analysis

_LOADING = threading.Lock()
IMPORTER = "import-analyses"
DELAY = 4.0
"""Seconds."""


@cache
def names() -> tuple[str, ...]:
    """The names of the registered analyses, read off the registry's source without importing it.

    An analysis is called like its module.
    """
    tree = ast.parse(files("analyses").joinpath("registry.py").read_text(encoding="utf-8"))
    modules = {
        alias.asname or alias.name: node.module.split(".")[-1]
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    listed = next(node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.value)
    assert isinstance(listed, ast.Tuple)
    return tuple(modules[item.id] for item in listed.elts if isinstance(item, ast.Name))


def label(name: str) -> str:
    """An analysis's name as a page shows it."""
    return name.replace("_", " ").capitalize()


def ready() -> bool:
    """Whether the analyses are imported, so that asking for them costs nothing."""
    return hasattr(sys.modules.get("analyses.registry"), "get_analysis")


def load() -> None:
    """Imports the analyses."""
    with _LOADING:
        import analyses.registry  # noqa: F401


def load_soon() -> None:
    """Imports the analyses in the background, a little later: the browser first draws the page it has."""
    if not ready() and not any(thread.name == IMPORTER for thread in threading.enumerate()):
        timer = threading.Timer(DELAY, load)
        timer.name, timer.daemon = IMPORTER, True
        timer.start()


def get(name: str) -> type[Analysis]:
    """The analysis of that name."""
    load()
    from analyses.registry import get_analysis

    return get_analysis(name)
