"""Foreign rows on their way into the store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from probes.capture.needs import Feature
from probes.errors import StoreError, shown
from probes.points import POINTS, Address
from probes.store import ActivationStore, Packet, Ragged
from probes.strict_json import text_fault

PACKET_BYTES = 64 * 2**20
"""Rows gathered before they are written, which bounds memory."""
LONGEST = 500
"""Characters of the longest name of a model."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What activations may be kept in."""

Tokens = tuple[int, ...]
Rows = Mapping[str, Tensor]
"""[rows, ...] of one sequence, by feature key."""


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    sequences: int
    """Sequences read, those the store already had included."""
    features: tuple[str, ...]
    rows_written: int
    """One feature of one sequence each."""
    bytes_written: int
    context: Mapping[str, str]


def foreign_context(model: str, tool: str, dtype: torch.dtype) -> dict[str, str]:
    """Return the context of rows that `tool` computed on `model`.

    What the weights, the attention and the folding of norms were cannot be checked here, so no such row is ever found in
    place of one that Bathyscope captures.

    Raises:
        StoreError: no model named.
    """
    name = model.strip()
    if not name or len(name) > LONGEST or text_fault(name):
        raise StoreError(
            f"the model is {shown(model)}: say which the rows are of, in at most {LONGEST} characters: --of NAME"
        )
    return {
        "weights": f"foreign:{name}",
        "backend": tool,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": "unknown",
        "edits": "none",
    }


def key_of(address: Address) -> str:
    """Return the feature under which all rows of a point are stored."""
    return Feature(address).key


def token_ids(values: Any, where: str) -> Tokens:
    """Return the token ids of one sequence from whatever another tool keeps them in.

    Raises:
        StoreError: nothing, more than one axis, other numbers than whole ones (1.7 is no id, nor is true), or ids that are
            negative or past 63 bits.
    """
    try:
        ids = np.asarray(values.tolist() if isinstance(values, Tensor) else values)
    except ValueError:
        raise StoreError(
            f"{where}: token ids are lists of several lengths; legal is one axis with at least one id"
        ) from None
    if ids.ndim != 1 or not ids.size:
        raise StoreError(f"{where}: token ids have the shape {ids.shape}; legal is one axis with at least one id")
    if not np.issubdtype(ids.dtype, np.integer):
        raise StoreError(f"{where}: token ids are {ids.dtype}; legal are whole numbers: write the ids themselves")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= 2**63:
        raise StoreError(
            f"{where}: token id {low if low < 0 else high} is none; legal are whole numbers from 0 of 63 bits"
        )
    return tuple(ids.tolist())


def checked(rows: Shaped[Tensor, "..."], key: str, tokens: Tokens, where: str) -> Float[Tensor, "pos ..."]:
    """Return rows [pos, ...] of one sequence for the feature `key`, once they pass every check.

    Raises:
        StoreError: not one row of the point's axes for each token, rows without values, or values that are no finite
            numbers.
    """
    axes = POINTS[Address.parse(key.partition("/")[0]).point].dims
    if rows.dim() != len(axes) or len(rows) != len(tokens):
        raise StoreError(
            f"{where}: {tuple(rows.shape)} is not one row for each of {len(tokens)} tokens: legal is [{', '.join(axes)}]"
        )
    if not rows.numel():
        raise StoreError(f"{where}: {tuple(rows.shape)} holds no value; were the states written?")
    if rows.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise StoreError(f"{where}: values are {str(rows.dtype).removeprefix('torch.')}; legal are {names}")
    if not torch.isfinite(rows).all():
        raise StoreError(f"{where}: holds NaN or infinite values; the rows were not computed or not written whole")
    return rows


def put_all(store: ActivationStore, model: str, tool: str, sequences: Iterable[tuple[Tokens, Rows]]) -> Imported:
    """Write sequences with their rows, packet by packet.

    Raises:
        StoreError: rows of several dtypes, nothing at all, or no room.
    """
    n_sequences = rows_written = bytes_written = 0
    context: dict[str, str] = {}
    features: dict[str, None] = {}
    for part in _packets(_same_width(sequences)):
        dtype = next(iter(part[0][1].values())).dtype
        here = foreign_context(model, tool, dtype)
        if (context and here != context) or any(r.dtype != dtype for _, rows in part for r in rows.values()):
            raise StoreError(
                f"the rows have several dtypes ({context.get('dtype', dtype)} and others); import each alone"
            )
        context = here
        put = store.put(_packet(part, context))
        n_sequences, features = n_sequences + len(part), {**features, **dict.fromkeys(part[0][1])}
        rows_written, bytes_written = rows_written + put.rows_written, bytes_written + put.bytes_written
    if not n_sequences:
        raise StoreError("nothing to import: no sequence was found")
    return Imported(n_sequences, tuple(features), rows_written, bytes_written, context)


def _same_width(sequences: Iterable[tuple[Tokens, Rows]]) -> Iterator[tuple[Tokens, Rows]]:
    """Yield the sequences, each feature checked to keep its width from one to the next."""
    first: dict[str, torch.Size] = {}
    for number, (tokens, rows) in enumerate(sequences):
        for key, tensor in rows.items():
            if tensor.shape[1:] != first.setdefault(key, tensor.shape[1:]):
                raise StoreError(
                    f"sequence {number}: rows of {key} are {list(tensor.shape[1:])} wide, those before "
                    f"{list(first[key])}; import the rows of one model at a time"
                )
        yield tokens, rows


def _packets(sequences: Iterable[tuple[Tokens, Rows]]) -> Iterator[list[tuple[Tokens, Rows]]]:
    part: list[tuple[Tokens, Rows]] = []
    nbytes = 0
    for tokens, rows in sequences:
        part.append((tokens, rows))
        nbytes += sum(tensor.nbytes for tensor in rows.values())
        if nbytes > PACKET_BYTES:
            yield part
            part, nbytes = [], 0
    if part:
        yield part


def _packet(part: list[tuple[Tokens, Rows]], context: Mapping[str, str]) -> Packet:
    names = list(part[0][1])
    counts = {name: tuple(len(rows[name]) for _, rows in part) for name in names}
    features = {name: Ragged(torch.cat([rows[name] for _, rows in part]), counts[name]) for name in names}
    return Packet(context, tuple(tokens for tokens, _ in part), features)
