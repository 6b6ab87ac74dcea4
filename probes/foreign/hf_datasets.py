"""Activation caches kept as Hugging Face data sets: those SAELens writes, and those this store exports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probes.cache_folder import expanded
from probes.errors import PointError, StoreError, one_line, shown
from probes.foreign.rows import Imported, Rows, Tokens, checked, key_of, put_all, token_ids
from probes.points import Address
from probes.prompts import read_prompts
from probes.store import ActivationStore

IDS = ("token_ids", "tokens", "input_ids")
"""Columns that may hold a row's token ids."""
HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_post": "mlp_post",
}
"""TransformerLens hooks inside a block whose tensor is one row of one axis per position, and their point here."""
GLOBAL_HOOKS = {"hook_embed": "embed", "ln_final.hook_normalized": "final_norm"}


def import_datasets(
    path: str | Path, store: ActivationStore, *, model: str, tokens: str | Path | None = None
) -> Imported:
    """Import the rows of a data set saved to disk: one sequence a row, one column a point.

    Columns are named by hook (`blocks.3.hook_resid_post`) or as this store exports them (`resid_post.3/rows@all`). SAELens
    runs TransformerLens, which may fold norms and centre weights: its streams are then not those of the plain model.

    Args:
        model: the model that was run, by which the rows are known.
        tokens: a prompt file with `{"tokens": […]}` a line, for data sets without token ids.

    Raises:
        StoreError: not a data set, columns that are no points, no token ids, or rows that do not match them.
    """
    data = _load(expanded(path))
    columns = _columns(data, str(path))
    return put_all(store, model, "datasets", _sequences(data, columns, _ids(data, tokens, str(path)), str(path)))


def _columns(data: Any, where: str) -> dict[str, str]:
    """Return the feature of each column that names a point."""
    columns = {name: key for name in data.column_names if (key := _key(name)) is not None}
    if not columns:
        raise StoreError(
            f"{where}: no column names a point; it has {shown(data.column_names)}. Legal: blocks.N. with {', '.join(HOOKS)}, "
            f"or {', '.join(GLOBAL_HOOKS)}, or a feature such as resid_post.3/rows@all"
        )
    if len(set(columns.values())) < len(columns):
        raise StoreError(f"{where}: several of the columns {shown(list(columns))} name one point; keep one of each")
    return columns


def _load(path: Path) -> Any:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise StoreError("reading data sets needs the datasets library: pip install 'bathyscope[datasets]'") from None
    try:
        data = load_from_disk(str(path))
    except Exception as error:  # pyarrow and the library have many classes of their own for a damaged folder.
        raise StoreError(
            f"{shown(str(path))} is not a data set saved with save_to_disk ({one_line(error)}); give the folder it wrote"
        ) from error
    if not isinstance(data, Dataset):
        raise StoreError(f"{str(path)!r} holds several splits ({', '.join(data)}): give the folder of one")
    if not len(data):
        raise StoreError(f"{str(path)!r} has no rows; nothing to import")
    return data.with_format("numpy")


def _key(column: str) -> str | None:
    """Return the feature that a column holds, or None."""
    if re.fullmatch(r"[a-z_]+(\.\d+)?/rows@all", column):
        column = column.partition("/")[0]
    inside = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", column)
    if inside and inside[2] in HOOKS:
        return key_of(Address(HOOKS[inside[2]], int(inside[1])).canonical)
    if column in GLOBAL_HOOKS:
        return key_of(Address(GLOBAL_HOOKS[column]))
    try:
        return key_of(Address.parse(column).canonical)
    except PointError:
        return None


def _ids(data: Any, tokens: str | Path | None, where: str) -> Sequence[Tokens]:
    if tokens is not None:
        given = [line.tokens for line in read_prompts(tokens)]
        sequences = [ids for ids in given if ids is not None]
        if len(sequences) != len(given) or len(sequences) != len(data):
            raise StoreError(
                f'{tokens}: {len(sequences)} lines of "tokens" for the {len(data)} rows of {where}; give one each'
            )
        return sequences
    column = next((name for name in IDS if name in data.column_names), None)
    if column is None:
        raise StoreError(
            f"{where}: no column of token ids ({', '.join(IDS)}), by which rows are found; give them with --tokens FILE.jsonl"
        )
    rows = _cells(data, [column], where)
    return [token_ids(row[column], f"{where}, row {number}, {column}") for number, row in enumerate(rows)]


def _cells(data: Any, names: list[str], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of some columns, one by one."""
    try:
        yield from data.select_columns(names)
    except Exception as error:  # As when it is opened: the file behind it is read only now.
        raise StoreError(f"{where}: cannot be read ({one_line(error)}); save the data set again") from error


def _sequences(data: Any, columns: dict[str, str], ids: Sequence[Tokens], where: str) -> Iterator[tuple[Tokens, Rows]]:
    for number, (tokens, row) in enumerate(zip(ids, _cells(data, list(columns), where), strict=True)):
        rows = {}
        for name, key in columns.items():
            place = f"{where}, row {number}, {name}"
            rows[key] = checked(_tensor(row[name], place), key, tokens, place)
        yield tokens, rows


def _tensor(cell: Any, where: str) -> torch.Tensor:
    """Return a cell as a tensor of its own."""
    try:
        array = np.asarray(cell)
        stacked = np.stack(list(array)) if array.dtype == object else array
        return torch.from_numpy(np.ascontiguousarray(stacked).copy())
    except (TypeError, ValueError) as error:
        raise StoreError(f"{where}: is no table of numbers ({one_line(error)}); legal is one row a token") from None
