"""The bytes of one shard: a safetensors file whose name covers its header and whose header covers its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from jaxtyping import Shaped

from probes.store.values import Entry, Packet, canonical, pack, sequence_digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROTOCOL = 1
"""The number of the format that PROTOCOL.md describes."""
BLOCK = 1 << 20
"""Bytes of a tensor that one checksum covers."""
ALIGN = 64
"""The data begins at a multiple of this."""
IDS, LENGTHS, COUNTS = "sequences/ids", "sequences/lengths", "sequences/counts"

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Names of torch's dtypes, and what a shard calls them. Torch itself is imported where tensors are made, since a store is
also listed and opened without any."""


@cache
def codes() -> dict[torch.dtype, str]:
    """Return what a shard calls each dtype."""
    import torch

    return {getattr(torch, name): code for name, code in DTYPES.items()}


@cache
def dtypes() -> dict[str, torch.dtype]:
    """Return the dtype of each name that shards use."""
    return {code: dtype for dtype, code in codes().items()}


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the data and the checksums of its blocks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte offset from the beginning of the data."""
    stop: int
    checksums: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """The parsed header of a shard."""

    context: str
    slots: Mapping[str, Slot]
    counts: Mapping[str, str]
    """Feature to the tensor holding its rows per sequence."""
    data: int
    """Byte offset of the data in the file."""

    @property
    def nbytes(self) -> int:
        """Return the size of the whole file."""
        return self.data + max((slot.stop for slot in self.slots.values()), default=0)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A packet as the bytes of a shard, ready to be written."""

    entry: Entry
    header: bytes
    buffers: tuple[np.ndarray, ...]
    """uint8, in file order."""


def raw(tensor: Shaped[Tensor, "..."]) -> np.ndarray:
    """Return the tensor's bytes in row-major order, uint8 [n_bytes]; a view where it is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # A tensor of one or no item may carry any stride, which a change of dtype would refuse.
    return np.asarray(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy())


def checksums(data: np.ndarray) -> tuple[str, ...]:
    """Return xxh3_64 in hex of each block of `data`."""
    return tuple(xxhash.xxh3_64_hexdigest(data[i : i + BLOCK].data) for i in range(0, len(data), BLOCK))


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the length and JSON header of a safetensors file; tensors are (dtype name, shape, bytes) in file order."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, size) in tensors.items():
        table[name] = {"data_offsets": [offset, offset + size], "dtype": dtype, "shape": list(shape)}
        offset += size
    text = json.dumps(table, sort_keys=True, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def encode(packet: Packet) -> Encoded:
    """Return the shard of a packet; equal packets give equal bytes.

    Raises:
        ValueError: a dtype that safetensors does not know.
    """
    import torch

    lengths = tuple(len(tokens) for tokens in packet.sequences)
    ids = np.concatenate([pack(tokens) for tokens in packet.sequences] or [pack(())])
    tensors = {IDS: torch.from_numpy(ids), LENGTHS: torch.tensor(lengths, dtype=torch.int64)}
    named = {lengths: LENGTHS}
    counts: dict[str, str] = {}
    for name in sorted(packet.features):
        rows = packet.features[name]
        if rows.values.dtype not in codes():
            legal = ", ".join(str(dtype) for dtype in codes())
            raise ValueError(
                f"feature {name!r} has dtype {rows.values.dtype}, which shards cannot hold; legal: {legal}"
            )
        if rows.counts not in named:
            named[rows.counts] = f"{COUNTS}/{len(named) - 1}"
            tensors[named[rows.counts]] = torch.tensor(rows.counts, dtype=torch.int64)
        counts[name] = named[rows.counts]
        tensors[name] = rows.values
    # Wide items first keeps every tensor naturally aligned without holes, which safetensors forbids.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    buffers = {name: raw(tensors[name]) for name in order}
    context = canonical(packet.context)
    metadata = {
        "protocol": str(PROTOCOL),
        "context": context,
        "checksums": _compact({name: "".join(checksums(data)) for name, data in buffers.items()}),
        "counts": _compact(counts),
    }
    table = {name: (codes()[tensors[name].dtype], tuple(tensors[name].shape), len(buffers[name])) for name in order}
    header = header_bytes(table, metadata)
    size = len(header) + sum(len(data) for data in buffers.values())
    digests = tuple(sequence_digest(tokens) for tokens in packet.sequences)
    entry = Entry(digest(header), context, size, digests, tuple(counts))
    return Encoded(entry, header, tuple(buffers.values()))


def digest(header: bytes) -> str:
    """Return the name of the shard with this header (length bytes included)."""
    return str(xxhash.xxh3_128_hexdigest(header))


def parse(header: bytes) -> Header:
    """Parse the header of a shard from its bytes, length included.

    Raises:
        ValueError: a header that is not of this protocol.
    """
    table = json.loads(header[8:])
    metadata = table.pop("__metadata__", None) or {}
    if metadata.get("protocol") != str(PROTOCOL):
        raise ValueError(f"protocol {metadata.get('protocol')}, not {PROTOCOL}")
    sums = json.loads(metadata["checksums"])
    slots = {}
    for name, item in table.items():
        start, stop = item["data_offsets"]
        digits = sums[name]
        each = tuple(digits[i : i + 16] for i in range(0, len(digits), 16))
        slots[name] = Slot(dtypes()[item["dtype"]], tuple(item["shape"]), start, stop, each)
        if len(each) != -(-(stop - start) // BLOCK):
            raise ValueError(f"tensor {name!r} has {len(each)} checksums for {stop - start} bytes")
    return Header(metadata["context"], slots, json.loads(metadata["counts"]), len(header))


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
