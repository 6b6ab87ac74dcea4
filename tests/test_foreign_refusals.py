"""Imports that are refused: ids that are no ids, rows that are no rows, files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from malformed import cases, damaged, refusing
from safetensors.torch import save, save_file

from probes.errors import StoreError
from probes.foreign import import_datasets, import_vllm
from probes.foreign.rows import token_ids
from probes.store import ActivationStore

datasets = pytest.importorskip("datasets")
STATES, IDS = torch.ones(3, 2, 4), torch.tensor([5, 6, 7])


@pytest.mark.parametrize(
    ("states", "ids"),
    [
        (STATES, IDS + 0.5),
        (STATES, IDS.float()),
        (STATES, -IDS),
        (STATES, IDS.bool()),
        (STATES, IDS[:, None]),
        (STATES, IDS[:2]),
        (STATES, IDS[0]),
        (STATES[:0], IDS[:0]),
        (STATES[..., :0], IDS),
        (STATES[:, :1], IDS),
        (STATES[:, 0], IDS),
        (STATES.long(), IDS),
        (STATES.bool(), IDS),
        (STATES.to(torch.complex64), IDS),
        (STATES * torch.nan, IDS),
        (STATES * torch.inf, IDS),
    ],
    ids=range(16),
)
def test_vllm_files_that_are_refused(states: Any, ids: Any, store: ActivationStore, tmp_path: Path) -> None:
    save_file({"hidden_states": states.contiguous(), "token_ids": ids.contiguous()}, tmp_path / "x.safetensors")
    with pytest.raises(StoreError, match=r"x\.safetensors"):
        import_vllm(tmp_path, store, model="m", layers=[1, 2])
    assert not len(store.ls())


def test_rows_of_two_widths_are_of_two_models(store: ActivationStore, tmp_path: Path) -> None:
    for width in (4, 8):
        tensors = {"hidden_states": torch.ones(3, 1, width), "token_ids": IDS + width}
        save_file(tensors, tmp_path / f"{width}.safetensors")
    with pytest.raises(StoreError, match="wide"):
        import_vllm(tmp_path, store, model="m", layers=[1])


@pytest.mark.parametrize("layers", [[], [-1], [1, 1], [True, 2], [10**12, 1], [1.5, 2]], ids=range(6))
def test_layer_ids_that_are_refused(layers: Any, store: ActivationStore, tmp_path: Path) -> None:
    save_file({"hidden_states": STATES, "token_ids": IDS}, tmp_path / "x.safetensors")
    with pytest.raises(StoreError, match="layers"):
        import_vllm(tmp_path, store, model="m", layers=layers)


@pytest.mark.parametrize(
    "columns",
    [
        {"token_ids": [[1.7, 2.0]], "resid_post.0": [[[0.5], [1.0]]]},
        {"token_ids": [[-1, 2]], "resid_post.0": [[[0.5], [1.0]]]},
        {"token_ids": [[True, False]], "resid_post.0": [[[0.5], [1.0]]]},
        {"token_ids": [["a", "b"]], "resid_post.0": [[[0.5], [1.0]]]},
        {"token_ids": [[1, 2]], "resid_post.0": [[[], []]]},
        {"token_ids": [[1, 2]], "resid_post.0": [[0.5, 1.0]]},
        {"token_ids": [[1, 2]], "resid_post.0": [[[0.5], [1.0, 2.0]]]},
        {"token_ids": [[1, 2]], "resid_post.0": [["a", "b"]]},
        {"token_ids": [[1, 2]], "resid_post.0": [[[1], [2]]]},
        {"token_ids": [[1, 2]], "resid_post.0": [None]},
        {"token_ids": [None], "resid_post.0": [[[0.5], [1.0]]]},
        {"token_ids": [[1, 2]], "resid_post.0": [[[0.5], [1.0]]], "blocks.1.hook_resid_pre": [[[0.5], [1.0]]]},
    ],
    ids=range(12),
)
def test_data_sets_that_are_refused(columns: dict[str, Any], store: ActivationStore, tmp_path: Path) -> None:
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(StoreError, match="set"):
        import_datasets(tmp_path / "set", store, model="m")
    assert not len(store.ls())


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1))
def test_ids_are_read_as_they_are(ids: list[int]) -> None:
    assert token_ids(ids, "here") == tuple(ids) == token_ids(torch.tensor(ids), "here")


WHOLE = save({"hidden_states": STATES, "token_ids": IDS})


@cases(150)
@given(damaged(WHOLE))
def test_vllm_files_with_damage(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "vllm"
    folder.mkdir(exist_ok=True)
    (folder / "x.safetensors").write_bytes(data)
    with refusing:
        import_vllm(folder, ActivationStore(folder / "store"), model="m", layers=[1, 2])
