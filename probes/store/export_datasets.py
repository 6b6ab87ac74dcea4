"""Rows as a Hugging Face data set: one sequence a row, its token ids beside its values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.errors import StoreError

IDS = "token_ids"
_WIDENED = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16)


def save_dataset(
    path: Path, feature: str, about: str, tokens: Sequence[np.ndarray], counts: Sequence[int], blocks: Iterator[Tensor]
) -> None:
    """Write a folder that `datasets.load_from_disk` opens, with the columns `token_ids` and the feature's name.

    Half precisions become float32. `blocks` are the rows of all sequences, one after the other; a block ends where a sequence does.

    Raises:
        StoreError: the datasets library is missing, or rows that a data set cannot hold.
    """
    try:
        from datasets import Dataset, Features, List, Value
        from datasets.arrow_writer import ArrowWriter
        from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
    except ImportError:
        raise StoreError("writing data sets needs the datasets library: pip install 'bathyscope[datasets]'") from None
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with TemporaryDirectory(dir=path.parent, prefix=".arrow-") as scratch:
            parts = _sequences(counts, blocks)
            first = next(parts)
            features = Features({IDS: List(Value("int64")), feature: _column(first)})
            with ArrowWriter(path=f"{scratch}/rows.arrow", features=features) as writer:
                for ids, rows in zip(tokens, _after(first, parts), strict=True):
                    writer.write({IDS: ids, feature: rows})
                writer.finalize()
            data = Dataset.from_file(f"{scratch}/rows.arrow")
            data.info.description = about
            data.save_to_disk(str(path))
            # The file is mapped; it must not outlive its folder.
            del data
    finally:
        with suppress(Exception):
            (enable_progress_bar if bars else disable_progress_bar)()


def _sequences(counts: Sequence[int], blocks: Iterator[Tensor]) -> Iterator[np.ndarray]:
    lengths = iter(counts)
    for block in blocks:
        dtype = torch.float32 if block.dtype in _WIDENED else block.dtype
        done = 0
        while done < len(block):
            count = next(lengths)
            yield block[done : done + count].to(dtype).numpy()
            done += count


def _after(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _column(rows: np.ndarray) -> Any:
    from datasets import Array2D, Array3D, List, Value

    shape, dtype = (None, *rows.shape[1:]), rows.dtype.name
    if rows.ndim == 1:
        return List(Value(dtype))
    if rows.ndim > 3:
        raise StoreError(f"a data set holds rows of at most two axes, not {rows.shape[1:]}; export as safetensors")
    return {2: Array2D, 3: Array3D}[rows.ndim](shape=shape, dtype=dtype)
