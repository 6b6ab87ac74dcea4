"""What loading a model imports, and importing it in less time; importing this file imports nothing heavy."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from probes.models.lazy_imports import lazy_imports

MODULES = (
    "probes.models.backends.native", "transformers.activations", "transformers.modeling_layers", "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto", "transformer_lens.factories.architecture_adapter_factory",
    "transformer_lens.model_bridge.sources._bridge_builder",
)  # fmt: skip
"""By name; importing them takes longer than a small model itself."""
_ONE = threading.RLock()
LISTING = "create_import_structure_from_path"
"""The function of transformers that lists what the files of a folder define."""


def import_all(names: Sequence[str] = MODULES) -> None:
    """Import modules; one that cannot be is passed over, and who needs it meets the error."""
    with _ONE, uncollected(), _models_listed_once(), lazy_imports():
        for name in names:
            with suppress(Exception):
                import_module(name)


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage inside: imports and loads make almost none, and looking for it takes a fifth of their time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@contextmanager
def _models_listed_once() -> Iterator[None]:
    """Have `transformers.models` take the list of all architectures that `transformers` has made of three thousand files.

    Left alone it makes the same list again: the function remembers what it made, but is asked by another path.
    """
    import transformers
    from transformers.utils import import_utils

    listed: Callable[[Any], Any] | None = getattr(import_utils, LISTING, None)
    if listed is None:
        yield
        return
    folder = Path(transformers.__file__).parent / "models"
    setattr(import_utils, LISTING, lambda path: listed(folder if Path(path) == folder / "__init__.py" else path))
    try:
        yield
    finally:
        setattr(import_utils, LISTING, listed)
