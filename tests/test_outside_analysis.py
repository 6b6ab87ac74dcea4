"""An analysis from a package outside the repository, and one defined in a notebook, need nothing of this repository."""

from __future__ import annotations

import json
import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from families import make
from forked import forked

from analyses.results.result import Result
from app.ui.figures import data_of
from probes.errors import OptionError

ROOT = Path(__file__).parents[1]
ANALYSIS = '''
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import plotly.graph_objects as go

from analyses.base import Analysis, Measured, as_prompts
from analyses.options import option
from analyses.results.card import FigureSpec, ProfileSpec
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.points import Address
from probes.reducers import Reducer

NORM = Reducer.parse("norm")


def draw(tables):
    return go.Figure(go.Scatter(x=tables["lengths"]["layer"], y=tables["lengths"]["value"]))


@dataclass(frozen=True)
class Lengths(Analysis):
    """How long the stream's rows are at each layer."""

    power: float = option(1.0, "The power that lengths are raised to.", low=0.0)

    name = "lengths"
    title = "Lengths of rows"
    reference = "Nobody 2026"
    figures: ClassVar[dict] = {"lengths": FigureSpec("Lengths by layer", "Means over rows.", draw)}
    profiles: ClassVar[dict] = {
        "length": ProfileSpec("Length", "units", "Means over rows.", lambda tables: tables["lengths"])
    }

    def needs(self, model):
        return [Need(("resid_post.*",), NORM)]

    def measure(self, model, prompts, store, progress):
        prompts = as_prompts(prompts, model, self.prompt_fields)
        activations = capture(model, [prompt.tokens for prompt in prompts], self.needs(model), store)
        layers = range(model.shape.n_layers)
        means = [
            float(sum(rows.double().pow(self.power).mean() for rows in activations.get(Address("resid_post", i), NORM)))
            for i in layers
        ]
        table = pd.DataFrame({"layer": list(layers), "value": means})
        return Measured(prompts, {"lengths": table}, activations)
'''
FROM_OUTSIDE = """
import shlex, sys
from pathlib import Path

import pandas as pd

from analyses.cli import main
from analyses.registry import get_analysis, names
from analyses.results.result import Result
from app.ui.figures import data_of
from analyses.running import reproduce

folder, model, root = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
assert names()[-1] == "lengths" and "outside_lengths" not in sys.modules
(folder / "p.jsonl").write_text('{"tokens": [5, 6, 7]}\\n{"tokens": [8, 9]}\\n')
common = ["--model", model, "--prompts", str(folder / "p.jsonl"), "--store", str(folder / "store")]
assert main(["run", "lengths", *common, "--dry-run"]) == 0
assert main(["run", "lengths", *common, "--power", "2", "--out", str(folder / "runs" / "a")]) == 0
result = Result.load(folder / "runs" / "a")
assert result.figure("lengths").data and len(result.profile("length")) == 3
assert result.card.title == "Lengths of rows"
assert main(shlex.split(reproduce.command(result, folder / "runs" / "b", folder / "store"))[1:]) == 0
exec(reproduce.python(result, folder / "runs" / "c", folder / "store"))
for again in "bc":
    pd.testing.assert_frame_equal(Result.load(folder / "runs" / again).tables["lengths"], result.tables["lengths"])
runs = [str(folder / "runs" / name) for name in "ab"]
assert main(["report", *runs, "--out", str(folder / "report.html")]) == 0
assert "Lengths of rows" in (folder / "report.html").read_text()

from streamlit.testing.v1 import AppTest

page = AppTest.from_string("from app.views import analysis\\nanalysis.draw('lengths')", default_timeout=120).run()
assert not page.exception, page.exception[0].stack_trace
assert page.title[0].value == "Lengths of rows"
assert "Lengths by layer" in [heading.value for heading in page.subheader]
from app import offered

assert "lengths" in offered.names()
"""
IN_A_NOTEBOOK = """
import sys
from probes import ActivationStore, load_model

result = Lengths(power=2.0).run(load_model(sys.argv[2], device="cpu"), [(5, 6, 7), (8, 9)], store=ActivationStore(sys.argv[1] + "/store"))
assert type(result.figure("lengths")).__name__ == "Figure"
result.save(sys.argv[1] + "/run")
"""


