"""Rows for other tools: plain safetensors, npz, parquet or a data set, one shard in memory at a time."""

from __future__ import annotations

import json
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from probes.errors import StoreError, unknown
from probes.store.backing import Backing, Vanished
from probes.store.export_datasets import save_dataset
from probes.store.layout import codes, header_bytes, raw

_UNKNOWN_TO_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_UNKNOWN_TO_PARQUET = (*_UNKNOWN_TO_NUMPY, torch.float16)


@dataclass
class Table:
    """All rows of one feature in one context that share a dtype and width, and the shards they lie in."""

    context: str
    feature: str
    dtype: torch.dtype
    width: tuple[int, ...]
    """The shape of one row."""
    sources: list[tuple[str, list[int]]]
    """Shard and the ordinals taken from it."""
    tokens: list[np.ndarray]
    counts: list[int]

    def blocks(self, backing: Backing) -> Iterator[Tensor]:
        """Yield the rows of each source, [n_rows, *width]."""
        for name, ordinals in self.sources:
            with backing.shard(name) as shard:
                yield torch.cat([shard.rows(self.feature, ordinal) for ordinal in ordinals])


Writer = Callable[[Table, Iterator[Tensor], Path], None]


def export(backing: Backing, dest: Path, format: str, context: Mapping[str, str], features: str) -> list[Path]:
    """Write what matches into `dest`, a folder per context; see `ActivationStore.export`."""
    if format not in WRITERS:
        raise StoreError(unknown("export format", format, WRITERS))
    written: list[Path] = []
    for text, shards in backing.catalogue.contexts().items():
        if context.items() <= json.loads(text).items():
            folder = dest / str(xxhash.xxh3_64_hexdigest(text.encode("ascii")))
            for stem, table in _named(_tables(backing, text, shards, features)).items():
                written += _write(backing, table, folder / f"{stem}.{format}", format)
    if not written:
        raise StoreError(f"no rows match features {features!r} and context {dict(context)!r}; see bathyscope store ls")
    return written


def _tables(backing: Backing, context: str, shards: Sequence[str], features: str) -> list[Table]:
    tables: dict[tuple[str, torch.dtype, tuple[int, ...]], Table] = {}
    seen: set[tuple[str, bytes]] = set()
    for name in shards:
        try:
            with backing.shard(name) as shard:
                tokens, digests = shard.sequences(), shard.entry().sequences
                for feature in (f for f in shard.features if fnmatchcase(f, features)):
                    slot, counts = shard.header.slots[feature], shard.counts(feature)
                    ordinals = [i for i, digest in enumerate(digests) if (feature, digest) not in seen]
                    seen.update((feature, digests[i]) for i in ordinals)
                    if ordinals:
                        key = (feature, slot.dtype, slot.shape[1:])
                        table = tables.setdefault(key, Table(context, *key, [], [], []))
                        table.sources.append((name, ordinals))
                        table.tokens += [tokens[i].copy() for i in ordinals]
                        table.counts += [int(counts[i]) for i in ordinals]
        except Vanished:
            continue
    return sorted(tables.values(), key=lambda table: (table.feature, str(table.dtype), table.width))


def _named(tables: Sequence[Table]) -> dict[str, Table]:
    """Return a file stem for each table: the feature made safe, with a digest where that is not unique."""
    stems = [re.sub(r"[^\w.+=-]+", "_", table.feature)[:100] for table in tables]
    named = {}
    for stem, table in zip(stems, tables, strict=True):
        identity = f"{table.feature} {table.dtype} {table.width}".encode()
        named[stem if stems.count(stem) == 1 else f"{stem}-{xxhash.xxh3_64_hexdigest(identity)}"] = table
    return named


def _write(backing: Backing, table: Table, path: Path, format: str) -> list[Path]:
    """Write under a temporary name first, so that a file that is there is whole."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[format](table, table.blocks(backing), partial)
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
        if format == "parquet":
            _tokens_parquet(table, path.with_suffix(".tokens.parquet"))
            return [path, path.with_suffix(".tokens.parquet")]
        return [path]
    except Vanished as error:
        raise StoreError(f"shard {error} was evicted during the export; export inside store.pin(), or again") from error
    except OSError as error:
        raise StoreError(f"export to {str(path)!r} failed: {error}; choose a writable folder with room") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)


def _describe(table: Table) -> dict[str, str]:
    return {"context": table.context, "feature": table.feature}


def _sequences(table: Table) -> dict[str, np.ndarray]:
    return {
        "ids": np.concatenate(table.tokens),
        "lengths": np.array([len(tokens) for tokens in table.tokens], dtype=np.int64),
        "counts": np.array(table.counts, dtype=np.int64),
    }


def _safetensors(table: Table, blocks: Iterator[Tensor], path: Path) -> None:
    shape = (sum(table.counts), *table.width)
    # int64 before values keeps both aligned, for no item is wider.
    arrays = _sequences(table)
    layout = {name: ("I64", array.shape, array.nbytes) for name, array in arrays.items()}
    nbytes = int(np.prod(shape)) * table.dtype.itemsize
    with path.open("wb") as file:
        file.write(header_bytes({**layout, "values": (codes()[table.dtype], shape, nbytes)}, _describe(table)))
        for array in arrays.values():
            file.write(array.data)
        for block in blocks:
            file.write(raw(block).data)


def _npz(table: Table, blocks: Iterator[Tensor], path: Path) -> None:
    dtype = torch.float32 if table.dtype in _UNKNOWN_TO_NUMPY else table.dtype
    descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    layout = {"descr": descr, "fortran_order": False, "shape": (sum(table.counts), *table.width)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in _sequences(table).items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
        for name, text in _describe(table).items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.array(text))
        with archive.open("values.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, layout)
            for block in blocks:
                file.write(raw(block.to(dtype)).data)


def _parquet(table: Table, blocks: Iterator[Tensor], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if table.dtype.is_complex:
        raise StoreError(f"parquet has no {table.dtype}, the dtype of {table.feature!r}; export as npz or safetensors")
    dtype = torch.float32 if table.dtype in _UNKNOWN_TO_PARQUET else table.dtype
    size = int(np.prod(table.width))
    value = pa.from_numpy_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
    kind = pa.list_(value, size) if table.width else value
    schema = pa.schema(
        [("sequence", pa.int64()), ("row", pa.int64()), ("values", kind)],
        metadata={**_describe(table), "row_shape": json.dumps(table.width)},
    )
    sequence = np.repeat(np.arange(len(table.counts)), table.counts)
    begins = np.cumsum([0, *table.counts])[sequence]
    row, done = np.arange(len(sequence)) - begins, 0
    with pq.ParquetWriter(path, schema) as writer:
        for block in blocks:
            part = slice(done, done + len(block))
            done = part.stop
            flat = pa.array(block.to(dtype).reshape(-1).numpy())
            values = pa.FixedSizeListArray.from_arrays(flat, size) if table.width else flat
            writer.write_table(
                pa.Table.from_arrays([pa.array(sequence[part]), pa.array(row[part]), values], schema=schema)
            )


def _tokens_parquet(table: Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"sequence": list(range(len(table.tokens))), "tokens": table.tokens, "rows": table.counts}
    pq.write_table(pa.table(columns), path)


def _datasets(table: Table, blocks: Iterator[Tensor], path: Path) -> None:
    save_dataset(path, table.feature, table.context, table.tokens, table.counts, blocks)


WRITERS: dict[str, Writer] = {"safetensors": _safetensors, "npz": _npz, "parquet": _parquet, "datasets": _datasets}
"""Export formats."""
