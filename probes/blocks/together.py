"""Work on one model that can be done in any order, and is cheaper done together where blocks are read from disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from probes.models.protocol import LayerMajor, Model

T = TypeVar("T")


def together(model: Model, tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Return what each task returns: one after another, or block by block where the model's blocks are read from disk.

    Args:
        model: the model that the tasks run.
        tasks: each by itself; none may use what another one changes.
    """
    return model.together(tasks) if isinstance(model, LayerMajor) else [task() for task in tasks]
