"""Foreign rows on their way into the store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.errors import StoreError
from probes.needs import Feature
from probes.points import Address
from probes.store import ActivationStore, Packet, Ragged

PACKET_BYTES = 64 * 2**20
"""Rows gathered before they are written, which bounds memory."""
TOOLS = ("vllm", "datasets")

Tokens = tuple[int, ...]
Rows = Mapping[str, Tensor]
"""[rows, ...] of one sequence, by feature key."""


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    sequences: int
    """Sequences read, those already held included."""
    features: tuple[str, ...]
    rows_written: int
    """One feature of one sequence each."""
    bytes_written: int
    context: Mapping[str, str]


def foreign_context(model: str, tool: str, dtype: torch.dtype) -> dict[str, str]:
    """The context of rows that `tool` computed on `model`.

    What the weights, the attention and the folding of norms were cannot be checked here, so no such row is ever found in
    place of one that Bathyscope captures.

    Raises:
        StoreError: no model named.
    """
    if not model.strip():
        raise StoreError("say which model the rows are of: --of NAME")
    return {
        "weights": f"foreign:{model.strip()}",
        "backend": tool,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": "unknown",
        "edits": "none",
    }


def key_of(address: Address) -> str:
    """The feature under which all rows of a point are stored."""
    return Feature(address).key


def checked(rows: Tensor, tokens: Tokens, where: str) -> Tensor:
    """Rows [pos, ...] of one sequence.

    Raises:
        StoreError: not one row for each token, or values that are not finite.
    """
    if rows.dim() == 0 or len(rows) != len(tokens):
        raise StoreError(f"{where}: {tuple(rows.shape)} is not one row for each of {len(tokens)} tokens")
    if not tokens:
        raise StoreError(f"{where}: a sequence has no tokens")
    if not torch.isfinite(rows).all():
        raise StoreError(f"{where}: holds NaN or infinite values; the rows were not computed or not written whole")
    return rows


def put_all(store: ActivationStore, model: str, tool: str, found: Iterable[tuple[Tokens, Rows]]) -> Imported:
    """Writes sequences with their rows, packet by packet.

    Raises:
        StoreError: rows of several dtypes, nothing at all, or no room.
    """
    sequences = rows_written = bytes_written = 0
    context: dict[str, str] = {}
    features: dict[str, None] = {}
    for part in _packets(found):
        dtype = next(iter(part[0][1].values())).dtype
        here = foreign_context(model, tool, dtype)
        if (context and here != context) or any(r.dtype != dtype for _, rows in part for r in rows.values()):
            raise StoreError(
                f"the rows have several dtypes ({context.get('dtype', dtype)} and others); import each alone"
            )
        context = here
        put = store.put(_packet(part, context))
        sequences, features = sequences + len(part), {**features, **dict.fromkeys(part[0][1])}
        rows_written, bytes_written = rows_written + put.rows_written, bytes_written + put.bytes_written
    if not sequences:
        raise StoreError("nothing to import: no sequence was found")
    return Imported(sequences, tuple(features), rows_written, bytes_written, context)


def _packets(found: Iterable[tuple[Tokens, Rows]]) -> Iterator[list[tuple[Tokens, Rows]]]:
    part: list[tuple[Tokens, Rows]] = []
    held = 0
    for tokens, rows in found:
        part.append((tokens, rows))
        held += sum(tensor.nbytes for tensor in rows.values())
        if held > PACKET_BYTES:
            yield part
            part, held = [], 0
    if part:
        yield part


def _packet(part: list[tuple[Tokens, Rows]], context: Mapping[str, str]) -> Packet:
    names = list(part[0][1])
    counts = {name: tuple(len(rows[name]) for _, rows in part) for name in names}
    features = {name: Ragged(torch.cat([rows[name] for _, rows in part]), counts[name]) for name in names}
    return Packet(context, tuple(tokens for tokens, _ in part), features)
