"""The shipped quick study on the default model: once, a second time, and with one option changed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analyses.cli import main
from analyses.studies import expand, read_study

STUDIES = Path(__file__).resolve().parents[1] / "studies"


@pytest.mark.real
def test_quick_twice_and_with_one_option_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    places = ["--out", str(out), "--store", str(tmp_path / "store"), "--workers", "0"]
    cells = {cell.name for cell in expand(read_study(STUDIES / "quick.toml"))}
    assert main(["batch", str(STUDIES / "quick.toml"), *places]) == 0
    first = capsys.readouterr().out
    assert f"study quick: {len(cells)} cells run, 4 forward passes" in first
    assert main(["batch", str(STUDIES / "quick.toml"), *places]) == 0
    assert f"study quick: {len(cells)} cells, all done; nothing to run" in capsys.readouterr().out
    text = (STUDIES / "quick.toml").read_text()
    changed = tmp_path / "changed.toml"
    changed.write_text(
        text.replace("[0.2, 0.8]", "[0.2, 0.6]").replace("../analyses", str(STUDIES.parent / "analyses"))
    )
    fresh = {cell.name for cell in expand(read_study(changed))} - cells
    assert len(fresh) == 1
    assert main(["batch", str(changed), *places]) == 0
    assert "study quick: 1 cell run, 0 forward passes" in capsys.readouterr().out
    assert {path.name for path in (out / "cells").iterdir()} == cells | fresh
    index = pd.read_parquet(out / "index.parquet")
    assert sorted(index["option.alpha"].dropna()) == ["0.2", "0.6"]
    assert set(index["state"]) == {"done"}


@pytest.mark.parametrize("name", sorted(path.name for path in STUDIES.glob("*.toml")))
def test_shipped_studies_are_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell can be written out; models that are not at hand are taken on trust."""
    plan = expand(read_study(STUDIES / "quick.toml"))[0]
    one = {"weights": plan.name, "backend": "native", "dtype": "auto", "attention": "sdpa"}
    monkeypatch.setattr("analyses.studies.fingerprint.find", lambda spec: None)
    monkeypatch.setattr("analyses.studies.fingerprint.of_model", lambda spec, _: {**one, "weights": spec.spec.ref})
    monkeypatch.setattr("analyses.studies.fingerprint.weight_bytes", lambda _: 1)
    assert expand(read_study(STUDIES / name))
