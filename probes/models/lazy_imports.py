"""Lazy imports (PEP 810) of packages that a library names at its head and uses in functions that reading a model never calls."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Union

LAZY: Mapping[str, frozenset[str]] = {
    "transformer_lens": frozenset({"datasets", "pandas"}),
    "transformers": frozenset({"scipy"}),
}
"""The packages that each library gets lazily: data sets and tables of experiments, and the losses of object detection."""


class LazyName:
    """Stands for what a library imports: calling it, or asking it for an attribute, imports it.

    Args:
        real: imports and returns what it stands for.
    """

    def __init__(self, real: Callable[[], Any]) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        # Heads of functions name types as `pandas.DataFrame`, and are read while the library is imported.
        return LazyName(lambda: getattr(self._real(), name)) if _lazy() else getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what it stands for."""
        return self._real()(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:
        return Union.__getitem__((self, other))

    def __ror__(self, other: Any) -> Any:
        return Union.__getitem__((other, self))


@contextmanager
def lazy_imports() -> Iterator[None]:
    """Give the libraries of `LAZY` stand-ins for what they import of these packages inside; everybody else gets the packages."""
    ordinary = builtins.__import__

    def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        library = str((globals or {}).get("__name__")).partition(".")[0]
        package, _, inner = name.partition(".")
        if level or package not in LAZY.get(library, ()) or (inner and not fromlist):
            return ordinary(name, globals, locals, fromlist, level)
        whole = LazyName(lambda: import_module(name))
        return SimpleNamespace(**{one: getattr(whole, one) for one in fromlist}) if fromlist else whole

    builtins.__import__ = importing
    try:
        yield
    finally:
        builtins.__import__ = ordinary


def _lazy() -> bool:
    return builtins.__import__.__module__ == __name__
