"""What one forward captures, reduced on its device and sent to the writer while the forward goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor

from probes.batches import Batch, select
from probes.capture.needs import Feature
from probes.device_to_host import PendingTensor, Transport
from probes.kernels import reduce_rows, reduced_shape
from probes.models.protocol import Model
from probes.reducers import ROWS, Reducer

LENS_ROWS = 1024
"""Residual rows that wait for one pass through the unembedding; with fewer, reading its weights costs most."""


@runtime_checkable
class Receiver(Protocol):
    """Takes what a device capture sends: the store's writer, or anything else that reads and releases pending tensors."""

    def put_pending(
        self, sequences: tuple[tuple[int, ...], ...], features: Mapping[str, tuple[PendingTensor, tuple[int, ...]]]
    ) -> None:
        """Take pending tensors by feature key, each with its number of rows per sequence; must not wait for them."""
        ...


def reduced(
    model: Model, tensor: Shaped[Tensor, batch * rest], batch: Batch, feature: Feature
) -> tuple[Shaped[Tensor, row * rest], tuple[int, ...]]:
    """Return a captured tensor reduced, on its device, and how many of its rows each sequence has."""
    reducer = feature.reducer
    if feature.address.point == "pattern":
        return _pattern(tensor, batch, reducer)
    selected = tuple(len(select(n, reducer.positions)) for n in batch.lengths)
    index = batch.row_index(reducer.positions)
    values = reduce_rows(tensor.flatten(0, 1), index, selected, reducer, model.unembedding)
    return values, tuple(reducer.count(n) for n in batch.lengths)


def _pattern(tensor: Tensor, batch: Batch, reducer: Reducer) -> tuple[Tensor, tuple[int, ...]]:
    """Attention probabilities as flat [head, query, key] blocks, one a sequence, without pad queries or keys."""
    parts = []
    for row, length in enumerate(batch.lengths):
        queries = select(length, reducer.positions).to(tensor.device)
        parts.append(tensor[row, :, :length, :length].index_select(1, queries).flatten())
    return torch.cat(parts), tuple(len(part) for part in parts)


class DeviceCapture:
    """Sends the captured tensors of one forward to a receiver; used as a context around the forward.

    Inside a hook it only queues work: an index and a basis are moved to the device once, the kernel writes into the
    transport's ring, and the copy and the store follow by themselves. Residuals for the lens are set aside and read
    together, because the unembedding is far larger than they are.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        sequences: tuple[tuple[int, ...], ...],
        transport: Transport,
        receiver: Receiver,
    ) -> None:
        self.model, self.batch, self.sequences = model, batch, sequences
        self.transport, self.receiver = transport, receiver
        self._indices: dict[tuple[object, torch.device], Tensor] = {}
        self._lens: dict[Reducer, list[tuple[Feature, Tensor]]] = {}
        self._ready: dict[str, tuple[PendingTensor, tuple[int, ...]]] = {}

    def send(self, tensor: Shaped[Tensor, batch * rest], feature: Feature) -> None:
        """Send a captured tensor, which may be overwritten as soon as this returns."""
        reducer = feature.reducer
        if feature.address.point == "pattern":
            values, counts = _pattern(tensor, self.batch, reducer)
            self._dispatch(feature, tensor.device, values.shape, values.dtype, lambda out: out.copy_(values), counts)
            return
        flat, index = tensor.flatten(0, 1), self._index(reducer, tensor.device)
        selected = tuple(len(select(n, reducer.positions)) for n in self.batch.lengths)
        if reducer.kind in ("lens_ids", "lens_top"):
            self._set_aside(feature, reduce_rows(flat, index, selected, ROWS))
            return
        if reducer.basis is not None:
            reducer = replace(reducer, basis=self._basis(reducer.basis, tensor.device))
        shape, dtype = reduced_shape(flat.shape, flat.dtype, len(index), selected, reducer)
        counts = tuple(reducer.count(n) for n in self.batch.lengths)
        fill = lambda out: reduce_rows(flat, index, selected, reducer, None, out)  # noqa: E731
        self._dispatch(feature, tensor.device, shape, dtype, fill, counts)

    def __enter__(self) -> DeviceCapture:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Hand the rest over; after a fault, release what was not handed over."""
        if kind is None:
            for key in list(self._lens):
                self._read_lens(key)
            self._hand_over()
        for pending, _counts in self._ready.values():
            pending.release()

    def _dispatch(
        self,
        feature: Feature,
        device: torch.device,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        fill: Callable[[Tensor], object],
        counts: tuple[int, ...],
    ) -> None:
        self._ready[feature.key] = self.transport.send(device, tuple(shape), dtype, fill), counts
        if sum(pending.nbytes for pending, _ in self._ready.values()) >= self.transport.gather:
            self._hand_over()

    def _hand_over(self) -> None:
        ready, self._ready = self._ready, {}
        if ready:
            self.receiver.put_pending(self.sequences, ready)

    def _set_aside(self, feature: Feature, rows: Tensor) -> None:
        key = replace(feature.reducer, positions="all")
        waiting = self._lens.setdefault(key, [])
        waiting.append((feature, rows))
        if sum(len(part) for _, part in waiting) >= LENS_ROWS:
            self._read_lens(key)

    @torch.inference_mode()
    def _read_lens(self, reducer: Reducer) -> None:
        waiting = self._lens.pop(reducer)
        home = waiting[0][1].device
        rows = torch.cat([part.to(home) for _, part in waiting])
        index = torch.arange(len(rows), device=home)
        values = reduce_rows(rows, index, (len(rows),), reducer, self.model.unembedding)
        for (feature, _), part in zip(waiting, torch.split(values, [len(p) for _, p in waiting]), strict=True):
            counts = tuple(feature.reducer.count(n) for n in self.batch.lengths)
            copy = lambda out, part=part: out.copy_(part)  # noqa: E731
            self._dispatch(feature, part.device, part.shape, part.dtype, copy, counts)

    def _index(self, reducer: Reducer, device: torch.device) -> Tensor:
        key = (reducer.positions, device)
        if key not in self._indices:
            self._indices[key] = self.batch.row_index(reducer.positions).to(device, non_blocking=True)
        return self._indices[key]

    def _basis(self, basis: Tensor, device: torch.device) -> Tensor:
        key = (id(basis), device)
        if key not in self._indices:
            self._indices[key] = basis.to(device, torch.float32).contiguous()
        return self._indices[key]