def run(script: str, folder: Path, model: Path, *path: Path) -> str:
    """Run a script in a child that finds packages at `path`; return what it said."""
    (folder / "script.py").write_text(script)

    def as_program() -> None:
        os.environ |= {"BATHYSCOPE_RUNS": str(folder / "runs"), "BATHYSCOPE_STORE": str(folder / "store")}
        os.chdir(folder)
        sys.path[:0] = map(str, path)
        sys.argv = ["script.py", str(folder), str(model), str(ROOT)]
        with (folder / "said.txt").open("w") as out, redirect_stdout(out):
            runpy.run_path(str(folder / "script.py"), run_name="__main__")

    assert forked(as_program) == 0
    return (folder / "said.txt").read_text()


def test_a_package_installed_beside_this_one_brings_an_analysis(tmp_path: Path, llama_folder: Path) -> None:
    site = tmp_path / "site"
    described = site / "outside_lengths-1.0.dist-info"
    described.mkdir(parents=True)
    (site / "outside_lengths.py").write_text(ANALYSIS)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-lengths\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[bathyscope.analyses]\nlengths = outside_lengths:Lengths\n")
    said = run(FROM_OUTSIDE, tmp_path, llama_folder, site)
    assert "forwards" in said
    assert "lengths: 3 rows" in said


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a class defined in `__main__`."""
    folder = tmp_path_factory.mktemp("notebook")
    make("llama").save_pretrained(folder / "model")
    (folder / "script.py").write_text(ANALYSIS + IN_A_NOTEBOOK)

    def as_main() -> None:
        sys.argv = ["script.py", str(folder), str(folder / "model")]
        runpy.run_path(str(folder / "script.py"), run_name="__main__")

    assert forked(as_main) == 0
    return folder / "run"


def test_a_class_of_a_notebook_is_saved_drawn_and_loaded_without_being_registered(saved: Path, tmp_path: Path) -> None:
    result = Result.load(saved)
    assert (result.card.title, result.card.about) == (
        "Lengths of rows",
        "How long the stream's rows are at each layer.",
    )
    assert list(result.figure("lengths").data[0].y) == pytest.approx(result.tables["lengths"]["value"].tolist())
    assert result.profile("length")["value"].tolist() == result.tables["lengths"]["value"].tolist()
    again = Result.load(result.save(tmp_path / "copy"))
    assert again.figure("lengths") == result.figure("lengths")
    assert len(data_of(result.figure("lengths"))) == len(result.tables["lengths"])
    assert "Lengths by layer" in (tmp_path / "copy" / "report.html").read_text()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["card"], [], "card is no object"),
        (["card", "title"], None, "card.title is None"),
        (["card", "figures"], {"../x": {"title": "", "caption": "", "data": ""}}, "no name of a file"),
        (["card", "figures", "lengths"], {"title": "", "data": ""}, "card.figures.lengths.caption is missing"),
        (["length", "columns", "value"], "long", r"profiles.json: length.columns.value is no list"),
        (["length"], None, r"profiles.json: length is no object"),
        (["provenance", "loaded"], {"ref": 5}, "provenance.loaded"),
    ],
)
def test_a_malformed_card_is_refused(saved: Path, tmp_path: Path, path: list[str], value: object, said: str) -> None:
    folder = Result.load(saved).save(tmp_path / "run")
    file = folder / ("profiles.json" if path[0] == "length" else "result.json")
    record = inside = json.loads(file.read_text())
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    file.write_text(json.dumps(record))
    with pytest.raises(OptionError, match=said):
        Result.load(folder)


def test_a_result_saved_before_there_were_cards_loads_and_one_without_its_figure_says_so(
    saved: Path, tmp_path: Path
) -> None:
    folder = Result.load(saved).save(tmp_path / "run")
    (folder / "figures" / "lengths.json").write_text("{")
    with pytest.raises(OptionError, match="figure 'lengths'"):
        Result.load(folder).figure("lengths")
    record = json.loads((folder / "result.json").read_text())
    del record["card"]
    (folder / "result.json").write_text(json.dumps(record))
    (folder / "profiles.json").unlink()
    result = Result.load(folder)
    assert (result.card.title, result.figures, result.profiles) == ("lengths", {}, {})
