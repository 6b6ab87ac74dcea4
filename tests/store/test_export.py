"""Exports open with the plain tools they are made for and hold the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from store_makers import CONTEXT, FEATURES, expected, make, numbered

from probes.errors import StoreError
from probes.store import ActivationStore, Packet, Ragged
from probes.store.files import Partial
from probes.store.layout import encode

SEQUENCES = [numbered(i, 1 + i) for i in range(4)]


@pytest.fixture
def filled(store: ActivationStore) -> ActivationStore:
    store.put(make(SEQUENCES[:2]))
    store.put(make(SEQUENCES[1:]))
    store.put(make(SEQUENCES[:1], weights="w1"))
    return store


def check(values: np.ndarray, counts: np.ndarray, ids: np.ndarray, lengths: np.ndarray, feature: str) -> None:
    """All sequences once each, each with its own rows."""
    tokens = [tuple(part) for part in np.split(ids, np.cumsum(lengths)[:-1])]
    assert sorted(tokens) == SEQUENCES
    for own, rows in zip(tokens, np.split(values, np.cumsum(counts)[:-1]), strict=True):
        np.testing.assert_array_equal(rows, expected(own, feature).numpy())


def test_safetensors(filled: ActivationStore, tmp_path: Path) -> None:
    paths = filled.export(tmp_path / "out", context={"weights": "w0"})
    assert len(paths) == len(FEATURES)
    for path, feature in zip(paths, sorted(FEATURES), strict=True):
        with safe_open(path, "np") as file:
            assert file.metadata()["feature"] == feature
            assert json.loads(file.metadata()["context"]) == CONTEXT
            check(*(file.get_tensor(name) for name in ("values", "counts", "ids", "lengths")), feature)


def test_npz(filled: ActivationStore, tmp_path: Path) -> None:
    (path,) = filled.export(tmp_path / "out", "npz", {"weights": "w0"}, "*.1/rows")
    with np.load(path) as file:
        assert str(file["feature"]) == FEATURES[1]
        check(file["values"], file["counts"], file["ids"], file["lengths"], FEATURES[1])


def test_parquet(filled: ActivationStore, tmp_path: Path) -> None:
    values, tokens = filled.export(tmp_path / "out", "parquet", {"weights": "w0"}, "*/last")
    table, side = pd.read_parquet(values), pd.read_parquet(tokens)
    assert table["row"].tolist() == [0] * 4
    ids, lengths = np.concatenate(side["tokens"].tolist()), side["tokens"].map(len).to_numpy()
    check(np.stack(table["values"].tolist()), side["rows"].to_numpy(), ids, lengths, FEATURES[2])
    assert json.loads(pq.read_schema(values).metadata[b"context"]) == CONTEXT


def test_a_row_that_lies_in_two_shards_is_exported_once(store: ActivationStore, tmp_path: Path) -> None:
    store.put(make(SEQUENCES[:2]))
    partial = Partial(store.root / "tmp", encode(make(SEQUENCES[1:])))
    partial.publish(store._backing.folder.shard(partial.entry.digest))
    (path,) = ActivationStore(store.root).export(tmp_path / "out", features=FEATURES[0])
    plain = load_file(path)
    check(*(plain[name].numpy() for name in ("values", "counts", "ids", "lengths")), FEATURES[0])


def test_every_context_has_a_folder(filled: ActivationStore, tmp_path: Path) -> None:
    paths = filled.export(tmp_path / "out", features="resid_post.0/*")
    assert len(paths) == len({path.parent for path in paths}) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.int64, torch.bool])
def test_dtypes_numpy_lacks_become_float32(store: ActivationStore, tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.5]).to(dtype)
    store.put(Packet(CONTEXT, (numbered(0), numbered(1)), {"norm": Ragged(values, (5, 0))}))
    (exact,) = store.export(tmp_path, "safetensors")
    assert load_file(exact)["values"].dtype == dtype
    (npz,) = store.export(tmp_path, "npz")
    table, _ = store.export(tmp_path, "parquet")
    widened = values.float() if dtype.is_floating_point else values
    for got in (np.load(npz)["values"], pd.read_parquet(table)["values"].to_numpy()):
        np.testing.assert_array_equal(got, widened.numpy())


def test_names_and_widths_that_collide_are_kept_apart(store: ActivationStore, tmp_path: Path) -> None:
    for i, (name, width) in enumerate([("a/b", 2), ("a b", 2), ("a/b", 3), ("x" * 300, 2)]):
        rows = Ragged(torch.full((1, width), float(i)), (1,))
        store.put(Packet(CONTEXT, (numbered(i),), {name: rows}))
    paths = store.export(tmp_path)
    assert len(set(paths)) == 4
    assert sorted(load_file(path)["values"][0, 0].item() for path in paths) == [0, 1, 2, 3]


def test_what_cannot_be_exported_is_refused(filled: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"unknown export format 'parquets'. Did you mean 'parquet'"):
        filled.export(tmp_path, "parquets")
    with pytest.raises(StoreError, match="no rows match"):
        filled.export(tmp_path, features="logits*")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose a writable folder"):
        filled.export(tmp_path / "file")
