"""The notebooks: one for each analysis, kept with small outputs, and true: each is executed, and what it says is checked."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from analyses.registry import ANALYSES, every_analysis

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
CARD, FIGURE = "text/html", "application/vnd.plotly.v1+json"

KEEPING = SimpleNamespace(**runpy.run_path(str(ROOT / "notebooks" / "execute.py")))
KINDS = {("display_data", None), ("execute_result", None), ("stream", "stdout")}
"""Outputs that are no error and no warning."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Executed:
    """A notebook after its run."""

    cells: list[Any]
    facts: Facts
    """What was asked of its variables."""

    def outputs(self, kind: str) -> list[Any]:
        return [o["data"][kind] for cell in self.cells for o in cell.get("outputs", []) if kind in o.get("data", {})]


Execute = Callable[..., Executed]


@pytest.fixture
def execute(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Runs a notebook on the store all of them share, then evaluates `facts`, expressions in its variables."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    monkeypatch.setenv("BATHYSCOPE_STORE", str(shared / "notebook-store"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(name: str, **facts: str) -> Executed:
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        entries = ", ".join(f"{key!r}: {expression}" for key, expression in facts.items())
        probe = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{entries}}}, default=lambda x: x.item()))")
        notebook.cells.append(probe)
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
        *cells, last = notebook.cells
        done = Executed(cells, json.loads(last.outputs[0].text))
        _sound(done)
        return done

    return run


def _sound(done: Executed) -> None:
    """Nothing on standard error, and every figure has something in it and names its axes."""
    assert {(o.output_type, o.get("name")) for cell in done.cells for o in cell.get("outputs", [])} <= KINDS
    figures = done.outputs(FIGURE)
    assert figures
    for figure in figures:
        assert any(trace.get("y") or trace.get("z") for trace in figure["data"])
        assert any(
            part["title"].get("text") for key, part in figure["layout"].items() if "axis" in key and "title" in part
        )


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
    kept = KEEPING.kept(nbformat.v4.new_notebook(cells=[cell]), {"/home/me/x/store": "~/store"})
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


@pytest.mark.real
def test_tour(execute: Execute) -> None:
    done = execute(
        "tour",
        forwards="[held.done.forwards, again.done.forwards, lens.provenance['counts']['forwards'], voids.provenance['counts']['forwards']]",
        said="late[late['layer'] == 29].sort_values('prompt')['token'].tolist()",
        whole="whole",
        without="without.tolist()",
        same="bool((loaded.tables['activity'] == voids.tables['activity']).all(axis=None))",
        controls="voids.tables['controls'].set_index('variant')['kl_to_full'].to_dict()",
    )
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


@pytest.mark.real
def test_live(execute: Execute) -> None:
    done = execute(
        "live",
        kl="patched.compare(layers=False).kl",
        country="float(difference[8, 3])",
        single="session.edit('patch resid_post.20 @8 from other').compare(layers=False).kl",
        swept="float(effect.kl[20, 8])",
        unchanged="session.compare(layers=False).kl",
    )
    facts = done.facts
    assert facts["unchanged"] == 0 < facts["kl"]
    assert facts["country"] > 0
    assert facts["swept"] == pytest.approx(facts["single"], abs=1e-4)


@pytest.mark.real
def test_voids(execute: Execute) -> None:
    done = execute(
        "voids",
        used="{f'{a} {p}': v for (a, p), v in usage.mean().items()}",
        late="{f'{a} {p}': v for (a, p), v in (usage.loc[20:].mean() - usage.loc[2:19].mean()).items()}",
        kl="{f'{a} {v}': [row.kl_to_full, row.kl_low, row.kl_high] for (a, v), row in controls.iterrows()}",
        phases="strict.loc[[21, 24], 'difference'].tolist()",
        skipping="result.tables['controls'].groupby('alpha')['layers_used'].nunique().tolist()",
    ).facts
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


