"""A deferred model: rows of a store are found and read without its weights, and everything else loads it as it always was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make
from safetensors.torch import load_file, save_file

from analyses.cli import main
from probes.capture.run import capture
from probes.errors import PointError
from probes.lenses import logit
from probes.models import Model, load_model
from probes.models.backends.deferred import DeferredModel
from probes.models.fingerprint import foreign_code
from probes.points import Address, every_address
from probes.store import ActivationStore

TEXTS = ["w5 w6 w7", "w8 w9"]


@pytest.fixture(autouse=True)
def fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and a process that looks as if no class of a model was imported."""
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(foreign_code, "_model_classes", lambda: False)


def deferred(folder: Path) -> Model:
    return load_model(str(folder), device="cpu", deferred=True)


def second(folder: Path) -> DeferredModel:
    """The model as a second process has it."""
    deferred(folder)
    model = deferred(folder)
    assert isinstance(model, DeferredModel)
    return model


def is_loaded(model: Model) -> bool:
    return "module" in vars(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_says_what_the_load_said_and_its_lens_reads_the_same_bits(family: str, tmp_path: Path) -> None:
    make(family).save_pretrained(tmp_path / "model")
    model, plain = second(tmp_path / "model"), load_model(str(tmp_path / "model"), device="cpu")
    for name in ("shape", "context", "faithfulness", "device", "ref", "revision"):
        assert getattr(model, name) == getattr(plain, name)
    assert torch.equal(model.canary.values, plain.canary.values)
    for address in every_address(plain.shape.n_layers):
        assert model.refusal(address) == plain.refusal(address)
    assert model.current() == plain.current()
    rows = torch.randn(7, plain.shape.d_model)
    if "lens" in plain.faithfulness.refused:
        with pytest.raises(PointError):
            model.unembedding()
    else:
        ours, theirs = (logit.all_logits(rows, one.unembedding()) for one in (model, plain))
        assert torch.equal(ours, theirs)
    assert not is_loaded(model), "all of this needs no weights"


def test_held_rows_are_read_without_weights_and_missing_ones_load_them(
    word_folder: Path, store: ActivationStore
) -> None:
    needs = ["resid_post.*"]
    first = capture(deferred(word_folder), TEXTS, needs, store)
    model = second(word_folder)
    again = capture(model, TEXTS, needs, store)
    assert again.done.forwards == 0
    assert not is_loaded(model)
    assert all(map(torch.equal, again.get("resid_post.1"), first.get("resid_post.1")))
    more = capture(model, [*TEXTS, "w3"], needs, store)
    assert more.done.forwards == 1
    assert is_loaded(model)


def test_the_kept_tokenizer_is_the_models_own(word_folder: Path) -> None:
    model, plain = second(word_folder), load_model(str(word_folder), device="cpu")
    assert type(model.tokenizer) is not type(plain.tokenizer)
    assert model.tokenizer("w5 w6")["input_ids"] == plain.tokenizer("w5 w6")["input_ids"]
    assert model.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    assert model.tokenizer.all_special_ids == plain.tokenizer.all_special_ids
    assert model.tokenizer.decode([5, 6]) == plain.tokenizer.decode([5, 6])


def test_what_runs_loads_the_same_model(llama_folder: Path) -> None:
    model, plain, seen = second(llama_folder), load_model(str(llama_folder), device="cpu"), []
    for one in (model, plain):
        one.run(torch.tensor([[5, 6, 7]]), {Address("logits"): lambda t: seen.append(t.clone())})
    assert torch.equal(*seen)
    assert is_loaded(model)
    assert model.current() == plain.current()


def _other_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    stat, tensors = file.stat(), load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] += 1
    save_file(tensors, folder.parent / "other", metadata={"format": "pt"})
    file.write_bytes((folder.parent / "other").read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _other_config(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


@pytest.mark.parametrize("change", [_other_weight, _other_config])
def test_a_record_of_other_files_is_not_believed(change: Callable[[Path], None], llama_folder: Path) -> None:
    before = deferred(llama_folder).context
    change(llama_folder)
    model = deferred(llama_folder)
    assert is_loaded(model)
    assert model.context != before
    assert model.context == load_model(str(llama_folder), device="cpu").context


def test_where_classes_of_models_are_imported_it_is_examined_as_it_is(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = second(llama_folder)
    monkeypatch.setattr(foreign_code, "_model_classes", lambda: True)
    assert model.current() == load_model(str(llama_folder), device="cpu").context
    assert is_loaded(model)
    assert not isinstance(deferred(llama_folder), DeferredModel)


def test_under_switches_of_torch_it_is_examined_as_it_is(llama_folder: Path) -> None:
    model = second(llama_folder)
    with torch.autocast("cpu"), pytest.raises(Exception, match="autocast"):
        model.current()


def test_a_run_on_held_rows_imports_no_transformers(word_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    places = [f"--{name}={tmp_path / name}" for name in ("store", "out")]
    command = ["run", "voids", "--model", str(word_folder), "--prompts", str(tmp_path / "prompts.jsonl"), *places]
    assert main(command) == 0
    code = "import sys; from analyses.cli import main; assert main() == 0; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"
