"""Checksums of single tensors at the speed of memory, on the device where each is; `sources.digest` names whole models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import xxhash
from torch import Tensor

from probes.models.sources.digest import storage_of

_LANES = 1 << 13
"""64-bit words summed together on a GPU; each has a weight of its own."""
_GPU_WORDS = 1 << 24
"""64-bit words of a tensor worked on at once on a GPU, which bounds the memory that takes."""


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return one 64-bit number per tensor, which follows from its bytes; tied tensors are read once, meta tensors get 0.

    Numbers from a CPU and from a GPU are not comparable.
    """
    first: dict[tuple[Any, ...], str] = {}
    alike = {name: first.setdefault(_place(name, tensor), name) for name, tensor in tensors.items()}
    numbers = _each({name: tensors[name] for name in first.values()})
    return {name: numbers[alike[name]] for name in tensors}


def checksum(tensor: Tensor) -> int:
    """Return a 64-bit number that follows from the bytes of a tensor."""
    if tensor.is_meta or not tensor.numel():
        return 0
    with torch.no_grad():
        return _on_gpu(tensor) if tensor.is_cuda else int(xxhash.xxh3_64_intdigest(host_bytes(tensor)))


def host_bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor as a numpy array; a view of its memory where it is contiguous and on the CPU."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()


def _place(name: str, tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta or not tensor.numel():
        return (name,)
    return storage_of(tensor)


def _each(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    workers = min(4, torch.get_num_threads())
    if workers == 1:
        return dict(zip(tensors, map(checksum, tensors.values()), strict=True))
    with ThreadPoolExecutor(workers, thread_name_prefix="checksum") as pool:
        return dict(zip(tensors, pool.map(checksum, tensors.values()), strict=True))


def _on_gpu(tensor: Tensor) -> int:
    """A sum of the tensor's words, each times an odd weight of its own place, modulo 2^64.

    An odd weight is invertible, so one changed word always changes the sum.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64) if data.data_ptr() % 8 == 0 else data[:whole].clone().view(torch.int64)
    sums = [_weighted(part, tensor.device) for part in torch.split(words, _GPU_WORDS)]
    tail = data[whole:].cpu().numpy().tobytes()
    return int(xxhash.xxh3_64_intdigest(torch.stack(sums).cpu().numpy().tobytes() + tail if sums else tail))


def _weighted(words: Tensor, device: torch.device) -> Tensor:
    lanes, rows = _weights(device)
    full = words.numel() // _LANES
    table = words[: full * _LANES].view(full, _LANES)
    total = ((table * lanes).sum(1) * rows[:full]).sum()
    rest = words[full * _LANES :]
    return total + (rest * lanes[: rest.numel()]).sum() * rows[-1]


@cache
def _weights(device: torch.device) -> tuple[Tensor, Tensor]:
    """Odd 64-bit numbers: one per lane, and one per row of lanes."""
    generator = torch.Generator().manual_seed(20)
    sizes = (_LANES, _GPU_WORDS // _LANES + 1)
    drawn = [torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator, dtype=torch.int64) | 1 for n in sizes]
    return drawn[0].to(device), drawn[1].to(device)


def combined(texts: Iterable[str]) -> str:
    """Return the xxh3_128 of texts, as 32 hex digits."""
    return str(xxhash.xxh3_128_hexdigest("\0".join(texts).encode()))
