"""A streamed model's digest and checks: one pass over its weights at the first load, none at the second."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from safetensors.torch import load_file, save_file

from probes.models import load_model, weights_digest
from probes.models.backends.streamed import StreamedModel
from probes.models.sources.gradual_digest import GradualDigest
from probes.points import Address

LAYERS = 12
"""More than ten, so that the order of the names is not that of the blocks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load_once") / "model"
    make("llama", num_hidden_layers=LAYERS).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "cache"))


def streamed(folder: Path, **how: Any) -> StreamedModel:
    model = load_model(str(folder), device="cpu", streamed=True, **how)
    assert isinstance(model, StreamedModel)
    return model


def on_disk(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def test_the_first_load_reads_every_weight_once_and_the_second_no_block(folder: Path) -> None:
    first = streamed(folder)
    assert dict(first.blocks.ledger.blocks) == dict.fromkeys(range(LAYERS), 1)
    rows = on_disk(folder) // 25
    assert on_disk(folder) <= first.blocks.ledger.bytes < on_disk(folder) + rows
    second = streamed(folder)
    assert not second.blocks.ledger.blocks
    assert second.blocks.ledger.bytes < on_disk(folder) / 4, "the table of tokens, and a row of each weight"
    assert (second.context, second.shape) == (first.context, first.shape)
    assert second.faithfulness == first.faithfulness
    assert torch.equal(second.canary.values, first.canary.values)
    assert second.context == load_model(str(folder), device="cpu").context


def test_a_second_load_gives_the_rows_of_the_first(folder: Path) -> None:
    seen = []
    for model in (streamed(folder), streamed(folder)):
        model.run(torch.tensor([[5, 6, 7]]), {Address("logits"): lambda t: seen.append(t.clone())})
    assert torch.equal(*seen)


def test_weights_changed_under_the_same_inode_size_and_time_are_seen(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before, stat = streamed(tmp_path).context.weights, file.stat()
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] += 1
    save_file(tensors, tmp_path / "other", metadata={"format": "pt"})
    file.write_bytes((tmp_path / "other").read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = file.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    assert streamed(tmp_path).context.weights != before


def test_another_dtype_is_checked_by_itself(folder: Path) -> None:
    first = streamed(folder)
    half = streamed(folder, dtype="bfloat16")
    assert set(half.blocks.ledger.blocks.values()) == {1}
    assert half.context.weights != first.context.weights


def test_a_cache_that_cannot_be_written_costs_a_pass_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way of the folder")
    loads = [streamed(folder) for _ in range(2)]
    assert [set(model.blocks.ledger.blocks.values()) for model in loads] == [{1}, {1}]


@pytest.mark.parametrize("kept_bytes", [0, 40_000, 2**30])
def test_a_digest_in_the_order_of_the_blocks_is_that_in_the_order_of_the_names(kept_bytes: int) -> None:
    module = make("llama", num_hidden_layers=LAYERS).bfloat16().float()
    right, again = weights_digest(module), list[str]()
    weights = dict(module.named_parameters())

    def fetch(name: str) -> torch.Tensor:
        again.append(name)
        return weights[name]

    with torch.device("meta"):
        empty = type(module)(module.config)
    empty.load_state_dict({n: p for n, p in weights.items() if ".layers." not in n}, strict=False, assign=True)
    digest = GradualDigest(empty, fetch, kept_bytes)
    for layer in range(LAYERS):
        digest.add({n: p for n, p in weights.items() if f".layers.{layer}." in n})
    assert digest.finish() == right
    # Blocks 2 to 9 come after 10 and 11 by name.
    outrun = {f"model.layers.{layer}." for layer in range(2, 10)}
    assert {".".join(name.split(".")[:3]) + "." for name in again} <= outrun
    assert bool(again) == (kept_bytes < 2**30)
