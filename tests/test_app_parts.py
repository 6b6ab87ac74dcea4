"""The parts of the dashboard that need no browser: selection, prompts, saved runs, jobs, and how a run is made again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from small import SMALL
from tiny import PROMPTS, native

from analyses.logit_lens import LogitLens
from analyses.registry import ANALYSES
from analyses.results.axes import layer_step
from analyses.results.result import Result
from analyses.voids import Voids
from app import offered, places, prompt_sets, saved
from app.selected_rows import named_by, narrowed
from app.selection import Selection, params_of, parse
from app.ui.figures import clicked_layers, data_of, drawn, mark
from probes.errors import OptionError, PromptError
from probes.models.backends.native import NativeModel
from probes.store import ActivationStore


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))


@pytest.fixture
def result(tiny: NativeModel, store: ActivationStore) -> Result:
    return LogitLens().run(tiny, PROMPTS, store=store)


def test_the_catalogue_names_what_is_registered_without_importing_it() -> None:
    assert offered.names() == tuple(ANALYSES)


# Selection


def test_an_address_and_a_selection_say_the_same() -> None:
    selection = Selection((0, 7), (2,), (1, 3), ("8.0", "21.4"))
    assert parse(params_of(selection)) == selection
    assert parse({"layers": "3,x,-1,../2,99999999999", "heads": "8,a.b,1.2"}) == Selection((3,), heads=("1.2",))
    assert not Selection()


def test_rows_are_kept_by_every_column_that_can_tell() -> None:
    pairs = pd.DataFrame(
        {"source_layer": [0, 0, 1], "source_head": [1, 2, 1], "target_layer": [2, 1, 2], "target_head": [0, 0, 3]}
    )
    assert narrowed(pairs, Selection(layers=(1,))).index.tolist() == [1, 2]
    assert narrowed(pairs, Selection(heads=("0.1",))).index.tolist() == [0]
    assert narrowed(pairs, Selection(heads=("2.3",))).index.tolist() == [2]
    assert narrowed(pairs, Selection(prompts=(5,), tokens=(9,))).equals(pairs)
    tokens = pd.DataFrame({"prompt": [0, 0, 1], "position": [0, 1, 1], "layer": [0, 0, 1]})
    assert narrowed(tokens, Selection(prompts=(0,), tokens=(1,))).index.tolist() == [1]
    assert narrowed(tokens, Selection(layers=(4,))).empty
    names = pd.DataFrame({"position": ["t1", "t2"]})
    assert narrowed(names, Selection(tokens=(1,))).equals(names)


def test_chosen_rows_name_what_they_are_about() -> None:
    rows = pd.DataFrame({"prompt": [2, 2], "position": [0, 5], "layer": [3, 1], "head": [0, 7]})
    assert named_by(rows) == {"layers": [1, 3], "prompts": [2], "tokens": [0, 5], "heads": ["3.0", "1.7"]}
    assert named_by(pd.DataFrame({"accuracy": [0.5]})) == {}


def test_prompts_are_selected_of_one_set_and_mean_nothing_in_another() -> None:
    chosen = Selection((1,), (2,), (3,), ("0.1",), of="abc")
    assert parse(params_of(chosen)) == chosen
    assert chosen.of_run("abc") == chosen
    assert chosen.of_run("xyz") == Selection((1,), heads=("0.1",))
    assert "prompts and tokens are of another set" in chosen.left_out("xyz")
    assert chosen.left_out("abc") == Selection((1,), of="abc").left_out("xyz") == ""
    unsaid = replace(chosen, of="")
    assert unsaid.of_run("xyz") == unsaid
    assert parse({"prompts": "1", "of": "../x"}) == Selection(prompts=(1,))


def test_runs_on_the_same_prompts_say_so_and_on_others_do_not(
    tiny: NativeModel, store: ActivationStore, tmp_path: Path
) -> None:
    for name, analysis, prompts in (
        ("lens", LogitLens(), PROMPTS),
        ("voids", Voids(), PROMPTS),
        ("fewer", LogitLens(), PROMPTS[:2]),
        ("turned", LogitLens(), PROMPTS[::-1]),
    ):
        analysis.run(tiny, prompts, store=store).save(tmp_path / "runs" / name)
    prompts_of = {run.name: run.prompts for run in saved.saved_runs()}
    assert prompts_of["lens"] == prompts_of["voids"]
    assert len(set(prompts_of.values())) == 3
    record = {"provenance": {"prompts_file": None}}
    older = [saved.Run(name, tmp_path, 0, record).prompts for name in "ab"]
    assert older[0] != older[1]  # nobody knows: no selection crosses


# Figures that follow


def test_layers_are_marked_on_every_depth_axis(result: Result) -> None:
    drawing = drawn(result, "convergence", Selection(layers=(1,)), "red")
    figure, said = drawing.figure, drawing.said
    ends = {(shape.yref, shape.y0, shape.y1, shape.x0, shape.x1) for shape in figure.layout.shapes}
    assert ends == {("y", 0.5, 1.5, 0, 1), ("y2", 0.5, 1.5, 0, 1)}
    assert said == "Marked: layers 1."
    untouched = go.Figure().add_bar(x=["a"], y=[1]).update_xaxes(title="share of layers")
    assert not mark(untouched, (1,), "red", lambda title: layer_step(title, 4))


@pytest.mark.parametrize(
    ("title", "step"),
    [
        ("layer", 1.0),
        ("relative depth (layer / number of layers)", 0.25),
        ("relative depth (0: first layer, 1: last)", 1 / 3),
        ("relative depth", 1 / 3),
        ("share of layers", None),
        ("relative norm", None),
    ],
)
def test_a_layer_lies_where_its_axis_says(title: str, step: float | None) -> None:
    """Marked, and read back from a click, on axes of layers and of relative depth alike; here of 4 layers."""
    assert layer_step(title, 4) == (None if step is None else pytest.approx(step))
    figure = go.Figure().add_scatter(x=[0.0], y=[5.0]).update_xaxes(title=title)
    assert mark(figure, (3,), "red", lambda words: layer_step(words, 4)) == (step is not None)
    if step is None:
        assert clicked_layers(figure, [{"x": 1.0, "y": 5.0}], 4) is None
        return
    band = figure.layout.shapes[0]
    assert (band.x0, band.x1) == pytest.approx((2.5 * step, 3.5 * step))
    for layer in range(4):
        assert clicked_layers(figure, [{"x": layer * step, "y": 5.0}], 4) == (layer,)
    assert clicked_layers(figure, [{"x": 0.5 * step, "y": 5.0}], 4) is None


def test_a_probe_curve_is_on_relative_depth_and_gets_its_marks() -> None:
    analysis, prompts = SMALL["concept_depth"]
    analysed = analysis.run(native(), prompts)
    figure = drawn(analysed, next(iter(analysed.figures)), Selection(layers=(2,)), "red").figure
    table = next(table for table in analysed.tables.values() if {"layer", "depth"} <= set(table))
    depths = table.query("layer == 2")["depth"].unique()
    middles = [(s.x0 + s.x1) / 2 for s in figure.layout.shapes if s.type == "rect"]
    assert middles == pytest.approx(list(depths))


# A window on long prompts


def long_result(tiny: NativeModel, store: ActivationStore) -> Result:
    """A lens at every position of prompts of 60 and of 3 tokens."""
    prompts = [[3 + i % 90 for i in range(60)], [5, 6, 7]]
    return LogitLens(window=0).run(tiny, prompts, store=store)


@pytest.mark.parametrize("end", [None, 60, 50, 32])
def test_a_long_prompt_is_shown_through_a_window(tiny: NativeModel, store: ActivationStore, end: int | None) -> None:
    result = long_result(tiny, store)
    drawing = drawn(result, "lens", Selection(), "red", end)
    assert drawing.windowed
    first, second = drawing.figure.data
    stop = end or 60
    assert [int(name.split()[0]) for name in first.x] == list(range(stop - 32, stop))
    assert len(second.x) == 3
    whole = result.figure("lens").data[0]
    assert np.asarray(first.z).tolist() == np.asarray(whole.z)[:, stop - 32 : stop].tolist()
    marked = drawn(result, "lens", Selection(layers=(0,), prompts=(0,), tokens=(stop - 30, 3)), "red", end).figure
    assert {(shape.x0, shape.x1) for shape in marked.layout.shapes if shape.xref == "x"} >= {(1.5, 2.5)}


def test_means_over_positions_are_never_cut(tiny: NativeModel, store: ActivationStore) -> None:
    result = long_result(tiny, store)
    drawing = drawn(result, "convergence", Selection(), "red", 40)
    assert not drawing.windowed
    assert drawing.figure == result.figure("convergence")


def test_prompts_are_drawn_alone_where_tables_tell_them_apart(result: Result) -> None:
    whole = drawn(result, "lens", Selection(), "red").figure
    drawing = drawn(result, "lens", Selection(prompts=(2,)), "red")
    one, said = drawing.figure, drawing.said
    assert len(whole.data) == len(PROMPTS)
    assert len(one.data) == 1
    assert len(one.data[0].x) == len(PROMPTS[2])
    assert "prompts 2" in said
    said = drawn(result, "lens", Selection(heads=("0.0",)), "red").said
    assert "shows everything" in said


def test_a_click_names_a_layer_only_on_a_depth_axis(result: Result) -> None:
    figure = result.figure("convergence")
    assert clicked_layers(figure, [{"x": 0.3, "y": 2}, {"x": 0.1, "y": 0}], 3) == (0, 2)
    assert clicked_layers(figure, [], 3) == ()
    assert clicked_layers(go.Figure().update_yaxes(title="accuracy"), [{"x": 1, "y": 2}], 3) is None


def test_the_numbers_of_a_figure_are_those_it_shows(result: Result) -> None:
    numbers = data_of(result.figure("convergence"))
    mean = result.tables["read"].groupby("layer")["entropy_bits"].mean()
    entropies = numbers[numbers["trace"] == "entropy (bits)"]
    assert pd.to_numeric(entropies["x"]).tolist() == pytest.approx(mean.tolist())
    cells = data_of(drawn(result, "lens", Selection(prompts=(0,)), "red").figure)
    assert len(cells) == 3 * len(PROMPTS[0])
    bars = go.Figure().add_bar(x=[1.0], y=[4], error_x={"array": [0.5], "arrayminus": [0.25]})
    assert data_of(bars)[["low", "high"]].to_numpy().tolist() == [[0.75, 1.5]]


# Prompts


def test_typed_lines_are_texts_or_objects() -> None:
    lines = prompt_sets.typed('one "quoted"\n\n  {"tokens": [5, 6]}\n', {})
    assert [json.loads(line) for line in lines.text.splitlines()] == [{"text": 'one "quoted"'}, {"tokens": [5, 6]}]
    path = lines.save()
    assert path == lines.save()
    assert path.parent == places.prompts_root()
    assert prompt_sets.check(path.read_text(), "again", {}).count == 2


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.jsonl", b'{"text": "a"}\n{"text": ', r"^p\.jsonl:2: not JSON"),
        ("../../../etc/p.jsonl", b"[1]\n", r"^p\.jsonl:1: "),
        ("C:\\x\\p.jsonl", b"[1]\n", r"^p\.jsonl:1: "),
        ("p.jsonl", b'{"text": "a"}\n' * 100_000, r"^p\.jsonl:10001: 100,000 lines"),
        ("p.jsonl", b"\xff\xfe", "not UTF-8"),
        ("p.jsonl", b"", "holds no prompt"),
        ("p.jsonl", b'{"text": "a", "answer": 5}\n', r"^p\.jsonl:1: field 'answer'"),
        ("p.jsonl", b"x" * 20_000_001, "20,000,001 bytes"),
    ],
)
def test_uploads_are_refused_with_their_line(name: str, data: bytes, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        prompt_sets.uploaded(name, data, Voids.prompt_fields)


def test_the_shipped_sets_can_be_read() -> None:
    sets = prompt_sets.shipped()
    assert "demo" in sets
    for name, path in sets.items():
        assert prompt_sets.check(path.read_text(), name, {}).count


# Saved runs


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a/b", "a\\b", ".hidden", "x" * 200, "a.", "a\n", "-flag"]
)
def test_run_names_stay_in_their_folder(name: str) -> None:
    with pytest.raises(OptionError, match="run name"):
        places.run_folder(name)


def test_runs_are_found_opened_and_deleted(result: Result, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    result.save(runs / "demo" / "lens")
    result.save(runs / "plain")
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{")
    (runs / "notes").mkdir()
    by_name = {run.name: run for run in saved.saved_runs()}
    assert set(by_name) == {"demo/lens", "plain"}
    run = by_name["plain"]
    assert (run.analysis, run.layers, run.model) == ("logit_lens", 3, "tiny-llama")
    assert saved.open_run(run).tables.keys() == result.tables.keys()
    saved.delete_run(run)
    assert not (runs / "plain").exists()
    assert result.save(runs / "plain")
    (again,) = (run for run in saved.saved_runs() if run.name == "plain")
    assert again.stamp != run.stamp


def test_nothing_outside_the_folder_of_runs_is_deleted(result: Result, tmp_path: Path) -> None:
    outside = result.save(tmp_path / "precious")
    result.save(tmp_path / "runs" / "inside")
    (run,) = saved.saved_runs()
    (tmp_path / "runs" / "link").symlink_to(outside)
    for folder in (outside, tmp_path / "runs" / "link", tmp_path / "runs" / ".." / "precious", tmp_path / "runs"):
        with pytest.raises(OptionError, match="not a run inside"):
            saved.delete_run(replace(run, folder=folder))
    assert Result.load(outside)


def test_profiles_are_read_without_the_tables(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result.save(tmp_path / "runs" / "one")
    (run,) = saved.saved_runs()
    with monkeypatch.context() as patch:
        patch.setattr(saved, "_result", None)
        written = saved.profiles_of(run)
    assert [profile.name for profile in written] == list(result.profiles)
    for profile in written:
        pd.testing.assert_frame_equal(profile.table, result.profile(profile.name), check_dtype=False)
    (run.folder / "profiles.json").unlink()
    older = saved.profiles_of(replace(run, stamp=run.stamp + 1))
    for before, now in zip(older, written, strict=True):
        pd.testing.assert_frame_equal(before.table, now.table)