@pytest.mark.real
def test_logit_lens(execute: Execute) -> None:
    done = execute(
        "logit_lens",
        end="curve.loc[29].to_dict()",
        start="curve.loc[5].to_dict()",
        decided="decided.groupby(easy, observed=True).mean().to_dict()",
        median="decided.median()",
        answer="read.query('prompt == 0 and layer == 29')['final_token'].iloc[-1]",
    ).facts
    assert done["end"]["agrees"] == 1
    assert done["end"]["kl_to_final"] < 1e-4
    assert done["start"]["entropy_bits"] < done["end"]["entropy_bits"]
    assert done["start"]["kl_to_final"] > 5
    assert done["decided"]["certain"] < done["decided"]["middling"] < done["decided"]["uncertain"]
    assert done["median"] >= 28
    assert done["answer"] == " Tokyo"


@pytest.mark.real
def test_lenses(execute: Execute) -> None:
    done = execute(
        "lenses",
        kl="kl.to_dict()",
        ends="result.tables['read'].query('layer == 29')[['agrees', 'kl_to_final']].agg(['min', 'max']).to_dict()",
        forwards="[r.provenance['counts']['forwards'] for r in (plain, through)]",
        errors="jacobian.relative_error",
        lift="bool((result.tables['patchscope']['control_max'] >= result.tables['patchscope']['unpatched']).all())",
    ).facts
    for layer in ("0", "10", "20", "28"):
        assert done["kl"]["tuned"][layer] < done["kl"]["bias_only"][layer]
        assert done["kl"]["tuned"][layer] < done["kl"]["shuffled"][layer]
    assert done["kl"]["tuned"]["29"] == pytest.approx(0, abs=1e-4)
    assert done["ends"]["agrees"]["min"]
    assert done["ends"]["kl_to_final"]["max"] < 1e-3
    assert done["forwards"][1] == 0, "another lens reads the same rows"
    assert all(error > 0.05 for error in done["errors"].values())
    assert done["lift"]


@pytest.mark.real
def test_back_patching(execute: Execute) -> None:
    done = execute(
        "back_patching",
        summary="summary.to_dict('records')",
        rates="rates.set_index(['set', 'position_name', 'variant'])['oracle_rate'].rename(str).reset_index().to_dict('records')",
        upper="bool((result.tables['grid']['source_layer'] > result.tables['grid']['target_layer']).all())",
        known="bool(cases.loc[cases['patched'], ['first_hop', 'second_hop']].all(axis=None))",
    ).facts
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


@pytest.mark.real
def test_communication_channels(execute: Execute) -> None:
    done = execute(
        "communication_channels",
        pairs="len(composition)",
        best="strongest.iloc[0][['source_layer', 'source_head', 'target_layer', 'target_head', 'component']].astype(int).tolist()",
        z="strongest['z'].tolist()",
        out="[outstanding(composition['score']), outstanding(composition['component_score'])]",
        beaten="rank[['components_beaten', 'directions_beaten']].min().tolist()",
    ).facts
    assert done["pairs"] == 81 * 30 * 29 // 2
    assert done["best"] == [8, 8, 10, 0, 3]
    assert done["z"][0] == pytest.approx(37.8, abs=1)
    assert done["out"][1] > 1.3 * done["out"][0]
    assert min(done["beaten"]) > 0.9


@pytest.mark.real
def test_concept_depth(execute: Execute) -> None:
    done = execute(
        "concept_depth", depths="depths.to_dict('index')", layers="result.tables['scores']['layer'].nunique()"
    )
    assert done.facts["layers"] == 30
    kind, place = done.facts["depths"]["sentiment"], done.facts["depths"]["city_country"]
    assert kind["decodable"]
    assert kind["peak_accuracy"] > kind["best_control_accuracy"] + 0.1
    assert kind["peak_accuracy_low"] > kind["majority"]
    assert 5 <= kind["peak_layer"] <= 25
    assert not place["decodable"]
    assert place["peak_accuracy"] < kind["peak_accuracy"]
    assert kind["depth_90_low"] <= kind["depth_90"] <= kind["depth_90_high"]


@pytest.mark.real
def test_latent_language(execute: Execute) -> None:
    done = execute(
        "latent_language",
        cannot="translation.tables['summary'].set_index('pair')['accuracy'].to_dict()",
        notes="translation.notes",
        repeats="repetition.tables['summary'].iloc[0][['accuracy', 'peak', 'leads_in_middle']].tolist()",
        curve="curve.loc[29].to_dict()",
        controls="bool(repetition.tables['curve']['control_mean'].notna().all())",
    )
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


