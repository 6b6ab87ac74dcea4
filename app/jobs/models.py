"""The models of the resident process: the last ones that jobs and live work asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from analyses.running.model_spec import ModelSpec
from probes.models import Model

MOST = 2
"""Models in memory: that of a job, and that of live work where it is another."""

_LOADED: OrderedDict[ModelSpec, Model] = OrderedDict()
_LOCK = threading.RLock()


def is_loaded(spec: ModelSpec) -> bool:
    """Return whether a model is in memory."""
    return spec in _LOADED


def in_memory(model: Model) -> bool:
    """Return whether a model is one of those that are kept."""
    return any(model is one for one in _LOADED.values())


def loaded(spec: ModelSpec, note: Callable[[str], None] | None = None) -> Model:
    """Return a model, loaded where it is not in memory; the one unused for longest makes room.

    Raises:
        UserError: a model that cannot be loaded.
    """
    with _LOCK:
        if spec not in _LOADED:
            while len(_LOADED) >= MOST:
                _LOADED.popitem(last=False)
            _LOADED[spec] = spec.load(progress=note)
        _LOADED.move_to_end(spec)
        return _LOADED[spec]


def drop() -> None:
    """Forget all."""
    with _LOCK:
        _LOADED.clear()
