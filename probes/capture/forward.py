"""One forward pass over one batch, sized to fit, with each captured tensor reduced on its device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from probes.batches import Batch, batches
from probes.capture.device_capture import DeviceCapture, reduced
from probes.capture.needs import Feature
from probes.capture.thread_share import ThreadShare
from probes.models.protocol import Model, Read, Write
from probes.points import Address
from probes.store import Ragged

PACKET_BYTES = 64 * 2**20
"""Captured bytes per packet, which bounds the memory of a capture."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Padded tokens per forward, at most, by the kind of device."""
PENDING_BYTES = 128 * 2**20
"""Bytes of one captured tensor on its way from a GPU, at most; a single prompt may need more."""


def batch_tokens_of(model: Model) -> int:
    """Return the padded tokens per forward, at most, unless a caller says otherwise."""
    return BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])


def sized(
    model: Model, sequences: Sequence[tuple[int, ...]], features: Sequence[Feature], limit: int | None
) -> Iterator[Batch]:
    """Return batches of `sequences` whose captured rows and padded tokens stay within bounds."""
    width, size = axis_sizes(model), number_size(model)
    longest = max(len(sequence) for sequence in sequences)
    kept = [feature.row_values(width, longest) * size for feature in features]
    # A GPU's rows leave tensor by tensor, so there the largest tensor bounds the batch instead of their sum.
    most = PENDING_BYTES // max(*kept, 1) if asynchronous(model) else PACKET_BYTES // max(sum(kept), 1)
    return batches(sequences, max(1, min(limit or batch_tokens_of(model), most * longest)))


def asynchronous(model: Model) -> bool:
    """Tell whether rows leave the model's device beside the forward."""
    return model.device.type == "cuda"


def forward(
    model: Model,
    batch: Batch,
    features: Sequence[Feature],
    writes: Mapping[Address, Write] | None = None,
    device_capture: DeviceCapture | None = None,
    share: ThreadShare | None = None,
) -> dict[str, Ragged]:
    """Run one forward over `batch`; return each feature's rows on the CPU, by feature key.

    With a device capture the rows leave through it, and the dictionary is empty.
    """
    rows: dict[str, Ragged] = {}
    with device_capture or nullcontext():
        model.run(batch.tokens, readers(model, batch, features, rows, device_capture, share), writes, batch.lengths)
    return rows


def readers(
    model: Model,
    batch: Batch,
    features: Sequence[Feature],
    rows: dict[str, Ragged],
    device_capture: DeviceCapture | None = None,
    share: ThreadShare | None = None,
) -> dict[Address, Read]:
    """Return reads that put each feature's rows into `rows`, by feature key, or send them by `device_capture`."""
    by_address: dict[Address, list[Feature]] = {}
    for feature in features:
        by_address.setdefault(feature.address, []).append(feature)

    def reader(address: Address) -> Read:
        def read(tensor: Tensor) -> None:
            if share is not None:
                share.adapt()
            for feature in by_address[address]:
                if device_capture is None:
                    values, counts = reduced(model, tensor, batch, feature)
                    rows[feature.key] = Ragged(values.cpu().contiguous(), counts)
                else:
                    device_capture.send(tensor, feature)

        return read

    return {address: reader(address) for address in by_address}


def out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says that memory did not suffice, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def axis_sizes(model: Model) -> dict[str, int]:
    """Return the size of each axis of the point table."""
    names = ("d_model", "head", "kv_head", "d_head", "d_mlp", "d_vocab")
    return {name: model.shape.width(name) for name in names}


def number_size(model: Model) -> int:
    """Return the bytes of one number on its way to the host, at most: rows keep the model's type, the rest is float32."""
    return max(row_size(model), 4) if asynchronous(model) else row_size(model)


def row_size(model: Model) -> int:
    """Return the bytes of one number of a captured row."""
    return int(getattr(torch, model.context.dtype).itemsize)