@pytest.mark.real
def test_depth_use(execute: Execute) -> None:
    done = execute(
        "depth_use",
        score="result.tables['depth_score'].query(\"by == 'mean'\").set_index('variant')['score'].to_dict()",
        worst="measured.sort_values(ascending=False).head(4).index.tolist()",
        first="contributions.loc[:1, 'relative_norm'].median()",
        rest="contributions.loc[2:, 'relative_norm'].median()",
        foretold="agreement[(agreement['proxy_b'] == 'delta_ce_block') & (agreement['proxy_a'] == 'skip_effect_block')]['spearman'].iloc[0]",
    ).facts
    assert done["score"]["future"] < 12 < done["score"]["local"]
    assert {0, 1, 11} <= set(done["worst"])
    assert done["first"] > 5
    assert done["rest"] < 0.5
    assert done["foretold"] > 0.7


@pytest.mark.real
def test_norm_removal(execute: Execute) -> None:
    done = execute(
        "norm_removal",
        sites="len(effect)",
        alone="effect['diverged'].max()",
        mlps="together.set_index('site')['diverged']['all mlp']",
        spike="spike",
        sinks="[sinks['rate'], sinks['uniform']]",
        error="total[['nmae']].iloc[0].tolist()",
        interval="bool(total[['ci_low', 'ci_high']].notna().any(axis=None))",
    ).facts
    assert done["sites"] == 61
    assert done["alone"] == 0
    assert done["mlps"] > 0.5
    assert done["spike"] > 20
    assert done["sinks"][0] > 2 * done["sinks"][1]
    assert 0.1 < done["error"][0] < 1
    assert not done["interval"], "two texts support none"


@pytest.mark.real
def test_causal_patching(execute: Execute) -> None:
    done = execute(
        "causal_patching",
        kept="int(result.tables['pairs']['kept'].sum())",
        bounds="window.dropna(subset='layer').set_index(['role', 'bound'])['layer'].to_dict().__repr__()",
        top="float(result.tables['verification']['spearman'].iloc[0])",
        end="float(result.tables['map'].query(\"component == 'resid_post' and role == 'end' and layer == 29\")['recovery'].min())",
        planned="planned.total",
        ran="result.provenance['counts']['intervention_forwards']",
    ).facts
    assert done["kept"] >= 6
    assert "('end', 'arrival')" in done["bounds"]
    assert "('country', 'departure')" in done["bounds"]
    assert done["top"] > 0.5
    assert done["end"] == pytest.approx(1, abs=1e-3)
    assert 0 < done["ran"] <= done["planned"]


@pytest.mark.real
def test_layer_programs(execute: Execute) -> None:
    done = execute(
        "layer_programs",
        runs="result.provenance['counts']['block_runs']",
        planned="analysis.interventions(model, [None] * 8).total",
        ran="result.provenance['counts']['intervention_forwards']",
        exact="mending == task.record.question('mending:e1').truth",
        test="search.tables['programs']['test'].tolist()",
        undone="search.tables['fragility'].query(\"change == 'undone'\")['survived'].max()",
        swapped="float(result.tables['swaps'].query(\"protocol == 'interchange'\")['kl'].median())",
        replaced="float(result.tables['swaps'].query(\"protocol == 'replacement'\")['kl'].median())",
    ).facts
    assert done["planned"] == done["ran"]
    assert done["exact"]
    assert done["test"] == [1.0] * 4
    assert done["undone"] == 0
    assert done["swapped"] < done["replaced"]


@pytest.mark.real
def test_contextual_decomposition(execute: Execute) -> None:
    done = execute(
        "contextual_decomposition",
        n="len(heads)",
        best="heads.iloc[0][['score', 'ablation']].tolist()",
        pearson="agreement['pearson'].to_dict()",
        kept="faithfulness.set_index('method').query('size < 10')[['faithfulness', 'random_high']].to_numpy().tolist()",
    ).facts
    assert done["n"] == 270
    score, ablation = done["best"]
    assert score * ablation > 0
    assert done["pearson"]["cdt"] > done["pearson"]["direct"]
    assert done["pearson"]["cdt"] > 0.7
    assert any(faithfulness > control for faithfulness, control in done["kept"])
