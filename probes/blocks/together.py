"""Work on one model that can be done in any order, and is cheaper done together where blocks are read from disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from probes.models.protocol import LayerMajor, Model

T = TypeVar("T")


def together(model: Model, tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Return what each task returns: one after another, or block by block where the model's blocks are read from disk.

    Args:
        model: the model that the tasks run.
        tasks: each by itself; none may use what another one changes, or run the model while it holds a lock.
    """
    return model.together(tasks) if isinstance(model, LayerMajor) else [task() for task in tasks]


def resumable(model: Model, key: str) -> AbstractContextManager[None]:
    """Return a context in which work on a model goes on, after a kill, from its last finished group of blocks.

    Nothing is kept for a model in memory, nor after the context ended well.

    Args:
        model: the model that the work runs.
        key: all that decides the work beside the model, as text.
    """
    return model.resumable(key) if isinstance(model, LayerMajor) else nullcontext()
