"""Lazy imports (PEP 810) of packages that a library names at its head and uses in functions that reading a model never calls."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Union

LAZY: Mapping[str, frozenset[str]] = {
    "transformer_lens": frozenset({"datasets", "pandas", "pytest"}),
    "transformers": frozenset({"scipy"}),
}
"""The packages that each library gets lazily: for data sets, tables and its own tests, and for losses of object detection."""


class LazyName:
    """Stands for what a library imports, until it is called or asked for an attribute.

    Args:
        real: imports and returns what it stands for.
    """

    def __init__(self, real: Callable[[], Any]) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return _stand_in(lambda: getattr(self._real(), name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what it stands for."""
        return _stand_in(lambda: self._real()(*args, **kwargs))

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


def _stand_in(real: Callable[[], Any]) -> Any:
    """What is asked of a stand-in: another one while the library is imported, which names types and marks its functions then."""
    return LazyName(real) if builtins.__import__.__module__ == __name__ else real()
