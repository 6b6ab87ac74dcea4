"""The model's stored answer to a fixed short input, which a model has to reproduce before it reads or adds rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from probes.errors import ModelError
from probes.models.protocol import Model
from probes.models.verify.canary_answer import difference
from probes.store import DamagedShard, Packet, Ragged, RowStore

CANARY = "canary"
"""Stored once per context: some of the model's outputs at every position of its canary's tokens, float32."""


def check_canary(model: Model, context: Mapping[str, str], store: RowStore) -> None:
    """Refuse a store whose rows under this context come from something that computes other numbers.

    Raises:
        ModelError: the stored canary is not what this model computes.
    """
    stored, canary = _stored(model, context, store), model.canary
    error = 0.0 if stored is None else difference(stored, canary.values)
    if not error <= canary.tolerance:
        raise ModelError(
            f"{model.ref}: the store {str(store.root)!r} holds rows under this model's key that it does not reproduce: a fixed "
            f"prompt differs by {error:.1e} relative (tolerance {canary.tolerance:.0e}). Something beside its weights decides "
            "its numbers, here or where those rows were captured: a class or function replaced by another library, or other "
            "versions. Undo it, or use a store of its own (--store DIR)"
        )


def put_canary(model: Model, context: Mapping[str, str], store: RowStore) -> None:
    """Put this model's canary into the store, before rows are added under a context that has none.

    Raises:
        ModelError: another process was first, with a canary that this model does not compute.
    """
    if _stored(model, context, store) is None:
        rows, values = _rows(model), model.canary.values
        store.put(Packet(_plain(context), rows, {CANARY: Ragged(values.flatten(0, 1), (values.shape[1],) * len(rows))}))
        check_canary(model, context, store)


def _stored(model: Model, context: Mapping[str, str], store: RowStore) -> Tensor | None:
    """The stored canary [rows, pos, width], or None where there is none that can be read."""
    key, rows = _plain(context), _rows(model)
    if not store.contains(key, rows, [CANARY]).all():
        return None
    try:
        return torch.stack(store.read(key, rows, CANARY))
    except DamagedShard:
        return None


def _plain(context: Mapping[str, str]) -> dict[str, str]:
    """The context without edits, which are applied to one and the same model."""
    return {**context, "edits": "none"}


def _rows(model: Model) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in model.canary.tokens.tolist())
