"""Checksums of tensors: they follow from the bytes, and from every one of them, on either device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from probes.models.fingerprint import checksum as module
from probes.models.fingerprint.checksum import checksum, checksums

WAYS: dict[str, Callable[[Tensor], int]] = {"host": checksum, "words": module._on_gpu}
"""The second is what a GPU computes; its integer arithmetic is the same on a CPU."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("n", [1, 3, 8, 17, 8192, 65537, 70001])
def test_one_bit_anywhere_changes_it(way: str, dtype: torch.dtype, n: int) -> None:
    tensor = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * 50).to(dtype)
    before = WAYS[way](tensor)
    assert WAYS[way](tensor.clone()) == before
    data = tensor.view(torch.uint8)
    for place in {0, len(data) // 2, len(data) - 1}:
        data[place] ^= 1
        assert WAYS[way](tensor) != before
        data[place] ^= 1
    assert WAYS[way](tensor) == before


@pytest.mark.parametrize("way", WAYS)
def test_order_counts_and_strides_do_not(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GPU_WORDS", 1 << 15)
    module._weights.cache_clear()
    rows = torch.randn(400, 512)
    swapped = rows.clone()
    swapped[[0, 399]] = rows[[399, 0]]
    assert WAYS[way](swapped) != WAYS[way](rows)
    assert WAYS[way](rows.t()) == WAYS[way](rows.t().contiguous()) != WAYS[way](rows)
    module._weights.cache_clear()


def test_views_that_start_anywhere_are_read_whole() -> None:
    rows = torch.randint(-100, 100, (41,), dtype=torch.int8)
    for start in range(9):
        assert module._on_gpu(rows[start:]) == module._on_gpu(rows[start:].clone())


def test_tied_tensors_have_one_number_and_those_without_data_none(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(module, "checksum", lambda tensor: read.append(1) or checksum(tensor))
    weight = torch.ones(3)
    numbers = checksums({"a": weight, "b": weight, "c": weight.clone(), "d": torch.empty(2, device="meta")})
    assert numbers["a"] == numbers["b"] == numbers["c"]
    assert (numbers["d"], len(read)) == (0, 3)
