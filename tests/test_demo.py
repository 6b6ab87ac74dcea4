"""`bathyscope demo`: the report is there after the first analysis, whole at any time, and grows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import native

from analyses.cli import demo_steps, main
from analyses.cli.demo_steps import DEMO, FEW_PROMPTS, Step
from analyses.logit_lens import LogitLens
from analyses.registry import names
from analyses.results.report import GrowingReport
from analyses.results.statistics import MIN_CLUSTERS
from analyses.voids import Voids

PROMPTS = '{"tokens": [5, 6, 7]}\n{"tokens": [8, 9]}\n'


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo of two analyses on a tiny random model."""
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    monkeypatch.setattr(demo_steps, "DEMO_PROMPTS", tmp_path / "prompts.jsonl")
    monkeypatch.setattr(demo_steps, "DEMO", (Step(LogitLens(), LogitLens(top_k=7), 1), Step(Voids(), Voids(), 3)))
    monkeypatch.setattr("analyses.running.model_spec.ModelSpec.load", lambda *_, **__: native())


def test_few_prompts_are_some_of_all_and_enough_for_an_interval() -> None:
    few, every = (path.read_text().splitlines() for path in (FEW_PROMPTS, demo_steps.DEMO_PROMPTS))
    assert set(few) < set(every)
    assert len(few) >= MIN_CLUSTERS
    assert all(step.prompts(full=True) == demo_steps.DEMO_PROMPTS for step in DEMO)


def test_every_analysis_is_shown_in_both_sizes() -> None:
    assert {step.quick.name for step in DEMO} == set(names())
    assert all(step.quick.name == step.full.name for step in DEMO)


@pytest.mark.usefixtures("quick")
def test_the_report_grows_and_is_whole_after_each_analysis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pages = tmp_path / "out", list[str]()
    add = GrowingReport.add

    def watched(report: GrowingReport, result: object) -> None:
        add(report, result)  # type: ignore[arg-type]
        pages.append((out / "report.html").read_text())

    monkeypatch.setattr(GrowingReport, "add", watched)
    assert main(["demo", "--out", str(out), "--store", str(tmp_path / "store")]) == 0
    assert [page.count('<section id="section-') for page in pages] == [1, 2]
    assert all(page.rstrip().endswith("</html>") for page in pages)
    assert all("This is the quick demo" in page for page in pages)
    assert sorted(path.name for path in out.iterdir()) == ["logit_lens", "report.html", "voids"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 of 2 · Logit lens"
    assert said[2].startswith("2 of 2 · Voids")
    assert "s left" in said[2]


@pytest.mark.usefixtures("quick")
def test_the_full_demo_takes_its_own_options(tmp_path: Path) -> None:
    assert main(["demo", "--full", "--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]) == 0
    assert "This is the quick demo" not in (tmp_path / "out" / "report.html").read_text()
    assert '"top_k": 7' in (tmp_path / "out" / "logit_lens" / "result.json").read_text()


@pytest.mark.usefixtures("quick")
def test_a_page_of_somebody_else_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").write_text("notes")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is no report" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "notes"
