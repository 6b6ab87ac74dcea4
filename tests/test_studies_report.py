"""What a study leaves behind: index, curves over seeds, figures, page and exports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from study_makers import BASE, model_folder, prompt_file, study_file

from analyses.base import Analysis, Clock, as_prompts, make_result
from analyses.cli import main
from analyses.options import option
from analyses.registry import ANALYSES
from analyses.results.card import FigureSpec, ProfileSpec, Tables
from analyses.results.result import Result
from analyses.studies.study_page import PANELS, overlay
from analyses.studies.tidy_tables import CURVE, curves, summary
from probes.prompts import Field


def _bump(tables: Tables) -> pd.DataFrame:
    table = tables["bump"]
    return table.rename(columns={"height": "value"})


@dataclass(frozen=True)
class Bump(Analysis):
    """A bump at a place along depth, moved by the seed."""

    place: float = option(0.5, "Where along relative depth.", low=0, high=1)
    spread: float = option(0.0, "Half width of each cell's own interval.")
    seed: int = option(0, "Height.")
    name: ClassVar[str] = "bump"
    title: ClassVar[str] = "Bump"
    reference: ClassVar[str] = ""
    prompt_fields: ClassVar[Mapping[str, Field]] = {}
    figures: ClassVar[Mapping[str, FigureSpec]] = {}
    profiles: ClassVar[Mapping[str, ProfileSpec]] = {
        "height": ProfileSpec("Height of the bump", "metres", "How high the bump is at each layer.", _bump)
    }

    def needs(self, model: Any) -> list[Any]:
        return []

    def run(self, model: Any, prompts: Any, *, store: Any = None, progress: Any = None) -> Result:
        layers = model.shape.n_layers
        depth = np.linspace(0, 1, layers)
        height = (1 + self.seed) * np.exp(-(((depth - self.place) / 0.2) ** 2))
        table = pd.DataFrame({"layer": range(layers), "height": height})
        if self.spread:
            table["ci_low"], table["ci_high"] = height - self.spread, height + self.spread
        return make_result(self, model, as_prompts(prompts, model, {}), {"bump": table}, None, Clock())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study: two models, two prompt sets, two places, three seeds."""
    folder = tmp_path_factory.mktemp("bumps")
    model_folder(folder / "model")
    model_folder(folder / "deep", layers=9)
    prompt_file(folder / "ids.jsonl")
    text = "seeds = [0, 1, 2]" + BASE.replace('ref = "model"', 'ref = "model"\nname = "shallow"')
    text += '[[models]]\nref = "deep"\n[[prompts]]\nname = "more_"\ntokens = [[3, 4]]\n'
    text += '[[analyses]]\nanalysis = "bump"\nvary.place = [0.25, 0.75]\noptions.spread = 0.1\n'
    path = study_file(folder, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analyses.registry.ANALYSES", {**ANALYSES, "bump": f"{__name__}:Bump"})
        patch.setattr("analyses.results.result.Result.save", _without_report)
        args = ["batch", str(path), "--workers", "0", "--store", str(folder / "store"), "--out", str(folder / "out")]
        assert main([*args, "--export", "bump.bump"]) == 0
    return folder / "out"


def _without_report(result: Result, folder: Path) -> Path:
    """Saves a result without its page, which would take most of the time."""
    folder.mkdir(parents=True)
    result._write(folder)
    return folder


@pytest.fixture
def profiles(study: Path) -> pd.DataFrame:
    return pd.read_parquet(study / "profiles.parquet")


def test_the_index_has_a_line_per_cell(study: Path) -> None:
    index = pd.read_parquet(study / "index.parquet")
    assert len(index) == index["cell"].nunique() == 2 * 2 * 2 * 3
    assert set(index["state"]) == {"done"}
    assert index.groupby("model")["layers"].unique().map(list).to_dict() == {"deep": [9], "shallow": [3]}
    assert sorted(index["option.place"].unique()) == ["0.25", "0.75"]
    assert sorted(index["seed"].unique()) == [0, 1, 2]
    assert all((study / path / "result.json").is_file() for path in index["result"])
    loaded = Result.load(study / index["result"].iloc[0])
    assert loaded.options["place"] == 0.25


def test_profiles_lie_on_relative_depth(profiles: pd.DataFrame) -> None:
    for model, layers in (("shallow", 3), ("deep", 9)):
        depth = profiles.loc[profiles["model"] == model, "depth"].unique()
        np.testing.assert_allclose(np.sort(depth), np.linspace(0, 1, layers))


def test_the_mean_and_interval_over_seeds_by_hand(profiles: pd.DataFrame) -> None:
    curve = curves(profiles)
    assert len(curve) == 2 * 2 * (3 + 9)
    assert set(curve["n_seeds"]) == {3}
    top = curve[(curve["model"] == "deep") & np.isclose(curve["depth"], 0.25) & (curve["options"] == "place 0.25")]
    # Heights 1, 2 and 3 over the seeds: mean 2, standard deviation 1; each cell says plus or minus 0.1.
    half = np.hypot(0.1, student.ppf(0.975, 2) / np.sqrt(3))
    np.testing.assert_allclose(top["value"], 2.0)
    np.testing.assert_allclose(top["ci_low"], 2 - half)
    np.testing.assert_allclose(top["ci_high"], 2 + half)


def test_one_seed_keeps_the_cells_own_interval(profiles: pd.DataFrame) -> None:
    one = profiles[profiles["seed"] == 1]
    curve = curves(one)
    np.testing.assert_allclose(curve["ci_high"] - curve["value"], 0.1)
    np.testing.assert_allclose(curve["value"] - curve["ci_low"], 0.1)
    bare = curves(one.assign(ci_low=np.nan, ci_high=np.nan))
    assert bare["ci_low"].isna().all(), "no interval is made up"


def test_the_summary_finds_the_planted_place(profiles: pd.DataFrame) -> None:
    short = summary(curves(profiles))
    deep = short[short["model"] == "deep"]
    assert dict(zip(deep["options"], deep["peak_depth"], strict=True)) == {"place 0.25": 0.25, "place 0.75": 0.75}
    assert set(short.columns) >= {*CURVE, "peak_layer", "peak", "ci_low", "ci_high", "mean", "n_seeds"}


def test_models_share_panels_and_options_are_side_by_side(profiles: pd.DataFrame) -> None:
    figure = overlay(curves(profiles), ["shallow", "deep"])
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [f"{p} · place {x}" for p in ("ids", "more_") for x in (0.25, 0.75)]
    lines = [trace for trace in figure.data if trace.name]
    assert len(lines) == 2 * 4
    assert {trace.name: trace.line.color for trace in lines}.keys() == {"shallow", "deep"}
    assert len({trace.line.color for trace in lines}) == 2
    assert [trace.name for trace in lines if trace.showlegend] == ["shallow", "deep"]
    assert all(min(trace.y) == 0 and max(trace.y) == 1 for trace in lines)
    many = pd.concat([curves(profiles).assign(options=str(i)) for i in range(PANELS)])
    assert len(overlay(many, ["shallow", "deep"]).layout.annotations) == PANELS


def test_the_page_says_what_was_measured(study: Path) -> None:
    page = (study / "report.html").read_text()
    for part in ("24 of 24 cells done", "Height of the bump", "mean over 3 seeds", "Where each profile peaks"):
        assert part in page
    assert "src=" not in page.split("<body>")[1].replace("plotly.js", ""), "the page needs no network"
    links = re.findall(r'href="(cells/[^"]+)/report.html"', page)
    assert len(links) == 24
    assert all((study / link).is_dir() for link in links)


def test_exports_are_csv_and_latex(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = study / "tables"
    assert {f.name for f in tables.iterdir()} == {
        "index.csv", "profiles.csv", "curves.csv", "summary.csv", "summary.tex", "bump.bump.csv", "bump.bump.tex",
    }  # fmt: skip
    tex = (tables / "summary.tex").read_text()
    assert "\\toprule" in tex
    assert "more\\_" in tex, "special characters are escaped"
    bumps = pd.read_csv(tables / "bump.bump.csv")
    assert len(bumps) == 12 * (3 + 9)
    assert {"study_model", "study_seed", "layer", "height"} <= set(bumps.columns)
    assert len(pd.read_csv(tables / "profiles.csv")) == len(bumps)
    path = study.parent / "study.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analyses.registry.ANALYSES", {**ANALYSES, "bump": f"{__name__}:Bump"})
        args = ["batch", str(path), "--workers", "0", "--store", str(tmp_path), "--out", str(study)]
        assert main([*args, "--export", "bump.bmp"]) == 2
    assert "Legal: bump.bump." in capsys.readouterr().err
