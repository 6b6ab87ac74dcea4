"""Activation caches kept as Hugging Face data sets: those SAELens writes, and those this store exports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probes.errors import PointError, StoreError
from probes.foreign.rows import Imported, Rows, Tokens, checked, key_of, put_all
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
    """Rows of a data set saved to disk into the store: one sequence a row, one column a point.

    Columns are named by hook (`blocks.3.hook_resid_post`) or as this store exports them (`resid_post.3/rows@all`). SAELens
    runs TransformerLens, which may fold norms and centre weights: its streams are then not those of the plain model.

    Args:
        model: the model that was run, as the rows shall be known.
        tokens: a prompt file with `{"tokens": […]}` a line, for data sets without token ids.

    Raises:
        StoreError: not a data set, columns that are no points, no token ids, or rows that do not match them.
    """
    held = _load(Path(path).expanduser())
    columns = {name: key for name in held.column_names if (key := _key(name)) is not None}
    if not columns:
        raise StoreError(
            f"{path}: no column names a point; it has {held.column_names}. Legal: blocks.N. with {', '.join(HOOKS)}, or "
            f"{', '.join(GLOBAL_HOOKS)}, or a feature such as resid_post.3/rows@all"
        )
    return put_all(store, model, "datasets", _sequences(held, columns, _ids(held, tokens, str(path)), str(path)))


def _load(path: Path) -> Any:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise StoreError("reading data sets needs the datasets library: pip install 'bathyscope[datasets]'") from None
    try:
        held = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise StoreError(f"{str(path)!r} is not a data set saved with save_to_disk ({error})") from error
    if not isinstance(held, Dataset):
        raise StoreError(f"{str(path)!r} holds several splits ({', '.join(held)}): give the folder of one")
    return held.with_format("numpy")


def _key(column: str) -> str | None:
    """The feature that a column holds, or None."""
    if re.fullmatch(r"[a-z_]+(\.\d+)?/rows@all", column):
        column = column.partition("/")[0]
    inside = re.fullmatch(r"blocks\.(\d+)\.(.+)", column)
    if inside and inside[2] in HOOKS:
        return key_of(Address(HOOKS[inside[2]], int(inside[1])).canonical)
    if column in GLOBAL_HOOKS:
        return key_of(Address(GLOBAL_HOOKS[column]))
    try:
        return key_of(Address.parse(column).canonical)
    except PointError:
        return None


def _ids(held: Any, tokens: str | Path | None, where: str) -> Sequence[Tokens]:
    if tokens is not None:
        given = [line.tokens for line in read_prompts(tokens)]
        found = [ids for ids in given if ids is not None]
        if len(found) != len(given) or len(found) != len(held):
            raise StoreError(
                f'{tokens}: {len(found)} lines of "tokens" for the {len(held)} rows of {where}; give one each'
            )
        return found
    column = next((name for name in IDS if name in held.column_names), None)
    if column is None:
        raise StoreError(
            f"{where}: no column of token ids ({', '.join(IDS)}), by which rows are found; give them with --tokens FILE.jsonl"
        )
    return [tuple(int(i) for i in row) for row in held.select_columns([column])[:][column]]


def _sequences(held: Any, columns: dict[str, str], ids: Sequence[Tokens], where: str) -> Iterator[tuple[Tokens, Rows]]:
    for number, (tokens, row) in enumerate(zip(ids, held.select_columns(list(columns)), strict=True)):
        rows = {}
        for name, key in columns.items():
            array = np.ascontiguousarray(np.stack(row[name]) if row[name].dtype == object else row[name])
            rows[key] = checked(torch.from_numpy(array.copy()), tokens, f"{where}, row {number}, {name}")
        yield tokens, rows
