"""Rows of other tools: read as they lie on disk, marked as foreign, never in place of captured ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import PROMPTS, native
from torch import Tensor

from analyses.cli import main
from probes.capture.needs import Need
from probes.capture.run import capture, context_of, plan_capture
from probes.errors import StoreError
from probes.foreign import foreign_context, import_datasets, import_vllm
from probes.store import ActivationStore

datasets = pytest.importorskip("datasets")
LAYERS = [1, 3, 0]


def states(tokens: tuple[int, ...], layers: list[int] = LAYERS) -> Tensor:
    """[pos, layer, 4]: each value says its token, layer id and axis."""
    grid = torch.tensor([[[t + 100 * layer + 0.25 * k for k in range(4)] for layer in layers] for t in tokens])
    return grid.to(torch.bfloat16)


def vllm_folder(folder: Path) -> Path:
    (folder / "nested").mkdir(parents=True)
    for number, tokens in enumerate(PROMPTS):
        file = folder / ("nested" if number % 2 else ".") / f"cmpl-{number}.safetensors"
        save_file({"hidden_states": states(tokens), "token_ids": torch.tensor(tokens)}, file)
    return folder


def saelens_folder(folder: Path, ids: bool = True) -> Path:
    sequences = [tuple(range(5, 11)), tuple(range(20, 26))]
    columns: dict[str, Any] = {"blocks.2.hook_resid_pre": [states(s)[:, 0].float().numpy() for s in sequences]}
    features = {"blocks.2.hook_resid_pre": datasets.Array2D(shape=(6, 4), dtype="float32")}
    if ids:
        columns["token_ids"] = [list(s) for s in sequences]
        features["token_ids"] = datasets.List(datasets.Value("int64"))
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(folder))
    return folder


def test_vllm_layer_ids_are_what_enters_each_layer(store: ActivationStore, tmp_path: Path) -> None:
    done = import_vllm(vllm_folder(tmp_path / "hs"), store, model="org/model", layers=LAYERS)
    assert done.features == ("resid_post.0/rows@all", "resid_post.2/rows@all", "resid_pre.0/rows@all")
    assert (done.sequences, done.rows_written) == (len(PROMPTS), 3 * len(PROMPTS))
    for place, feature in enumerate(done.features):
        rows = store.read(done.context, PROMPTS, feature)
        for tokens, stored in zip(PROMPTS, rows, strict=True):
            assert torch.equal(stored, states(tokens)[:, place])
    assert store.verify().damaged == ()


def test_foreign_rows_say_so_and_never_stand_for_captured_ones(store: ActivationStore, tmp_path: Path) -> None:
    model = native()
    weights = context_of(model)["weights"]
    done = import_vllm(vllm_folder(tmp_path / "hs"), store, model=weights, layers=LAYERS)
    assert done.context == foreign_context(weights, "vllm", torch.bfloat16)
    assert store.ls()["weights"].tolist() == [f"foreign:{weights}"]
    assert plan_capture(model, PROMPTS, [Need("resid_post.0")], store).forwards == len(PROMPTS)


def test_importing_again_writes_nothing(store: ActivationStore, tmp_path: Path) -> None:
    folder = vllm_folder(tmp_path / "hs")
    import_vllm(folder, store, model="m", layers=LAYERS)
    again = import_vllm(folder / "cmpl-0.safetensors", store, model="m", layers=LAYERS)
    assert (again.sequences, again.rows_written, again.bytes_written) == (1, 0, 0)


@pytest.mark.parametrize(
    ("spoil", "layers", "message"),
    [
        ({}, [1, 2], "2 layer ids were given"),
        ({}, [1, 1, 2], "give each layer id once"),
        ({"token_ids": torch.tensor([5, 6])}, LAYERS, "not one row for each of 2 tokens"),
        ({"hidden_states": torch.full((4, 3, 4), torch.nan)}, LAYERS, "NaN or infinite"),
        ({"token_ids": None}, LAYERS, "a request of vLLM's has hidden_states and token_ids"),
    ],
)
def test_files_of_another_form_are_refused_by_name(
    spoil: dict[str, Any], layers: list[int], message: str, store: ActivationStore, tmp_path: Path
) -> None:
    tensors = {"hidden_states": states(PROMPTS[0]), "token_ids": torch.tensor(PROMPTS[0])} | spoil
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "a.safetensors")
    with pytest.raises(StoreError, match=message):
        import_vllm(tmp_path, store, model="m", layers=layers)
    assert store.bytes_held() == 0


def test_a_file_still_being_written_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    whole = vllm_folder(tmp_path / "hs") / "cmpl-0.safetensors"
    whole.write_bytes(whole.read_bytes()[:-7])
    with pytest.raises(StoreError, match="has vLLM finished"):
        import_vllm(whole, store, model="m", layers=LAYERS)


def test_a_saelens_cache_is_read_by_its_hook_names(store: ActivationStore, tmp_path: Path) -> None:
    done = import_datasets(saelens_folder(tmp_path / "cache"), store, model="gpt2")
    assert done.features == ("resid_post.1/rows@all",)
    tokens = tuple(range(20, 26))
    assert torch.equal(store.read(done.context, [tokens], done.features[0])[0], states(tokens)[:, 0].float())


def test_a_cache_without_token_ids_needs_them_given(store: ActivationStore, tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "cache", ids=False)
    with pytest.raises(StoreError, match="--tokens"):
        import_datasets(folder, store, model="gpt2")
    lines = tmp_path / "tokens.jsonl"
    lines.write_text('{"tokens": [5, 6, 7, 8, 9, 10]}\n{"tokens": [20, 21, 22, 23, 24, 25]}\n')
    done = import_datasets(folder, store, model="gpt2", tokens=lines)
    tokens = tuple(range(5, 11))
    assert torch.equal(store.read(done.context, [tokens], done.features[0])[0], states(tokens)[:, 0].float())
    lines.write_text('{"tokens": [5, 6]}\n')
    with pytest.raises(StoreError, match="1 lines"):
        import_datasets(folder, store, model="gpt2", tokens=lines)


def test_columns_that_are_no_points_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"token_ids": [[1, 2]], "blocks.0.attn.hook_z": [[[0.0], [1.0]]]})
    data.save_to_disk(str(tmp_path / "z"))
    with pytest.raises(StoreError, match=r"no column names a point.*hook_resid_post"):
        import_datasets(tmp_path / "z", store, model="m")
    with pytest.raises(StoreError, match="not a data set"):
        import_datasets(tmp_path, store, model="m")


@pytest.mark.parametrize("point", ["resid_post.1", "z.0", "mlp_scale.2"])
def test_rows_go_out_as_a_data_set_and_come_back(point: str, store: ActivationStore, tmp_path: Path) -> None:
    rows = capture(native(), PROMPTS, [Need(point)], store)
    (folder,) = store.export(tmp_path / "out", format="datasets", features=f"{point}/*")
    data = datasets.load_from_disk(str(folder))
    assert data.column_names == ["token_ids", f"{point}/rows@all"]
    assert json.loads(data.info.description)["backend"] == "native"
    other = ActivationStore(tmp_path / "other")
    done = import_datasets(folder, other, model="tiny")
    assert done.context["weights"] == "foreign:tiny"
    for back, tensor in zip(other.read(done.context, PROMPTS, f"{point}/rows@all"), rows.get(point), strict=True):
        assert torch.equal(back, tensor)
    store.export(tmp_path / "out", format="datasets", features=f"{point}/*")
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name], "a second export replaces the first"


def test_half_precision_goes_out_widened(store: ActivationStore, tmp_path: Path) -> None:
    import_vllm(vllm_folder(tmp_path / "hs"), store, model="m", layers=LAYERS)
    paths = store.export(tmp_path / "out", format="datasets", features="resid_post.2/*")
    row = datasets.load_from_disk(str(paths[0])).with_format("numpy")[0]
    expected = states(tuple(int(i) for i in row["token_ids"]))[:, 1].float().numpy()
    assert (row["resid_post.2/rows@all"] == expected).all()


def test_the_command_line_imports_and_exports(tmp_path: Path, capsys: Any) -> None:
    folder, store = vllm_folder(tmp_path / "hs"), ["--store", str(tmp_path / "store")]
    assert main(["store", "import", "vllm", str(folder), "--of", "org/model", "--layers", "1,3,0", *store]) == 0
    assert "foreign:org/model" in capsys.readouterr().out
    assert main(["store", "import", "vllm", str(folder), "--of", "org/model", *store]) == 2
    assert "--layers 1,2,3" in capsys.readouterr().err
    assert main(["store", "import", "datasets", str(folder), "--of", "m", "--layers", "1", *store]) == 2
    capsys.readouterr()
    assert main(["store", "export", str(tmp_path / "out"), "--format", "datasets", *store]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
