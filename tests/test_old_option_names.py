"""Options that were renamed: old names and values work in Python, on the command line, in studies and in saved results."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
from study_makers import BASE, model_folder, prompt_file, study_file
from tiny import PROMPTS, native

from analyses.back_patching import BackPatching
from analyses.base import Analysis
from analyses.cli import main
from analyses.communication_channels import CommunicationChannels
from analyses.latent_language import LatentLanguage
from analyses.norm_removal import NormRemoval
from analyses.results.result import Result
from analyses.running import reproduce
from analyses.studies.cells import expand
from analyses.studies.study_file import read_study
from analyses.voids import Voids
from probes.errors import OptionError

SAME = [
    (Voids(semantics="mask", response_from="semantics"), Voids(mode="skip", response_from="gated_model")),  # type: ignore[call-arg, arg-type]
    (Voids(mode="trace", include_bos=False), Voids(mode="measure", first_token=False)),  # type: ignore[call-arg, arg-type]
    (Voids(batch_lambda0=True), Voids(batch_layer0_threshold=True)),  # type: ignore[call-arg]
    (
        LatentLanguage(collide="keep", n_items=3, extras=("readout", "swap")),  # type: ignore[call-arg, arg-type]
        LatentLanguage(on_collision="keep", n_prompts=3, extras=("layer_writing", "swap")),
    ),
    (BackPatching(questions=2), BackPatching(n_prompts=2)),  # type: ignore[call-arg]
    (CommunicationChannels(task_prompts=3), CommunicationChannels(n_prompts=3)),  # type: ignore[call-arg]
    (NormRemoval(special_ends=False, evaluated=8), NormRemoval(eot_scale=False, eval_blocks=8)),  # type: ignore[call-arg]
]


@pytest.mark.parametrize(("old", "new"), SAME)
def test_old_names_and_values_make_the_same_analysis(old: Analysis, new: Analysis) -> None:
    assert old == new
    assert replace(old, seed=3) == replace(new, seed=3)  # type: ignore[type-var]


def test_an_option_by_two_names_is_refused() -> None:
    with pytest.raises(OptionError, match="mode is given twice"):
        Voids(mode="skip", semantics="mask")  # type: ignore[call-arg]


def test_the_command_line_takes_both_spellings(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"tokens": list(tokens)}) + "\n" for tokens in PROMPTS))
    base = ["run", "voids", "--model", str(llama_folder), "--prompts", str(prompts), "--out"]
    spellings = {"old": ["--semantics", "mask", "--no-include-bos"], "new": ["--mode", "skip", "--no-first-token"]}
    for name, words in spellings.items():
        assert main([*base, str(tmp_path / name), *words]) == 0
    old, new = (Result.load(tmp_path / name) for name in spellings)
    assert old.options == new.options
    assert old.options["mode"] == "skip"
    for name, table in new.tables.items():
        pd.testing.assert_frame_equal(old.tables[name], table)


def test_a_study_takes_old_names(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    prompt_file(tmp_path / "ids.jsonl")
    entry = BASE + '[[analyses]]\nanalysis = "voids"\n'
    override = '[[overrides]]\nanalysis = "voids"\n'
    old = (
        entry
        + 'vary.semantics = ["trace", "mask"]\noptions.include_bos = true\n'
        + override
        + "options.include_bos = false\n"
    )
    new = (
        entry
        + 'vary.mode = ["measure", "skip"]\noptions.first_token = true\n'
        + override
        + "options.first_token = false\n"
    )
    cells = [expand(read_study(study_file(tmp_path, text))) for text in (old, new)]
    assert [cell.name for cell in cells[0]] == [cell.name for cell in cells[1]]
    assert [cell.varied for cell in cells[0]] == [{"mode": "measure"}, {"mode": "skip"}]
    assert not any(cell.analysis.first_token for cell in cells[0])  # type: ignore[attr-defined]


def test_a_result_saved_under_old_names_draws_and_is_made_again(tmp_path: Path) -> None:
    result = Voids(mode="skip", first_token=False).run(native(), PROMPTS)
    options = asdict(Voids(mode="skip", first_token=False))  # type: ignore[call-overload]
    renamed = {"mode": "semantics", "first_token": "include_bos", "batch_layer0_threshold": "batch_lambda0"}
    before = {renamed.get(name, name): value for name, value in options.items()} | {"semantics": "mask"}
    replace(result, options=before).save(tmp_path / "run")
    loaded = Result.load(tmp_path / "run")
    assert loaded.options["semantics"] == "mask"
    assert loaded.figure(next(iter(Voids.figures)))
    command = reproduce.command(loaded, tmp_path / "again")
    assert "--mode skip" in command
    assert "--no-first-token" in command
    assert "mode='skip', first_token=False" in reproduce.python(loaded, tmp_path / "again")
