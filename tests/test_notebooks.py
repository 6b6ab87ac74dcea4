"""The notebooks: one for each analysis, kept with small outputs, and true.

Every cell runs here on a random model of the default model's layers, heads and tokenizer. What the words of a notebook say
is held against what `notebooks/execute.py` kept when it last executed these very cells on the real model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import execute
import nbformat
import plotly.graph_objects as go
import pytest
import torch
import transformers as hf
from facts import FACTS
from IPython.core.formatters import DisplayFormatter

from analyses.registry import ANALYSES, every_analysis
from probes.errors import OptionError, PromptError
from probes.models import Model, load_model
from probes.models.sources.locate import locate

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
CARD, FIGURE = "text/html", "application/vnd.plotly.v1+json"

KINDS = {("display_data", None), ("execute_result", None), ("stream", "stdout")}
"""Outputs that are no error and no warning."""
NEEDS_ANSWERS = {'repetition.figure("probability_right")'}
"""Cells about the prompts that a model answers rightly; a random one answers none, and they say so."""

REFUSED = {"causal_patching": "result = analysis.run("}
"""Cells at which a model that does not tell the prompts apart is refused; what follows needs a real one."""


@dataclass(frozen=True)
class Kept:
    """A notebook as it is kept."""

    cells: list[Any]
    facts: Mapping[str, Any]
    """What its variables said on the real model."""

    def outputs(self, kind: str) -> list[Any]:
        return [o["data"][kind] for cell in self.cells for o in cell.get("outputs", []) if kind in o.get("data", {})]


def read(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)


def kept(name: str) -> Kept:
    notebook = read(name)
    return Kept(notebook.cells, notebook.metadata["bathyscope"]["facts"])


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model with the default model's tokenizer, layers and heads, which cells name, and narrow ones."""
    folder, source = tmp_path_factory.mktemp("stand_in"), locate("smollm2-135m").folder
    config = hf.AutoConfig.from_pretrained(source)
    config.update({"hidden_size": 36, "head_dim": 4, "intermediate_size": 48, "initializer_range": 1.0})
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return load_model(str(folder))


def run_cell(source: str, variables: dict[str, Any]) -> Any:
    """Runs a cell and draws what its last line shows, as a notebook would."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), variables)
    if last is None:
        return None
    shown = eval(compile(ast.Expression(last.value), "cell", "eval"), variables)
    if isinstance(shown, go.Figure):
        shown.to_json()
    else:
        DisplayFormatter().format(shown)
    return shown


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs_and_every_figure_names_its_axes(
    name: str, stand_in: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))
    for place in ("probes.load_model", "probes.models.load_model"):
        monkeypatch.setattr(place, lambda ref: copy(stand_in) if ref == "smollm2-135m" else load_model(ref))
    variables: dict[str, Any] = {"__name__": "__main__"}
    for cell in read(name).cells:
        if cell.cell_type == "code" and cell.source in NEEDS_ANSWERS:
            with pytest.raises(OptionError, match="unknown figure"):
                run_cell(cell.source, variables)
        elif cell.cell_type == "code" and cell.source.startswith(REFUSED.get(name, "\0")):
            with pytest.raises(PromptError, match="can be patched"):
                run_cell(cell.source, variables)
            return
        elif cell.cell_type == "code" and isinstance(shown := run_cell(cell.source, variables), go.Figure):
            sound(shown.to_plotly_json())
    assert capsys.readouterr().err == ""


def sound(figure: Mapping[str, Any]) -> None:
    """The figure has something in it and names its axes."""
    assert any(len(values) for trace in figure["data"] for key in "yz" if (values := trace.get(key)) is not None)
    assert any(part["title"].get("text") for key, part in figure["layout"].items() if "axis" in key and "title" in part)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_facts_are_those_of_these_cells(name: str) -> None:
    notebook = read(name)
    assert notebook.metadata["bathyscope"]["cells"] == execute.digest(notebook, FACTS[name]), (
        f"the cells of {name}.ipynb changed since they were executed: make notebooks-in-place"
    )
    figures = kept(name).outputs(FIGURE)
    assert figures
    for figure in figures:
        sound(figure)


@pytest.mark.real
def test_a_kernel_finds_on_the_real_model_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One notebook as a reader runs it, in a Jupyter kernel."""
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read("logit_lens")
    facts = execute.run(notebook, FACTS["logit_lens"], tmp_path)
    assert {(o.output_type, o.get("name")) for cell in notebook.cells for o in cell.get("outputs", [])} <= KINDS
    for name, fact in kept("logit_lens").facts.items():
        assert facts[name] == (fact if isinstance(fact, str) else pytest.approx(fact, rel=1e-2, abs=1e-4))


