"""Every mistake gets one line with the value, the legal values and the next step, and exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import make
from safetensors.torch import load_file, save_file

from analyses.cli import main
from probes.models.backends.native import NativeModel

GOOD = '{"tokens": [5, 6, 7]}'


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any forward but the check at load is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a forward was run before the input was refused")

    monkeypatch.setattr(NativeModel, "run", refuse)
    monkeypatch.setattr(NativeModel, "generate", refuse)


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal with exit code 2."""
    capsys.readouterr()
    code = main(args)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0]


def voids(folder: Path | str, prompts: Path, *more: str) -> list[str]:
    return [
        "run",
        "voids",
        "--model",
        str(folder),
        "--prompts",
        str(prompts),
        "--out",
        str(prompts.parent / "out"),
        *more,
    ]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD + "\n")
    return path


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (["run", "viods"], ["unknown analysis 'viods'", "Did you mean 'voids'", "Legal:"]),
        (["run", "voids", "--alfa", "1"], ["No such option", "--alpha"]),
        (["fly"], ["unknown command 'fly'", "Legal: run,"]),
        (["store", "gc", "--max-bytes", "big"], ["size 'big'", "20GB"]),
        (["models", "fetch", "smollm2-135"], ["smollm2-135", "Did you mean 'smollm2-135m'"]),
        (["models", "fetch", "gemma3-270m"], ["gemma3-270m", "--accept-license"]),
        (["check", "no-such/model"], ["no-such/model", "smollm2-135m"]),
        (["bench", "nothing"], ["unknown benchmark"]),
        (["run", "voids", "--model", "smollm2-135m"], ["voids needs prompts", "--prompts FILE.jsonl"]),
        (["run", "back_patching", "--model", "smollm2-135m"], ["back_patching needs prompts", "another --task"]),
        (["run", "concept_depth", "--model", "smollm2-135m"], ["concept_depth needs prompts", "--sets NAME"]),
        (["run", "latent_language", "--model", "smollm2-135m", "--source", "xx"], ["unknown source 'xx'", "fr"]),
    ],
)
def test_commands(
    command: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "empty-cache"))
    message = refused(command, capsys)
    for part in parts:
        assert part in message


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--alpha", "2"], ["alpha is 2.0", "0 to 1"]),
        (["--alpha", "x"], ["'x' is not a number"]),
        (["--mode", "trim"], ["'trim'", "measure", "early_exit", "skip"]),
        (["--no-chatter"], ["--no-chatter"]),
        (["--phases", "prompt,reply"], ["'reply'", "prompt, response"]),
        (["--seed", "-1"], ["seed is -1", "0 to"]),
        (["--seed", "9" * 30], ["seed is 999", "0 to"]),
        (["--temperature", "inf"], ["temperature is inf"]),
        (["--max-new-tokens", "-3"], ["max_new_tokens is -3"]),
        (["--backend", "nativ"], ["unknown backend 'nativ'", "Did you mean 'native'"]),
        (["--dtype", "float8"], ["unknown dtype 'float8'", "bfloat16"]),
        (["--device", "gpu"], ["'gpu'", "cuda"]),
        (["--attention", "spda"], ["Did you mean 'sdpa'"]),
    ],
)
def test_options(
    more: list[str], parts: list[str], llama_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(voids(llama_folder, prompts, *more), capsys)
    for part in parts:
        assert part in message


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{broken", ["p.jsonl:2", "not JSON"]),
        ('{"tokens": null}', ["p.jsonl:2", "tokens", "None"]),
        ('{"tokens": [' + "9" * 5000 + "]}", ["p.jsonl:2", "64 bits"]),
        ('{"tokens": ' + "[" * 90_000 + "}", ["p.jsonl:2", "deep"]),
        ('{"text": "\\ud800"}', ["p.jsonl:2", "surrogate"]),
        ('{"tokens": []}', ["p.jsonl:2", "not empty"]),
        ('{"text": ""}', ["p.jsonl:2", "not empty"]),
        ('{"tokens": [5, 97]}', ["p.jsonl:2", "token id 97", "0 to 96"]),
        ('{"text": "hello"}', ["p.jsonl:2", "no tokenizer", '"tokens"']),
        (json.dumps({"tokens": [1] * 65}), ["p.jsonl:2", "65 tokens", "context window", "64"]),
        ('{"tokens": [5], "choices": ["one"]}', ["p.jsonl:2", "choices", "at least two"]),
    ],
)
def test_prompts(
    line: str, parts: list[str], llama_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text(GOOD + "\n" + line + "\n")
    message = refused(voids(llama_folder, prompts), capsys)
    for part in parts:
        assert part in message


def test_a_fault_in_the_prompts_is_found_before_a_model_is_loaded(
    prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("analyses.running.model_spec.ModelSpec.load", refuse)
    prompts.write_text('{"text": 7}\n')
    assert "p.jsonl:1" in refused(voids("smollm2-135m", prompts), capsys)
    assert "does not exist" in refused(voids("smollm2-135m", prompts.parent / "none.jsonl"), capsys)


@pytest.mark.usefixtures("no_forward")
def test_an_output_folder_with_other_files(
    llama_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (prompts.parent / "out").mkdir()
    (prompts.parent / "out" / "notes.txt").write_text("mine")
    assert "holds files that are not a result" in refused(voids(llama_folder, prompts), capsys)


@pytest.mark.usefixtures("no_forward")
def test_points_and_layers(llama_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["capture", "--model", str(llama_folder), "--prompts", str(prompts), "--points"]
    assert "Did you mean 'resid_post'" in refused([*base, "resid_pots.*"], capsys)
    assert "legal layers are 0 to 2" in refused([*base, "resid_post.3"], capsys)
    assert "needs a layer" in refused([*base, "z"], capsys)
    assert "Did you mean 'moments'" in refused([*base, "z.0", "--reduce", "moment"], capsys)


@pytest.mark.usefixtures("no_forward")
def test_a_point_this_model_lacks(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("phi").save_pretrained(tmp_path / "phi")
    args = ["capture", "--model", str(tmp_path / "phi"), "--prompts", str(prompts), "--points", "resid_mid.0"]
    assert "no point 'resid_mid.0'" in refused(args, capsys)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("analysis", "field"),
    [
        ("back_patching", '"answer_tokens": [97]'),
        ("contextual_decomposition", '"answer_tokens": [8], "distractor_tokens": [4, 97]'),
        ("latent_language", '"targets": {"en": [97]}'),
    ],
)
def test_ids_in_fields_outside_the_vocabulary(
    analysis: str, field: str, llama_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text(f"{GOOD[:-1]}, {field.replace('97', '7')}}}\n{GOOD[:-1]}, {field}}}\n")
    message = refused(["run", analysis, *voids(llama_folder, prompts)[2:]], capsys)
    assert "p.jsonl:2: field" in message
    assert "token id 97 is outside the vocabulary" in message
    prompts.write_text(f"{GOOD[:-1]}, {field.replace('97', str(10**30))}}}\n")
    assert "p.jsonl:1" in refused(["run", analysis, *voids(llama_folder, prompts)[2:]], capsys)


@pytest.mark.parametrize("path", ["x" * 5000, "p.jsonl/below/out", "/dev/null/below/out"], ids=range(3))
def test_an_output_whose_parent_cannot_be_made(
    path: str, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("analyses.running.model_spec.ModelSpec.load", refuse)
    refused([*voids("smollm2-135m", prompts), "--out", str(prompts.parent / path)], capsys)


def test_references_too_long_for_a_path(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such model" in refused(voids("x" * 5000, prompts), capsys)
    assert "prompt file" in refused(voids("x", prompts.parent / ("y" * 5000)), capsys)


def test_folders_that_are_not_models(
    tmp_path: Path, llama_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(voids(tmp_path / "empty", prompts), capsys)
    shutil.copytree(llama_folder, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    assert "bare" in refused(voids(tmp_path / "bare", prompts), capsys)


def test_weights_that_are_not_numbers(llama_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = llama_folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    assert name in refused(voids(llama_folder, prompts), capsys)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf at all", b"GGUF" + b"\x03\0\0\0" + b"\xff" * 64])
def test_a_corrupt_gguf(
    tmp_path: Path, prompts: Path, content: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(content)
    assert "m.gguf" in refused(voids(tmp_path / "m.gguf", prompts), capsys)


def test_a_store_that_cannot_be_one(
    llama_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").write_text("x")
    assert "afile" in refused(voids(llama_folder, prompts, "--store", str(tmp_path / "afile")), capsys)
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "store.json").write_text('{"protocol": 99}')
    assert "99" in refused(voids(llama_folder, prompts, "--store", str(tmp_path / "newer")), capsys)
