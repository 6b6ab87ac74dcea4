"""Results: saved, loaded and redrawn without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from small import SMALL
from tiny import PROMPTS

from analyses.registry import ANALYSES, every_analysis, get_analysis
from analyses.results.axes import whole_layers
from analyses.results.report import render
from analyses.results.result import Result
from analyses.voids import Voids
from probes.errors import OptionError
from probes.models.backends.native import NativeModel
from probes.store import ActivationStore


@pytest.fixture
def result(tiny: NativeModel, store: ActivationStore) -> Result:
    return Voids(alpha=(0.8, 0.2), max_new_tokens=2).run(tiny, PROMPTS, store=store)


def test_a_saved_result_comes_back_whole(result: Result, tmp_path: Path) -> None:
    loaded = Result.load(result.save(tmp_path / "run"))
    assert (loaded.analysis, loaded.provenance, loaded.notes) == ("voids", result.provenance, result.notes)
    assert loaded.options == json.loads(json.dumps(result.options))
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table)
    for name in result.figures:
        assert loaded.figure(name).to_json() == result.figure(name).to_json()
        stored = json.loads((tmp_path / "run" / "figures" / f"{name}.json").read_text())
        assert stored["data"]


def test_provenance_names_everything_needed_to_do_it_again(
    result: Result, tiny: NativeModel, store: ActivationStore
) -> None:
    provenance = result.provenance
    assert provenance["model"]["weights"] == tiny.context.weights
    assert (provenance["backend"], provenance["dtype"], provenance["attention"]) == ("native", "float32", "sdpa")
    assert provenance["faithfulness"]["holds"] is True
    assert {"torch", "transformers", "bathyscope", "python"} <= set(provenance["versions"])
    assert provenance["counts"]["forwards"] == len(PROMPTS)
    shards = {path.stem for path in (store.root / "shards").rglob("*.safetensors")}
    assert provenance["store_keys"]
    assert {key.removesuffix(".safetensors") for key in provenance["store_keys"]} <= shards


def test_saving_again_replaces_and_leaves_no_drafts(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "runs" / "a")
    result.save(tmp_path / "runs" / "a")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]


def test_other_peoples_folders_are_not_overwritten(result: Result, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(OptionError, match="holds files that are not a result"):
        result.save(tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="is a file"):
        result.save(tmp_path / "file")


def test_a_failed_save_keeps_the_earlier_result(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "run")

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("analyses.results.result.write_report", broken)
    with pytest.raises(OptionError, match=r"No space left on device.*what stood there stands; make room"):
        result.save(tmp_path / "run")
    assert Result.load(tmp_path / "run").tables.keys() == result.tables.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("content", ["", "{}", '{"format": 99}', "not json"])
def test_folders_without_a_result_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(OptionError, match="result"):
        Result.load(tmp_path)


def test_unknown_figures_and_analyses_are_named(result: Result) -> None:
    with pytest.raises(OptionError, match="Did you mean 'raster'"):
        result.figure("rastre")
    with pytest.raises(OptionError, match="Did you mean 'voids'"):
        get_analysis("viods")


def test_few_layers_get_a_tick_each_and_nothing_between(result: Result) -> None:
    figure = result.figure("raster")
    assert (figure.layout.yaxis.title.text, figure.layout.yaxis.dtick) == ("layer", 1)
    assert figure.layout.xaxis.dtick is None
    for values, tick in (([0, 1, 7], 1), ([0.0, float("nan"), 8], None), (["a", "b"], None)):
        drawn = go.Figure(go.Scatter(x=[0, 0.5, 1][: len(values)], y=values)).update_layout(
            xaxis_title="relative depth (layer / number of layers)", yaxis_title="layer"
        )
        assert whole_layers(drawn).layout.yaxis.dtick == tick
        assert drawn.layout.xaxis.dtick is None
    square = go.Figure(go.Heatmap(z=[[1, 2], [3, 4]])).update_layout(xaxis_title="layer", yaxis_title="source block")
    assert [whole_layers(square).layout[axis].dtick for axis in ("xaxis", "yaxis")] == [1, 1]


def test_layers_that_were_not_looked_at_get_no_tick() -> None:
    for layers, ticks in (([0, 6, 24], (0, 6, 24)), (range(12), None), (range(0, 80, 2), None), ([0, 6.5, 24], None)):
        heat = go.Figure(go.Heatmap(y=list(layers), z=[[1]] * len(layers))).update_layout(yaxis_title="layer")
        assert whole_layers(heat).layout.yaxis.tickvals == ticks


def test_a_caption_says_what_a_figure_was_drawn_from(result: Result, tiny: NativeModel, store: ActivationStore) -> None:
    assert f"Measured on {len(PROMPTS)} prompts" in render([result])
    analysis, _ = SMALL["communication_channels"]
    scan = render([analysis.run(tiny, [], store=store)])
    assert "Computed from the weights of" in scan
    assert "Measured on" not in scan


def test_the_report_needs_nothing_from_outside(result: Result) -> None:
    page = render([result])
    for mark in ('src="http', 'href="http', "@import", "cdn."):
        assert mark not in page.replace(page[page.index("<script>") : page.index("</script>")], "")
    for spec in result.figures.values():
        assert spec.title in page
        assert len(spec.caption) > 80
    assert "tiny-llama" in page
    assert result.notes[0].split("`")[0] in page


def test_every_analysis_says_what_it_is() -> None:
    names = list(ANALYSES)
    assert len(set(names)) == len(names)
    for analysis in every_analysis():
        assert analysis.__doc__
        assert analysis.title
        assert analysis.reference
        assert analysis.figures
