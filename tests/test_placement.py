"""Models spread over devices and disk by accelerate: the same rows under the same keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import addresses, close, read
from families import make, prompt
from safetensors.torch import load_file, save_file
from tiny import PROMPTS
from torch import nn

from analyses.cli import main
from probes.anatomy import anatomy_of
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import ModelError, OptionError
from probes.models import load_model
from probes.models.choices import parse_max_memory
from probes.models.placement import spread
from probes.points import POINTS
from probes.store import ActivationStore

SPREAD = ("gpt2", "llama", "qwen3", "gemma2", "phi", "mixtral", "bert")


def partly_on_disk(module: nn.Module) -> dict[str, str | int]:
    """A device map with the last two blocks, the final norm and an untied head on disk, the rest on the CPU."""
    known = anatomy_of(module).map
    away = {known.path("block", 1), known.path("block", 2), known.path("ln_final")}
    if not module.all_tied_weights_keys:
        away.add(known.path("unembed"))
    return cover(module, {path for path in away if path})


def cover(module: nn.Module, away: set[str], prefix: str = "") -> dict[str, str | int]:
    out: dict[str, str | int] = {f"{prefix}{name}": "cpu" for name, _ in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if full in away:
            out[full] = "disk"
        elif any(path.startswith(f"{full}.") for path in away):
            out |= cover(child, away, f"{full}.")
        else:
            out[full] = "cpu"
    return out


@pytest.mark.parametrize("family", SPREAD)
def test_every_point_of_a_model_partly_on_disk_is_that_of_one_in_memory(family: str, tmp_path: Path) -> None:
    module = make(family)
    module.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    whole = load_model(folder, device="cpu")
    parts = load_model(folder, device_map=partly_on_disk(module), offload=tmp_path / "off", dtype="float32")
    assert any(p.is_meta for p in parts.module.parameters()), "nothing was offloaded"  # type: ignore[attr-defined]
    assert parts.context == whole.context
    assert parts.faithfulness.refused == whole.faithfulness.refused
    assert {i.name for i in parts.faithfulness.identities} == {i.name for i in whole.faithfulness.identities}
    readable = [a for name in POINTS for a in addresses(name, whole) if whole.refusal(a) is None]
    right, spread = (read(model, readable, prompt(rows=2)) for model in (whole, parts))
    for address in readable:
        close(spread[address], right[address])
    if whole.shape.causal:
        assert parts.generate([5, 6, 7], 4) == whole.generate([5, 6, 7], 4)
    if "lens" not in whole.faithfulness.refused:
        a, b = whole.unembedding(), parts.unembedding()
        assert torch.equal(a.weight, b.weight)
        with torch.inference_mode():
            rows = torch.randn(3, whole.shape.d_model)
            close(b.norm(rows), a.norm(rows))


def test_memory_limits_put_what_does_not_fit_on_disk(tmp_path: Path, store: ActivationStore) -> None:
    folder = str(tmp_path / "model")
    make("llama").save_pretrained(folder)
    how: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": "100KB"}, "offload": tmp_path / "off"}
    parts = load_model(folder, dtype="float32", **how)
    assert "disk" in parts.module.hf_device_map.values()  # type: ignore[attr-defined]
    assert capture(parts, PROMPTS, [Need("resid_post.*")], store).done.forwards == len(PROMPTS)
    assert capture(load_model(folder, device="cpu"), PROMPTS, [Need("resid_post.*")], store).done.forwards == 0


def test_weights_on_disk_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    module = make("llama")
    module.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight' holds NaN or infinite"):
        load_model(str(tmp_path / "model"), device_map=partly_on_disk(module), offload=tmp_path / "off")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("cpu", "auto", None, None), "say two things"),
        (("auto", "autp", None, None), "Did you mean 'auto'"),
        (("auto", None, {"cpu": "1GB"}, None), "give device_map 'auto' as well"),
        (("auto", None, None, "folder"), "give device_map 'auto' as well"),
        (("auto", "auto", {"cpu": "lots"}, None), "write a number and a unit"),
    ],
)
def test_placements_that_say_nothing_or_two_things_are_refused(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        spread(*given)


def test_memory_limits_are_read_from_text() -> None:
    assert parse_max_memory("0=20GiB, cpu=60GiB") == {0: "20GiB", "cpu": "60GiB"}
    for text in ("20GiB", "gpu=3GB", "0:3GB"):
        with pytest.raises(OptionError, match="write a GPU's number or cpu"):
            parse_max_memory(text)


def test_the_command_line_spreads_a_model(tmp_path: Path, capsys: Any) -> None:
    make("llama").save_pretrained(tmp_path / "model")
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(json.dumps({"tokens": list(p)}) for p in PROMPTS))
    common = ["capture", "--model", str(tmp_path / "model"), "--prompts", str(lines), "--points", "resid_post.*"]
    common += ["--store", str(tmp_path / "store"), "--dtype", "float32"]
    limited = ["--device-map", "auto", "--max-memory", "cpu=100KB", "--offload", str(tmp_path / "off")]
    assert main([*common, *limited]) == 0
    assert "4 forward passes" in capsys.readouterr().out
    assert main(common) == 0
    assert "0 forward passes" in capsys.readouterr().out
    assert main([*common, "--max-memory", "cpu=100KB"]) == 2
    assert "device_map 'auto'" in capsys.readouterr().err