def test_there_is_a_tour_and_a_notebook_for_every_analysis() -> None:
    assert {"tour", "live", "depth_bench", *ANALYSES} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_as_one_run_left_it(name: str) -> None:
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    code = [cell for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run make notebooks-in-place"
    for cell in code:
        assert bool(cell.outputs) >= isinstance(ast.parse(cell.source).body[-1], ast.Expr)
        assert {(o.output_type, o.get("name")) for o in cell.outputs} <= KINDS
        assert all("image/png" in o.data for o in cell.outputs if FIGURE in o.get("data", {}))
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(work|tmp|root|home|Users|var)/|\d s<", words)


def test_the_notebooks_are_small_enough_to_keep() -> None:
    assert sum((ROOT / "notebooks" / f"{name}.ipynb").stat().st_size for name in NAMES) < 6e6


def test_what_a_notebook_keeps_is_free_of_machine_and_time() -> None:
    data = {"text/html": "<td>4 forward passes, 1.3 s</td> in /home/me/x/store", FIGURE: {"y": [0.123456789, "n", 3]}}
    output = nbformat.v4.new_output("display_data", data)
    cell = nbformat.v4.new_code_cell("1", outputs=[output], metadata={"execution": {"iopub": "2020"}})
    kept = execute.kept(nbformat.v4.new_notebook(cells=[cell]), {"/home/me/x/store": "~/store"})
    assert kept.cells[0].metadata == {}
    assert kept.cells[0].outputs[0].data == {
        "text/html": "<td>4 forward passes</td> in ~/store",
        FIGURE: {"y": [0.12346, "n", 3]},
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_reads_as_a_document(name: str) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert prose[0].startswith("# ")
    assert "make notebooks" in prose[0]
    assert len(" ".join(prose).split()) > 200
    by_name = {analysis.name: analysis for analysis in every_analysis()}
    if name in by_name:
        year = by_name[name].reference.split('"')[0].strip(" ,").split()[-1]
        assert year in prose[0]
        assert any(".figure(" in cell.source for cell in code)


def test_tour() -> None:
    done = kept("tour")
    first, *later = done.facts["forwards"]
    assert first in (0, 4)
    assert later == [0, 0, 0]
    assert [done.facts["said"][i] for i in (0, 1, 3)] == ["' Paris'", "' cold'", "' moon'"]
    assert done.facts["whole"] == pytest.approx(0.77, abs=0.03)
    without = done.facts["without"]
    assert sorted(range(30), key=without.__getitem__)[:3] != [0, 1, 2]
    assert all(without[block] < 0.05 for block in (0, 1, 11))
    assert sum(p > done.facts["whole"] / 2 for p in without) >= 15
    assert done.facts["same"]
    assert done.facts["controls"]["voids"] < done.facts["controls"]["fixed_exit"]
    cards = " ".join(done.outputs(CARD))
    assert "identities hold" in cards
    assert all(name in cards for name in ANALYSES)
    assert len(done.outputs(FIGURE)) == 2


def test_live() -> None:
    done = kept("live")
    facts = done.facts
    assert facts["unchanged"] == 0 < facts["kl"]
    assert facts["country"] > 0
    assert facts["swept"] == pytest.approx(facts["single"], abs=1e-4)


def test_voids() -> None:
    done = kept("voids").facts
    for phase in ("prompt", "response"):
        assert 0 < done["used"][f"0.8 {phase}"] < done["used"][f"0.2 {phase}"] < 1
        assert done["late"][f"0.8 {phase}"] > 0.15
    assert abs(done["late"]["0.8 prompt"] - done["late"]["0.8 response"]) < 0.1
    assert min(done["phases"]) > 0.15
    rule, dealt, fixed = (done["kl"][f"0.8 {name}"] for name in ("voids", "shuffled_exit", "fixed_exit"))
    assert rule[0] < fixed[0]
    assert rule[1] < dealt[0] < rule[2]
    assert all(low <= mean <= high for mean, low, high in done["kl"].values())
    assert done["skipping"] == [1, 1]


def test_logit_lens() -> None:
    done = kept("logit_lens").facts
    assert done["end"]["agrees"] == 1
    assert done["end"]["kl_to_final"] < 1e-4
    assert done["start"]["entropy_bits"] < done["end"]["entropy_bits"]
    assert done["start"]["kl_to_final"] > 5
    assert done["decided"]["certain"] < done["decided"]["middling"] < done["decided"]["uncertain"]
    assert done["median"] >= 28
    assert done["answer"] == " Tokyo"


def test_lenses() -> None:
    done = kept("lenses").facts
    for layer in ("0", "10", "20", "28"):
        assert done["kl"]["tuned"][layer] < done["kl"]["bias_only"][layer]
        assert done["kl"]["tuned"][layer] < done["kl"]["shuffled"][layer]
    assert done["kl"]["tuned"]["29"] == pytest.approx(0, abs=1e-4)
    assert done["ends"]["agrees"]["min"]
    assert done["ends"]["kl_to_final"]["max"] < 1e-3
    assert done["forwards"][1] == 0, "another lens reads the same rows"
    assert all(error > 0.05 for error in done["errors"].values())
    assert done["lift"]


def test_back_patching() -> None:
    done = kept("back_patching").facts
    assert done["upper"]
    assert done["known"]
    rate = {(row["set"], row["position_name"], row["variant"]): row["oracle_rate"] for row in done["rates"]}
    for row in done["summary"]:
        assert row["baseline_rate"] == (row["set"] == "correct")
        assert row["best_cell_rate"] <= row["oracle_rate"]
        assert row["oracle_low"] <= row["oracle_rate"] <= row["oracle_high"] + 1e-9
        assert row["oracle_high"] - row["oracle_low"] > 0.4
    rescued = [row for row in done["summary"] if row["set"] == "incorrect"]
    assert any(row["oracle_rate"] > 0 for row in rescued)
    assert all(row["held_out_rate"] <= row["oracle_rate"] for row in rescued)
    for position in ("t1", "t2"):
        assert rate["incorrect", position, "forward"] >= rate["incorrect", position, "back_patch"]


def test_communication_channels() -> None:
    done = kept("communication_channels").facts
    assert done["pairs"] == 81 * 30 * 29 // 2
    assert done["best"] == [8, 8, 10, 0, 3]
    assert done["z"][0] == pytest.approx(37.8, abs=1)
    assert done["out"][1] > 1.3 * done["out"][0]
    assert min(done["beaten"]) > 0.9


def test_concept_depth() -> None:
    done = kept("concept_depth")
    assert done.facts["layers"] == 30
    kind, place = done.facts["depths"]["sentiment"], done.facts["depths"]["city_country"]
    assert kind["decodable"]
    assert kind["peak_accuracy"] > kind["best_control_accuracy"] + 0.1
    assert kind["peak_accuracy_low"] > kind["majority"]
    assert 5 <= kind["peak_layer"] <= 25
    assert not place["decodable"]
    assert place["peak_accuracy"] < kind["peak_accuracy"]
    assert kind["depth_90_low"] <= kind["depth_90"] <= kind["depth_90_high"]


def test_latent_language() -> None:
    done = kept("latent_language")
    facts = done.facts
    assert set(facts["cannot"]) == {"en→fr", "de→fr"}
    assert max(facts["cannot"].values()) < 0.25
    assert sum("this model cannot do this pair" in note for note in facts["notes"]) == 2
    assert "this model cannot do this pair" in " ".join(done.outputs(CARD))
    accuracy, peak, leads = facts["repeats"]
    assert accuracy > 0.75
    assert peak < 0.01
    assert leads == ""
    assert facts["curve"]["fr"] > 0.7
    assert facts["controls"]


def test_depth_use() -> None:
    done = kept("depth_use").facts
    assert done["score"]["future"] < 12 < done["score"]["local"]
    assert {0, 1, 11} <= set(done["worst"])
    assert done["first"] > 5
    assert done["rest"] < 0.5
    assert done["foretold"] > 0.7


def test_norm_removal() -> None:
    done = kept("norm_removal").facts
    assert done["sites"] == 61
    assert done["alone"] == 0
    assert done["mlps"] > 0.5
    assert done["spike"] > 20
    assert done["sinks"][0] > 2 * done["sinks"][1]
    assert 0.1 < done["error"][0] < 1
    assert not done["interval"], "two texts support none"


def test_causal_patching() -> None:
    done = kept("causal_patching").facts
    assert done["kept"] >= 6
    assert "('end', 'arrival')" in done["bounds"]
    assert "('country', 'departure')" in done["bounds"]
    assert done["top"] > 0.5
    assert done["end"] == pytest.approx(1, abs=1e-3)
    assert 0 < done["ran"] <= done["planned"]


def test_passage_use() -> None:
    done = kept("passage_use").facts
    with_passage, without = done["correct"]
    assert with_passage > 0.7 > 0.3 > without
    assert 20 < done["most"] < 27
    assert done["most"] in done["used"]
    assert len(done["used"]) <= 5
    assert done["looked"] != done["most"]
    assert done["drop"] <= 2
    assert done["above"]["fused"] < done["gain"]["temperature"]
    assert done["gain"]["temperature"] > 0


def test_layer_programs() -> None:
    done = kept("layer_programs").facts
    assert done["planned"] == done["ran"]
    assert done["exact"]
    assert done["test"] == [1.0] * 4
    assert done["undone"] == 0
    assert done["swapped"] < done["replaced"]


def test_contextual_decomposition() -> None:
    done = kept("contextual_decomposition").facts
    assert done["n"] == 270
    score, ablation = done["best"]
    assert score * ablation > 0
    assert done["pearson"]["cdt"] > done["pearson"]["direct"]
    assert done["pearson"]["cdt"] > 0.7
    assert any(faithfulness > control for faithfulness, control in done["kept"])
