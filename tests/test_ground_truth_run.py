"""A run of the benchmark, its page and folder; tasks as files for others; the truth in the dashboard's figure."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
from planted_kinds import kinds_asked

from analyses.ground_truth.answers import Answer, digest, to_json
from analyses.ground_truth.bench import FURTHER, QUICK, Job, Ran, chosen_tasks, further_jobs, run_bench, seed_of_release
from analyses.ground_truth.contestants import ADAPTED, control_answers
from analyses.ground_truth.exchange import export, exported, handed_in
from analyses.ground_truth.report import worst
from analyses.ground_truth.score import score
from analyses.ground_truth.words import CANNOT_TELL, method_list, readme_table, sentences
from analyses.registry import SHIPPED
from analyses.results.depth_axis import Curve, Panel, depth_figure
from analyses.results.statistics import MIN_CLUSTERS
from app.ui.truth import in_words, mark_of, true_marks
from probes import from_hf
from probes.errors import OptionError
from probes.planted.certify.certificate import CHECKS
from probes.planted.record import Interval, Question
from probes.planted.registry import build, tasks

LIGHT = ("logit_lens", "voids", "residual interchange", "controls")
BENCH = Path(__file__).parents[1] / "benchmarks" / "bench_depth.py"


@pytest.fixture(scope="module")
def ran() -> Ran:
    return run_bench([Job("A1", 0, LIGHT), Job("A3", 0, LIGHT)], processes=1)


def test_two_runs_have_one_digest_and_the_oracle_is_right(ran: Ran) -> None:
    again = run_bench([Job("A3", 0, LIGHT)], processes=1)
    assert again.digest == digest([answer for answer in ran.answers if answer.task == "A3@0"])
    assert {record.task for record in ran.records} == {"A1", "A3"}
    assert all(record.certificate["agrees"] for record in ran.records)
    oracle = ran.scored.summary.query("method == 'control: oracle'")
    assert oracle["error"].fillna(0).eq(0).all()
    assert oracle["false_positive"].fillna(0).eq(0).all()
    assert ran.scored.summary.query("method == 'control: always answers'")["false_positive"].fillna(1).eq(1).all()


def test_processes_answer_as_one_does(ran: Ran) -> None:
    assert run_bench([Job("A1", 0, LIGHT), Job("A3", 0, LIGHT)], processes=2).digest == ran.digest


def test_what_few_families_are_asked_is_asked_at_further_seeds_and_nothing_else_there() -> None:
    jobs = further_jobs(("compiled",), LIGHT)
    assert further_jobs(("noised", "trained"), LIGHT) == []
    assert all(job.methods == LIGHT and len(job.kinds) == 1 for job in jobs)
    for kind, names in FURTHER.items():
        own = {(job.task, job.seed) for job in jobs if job.kinds == (kind,)}
        clusters = {(name[0], seed) for name, seed in own} | {(name[0], 0) for name in names}
        assert len(clusters) >= MIN_CLUSTERS
        assert all(kind in kinds_asked()[f"{name}@0"] for name in names)
        assert any(q.truth for name in names for q in build(name).record.questions if q.kind == kind)
    one = run_bench([Job("M1", 1, ("layer_programs", "controls"), ("order",))], processes=1)
    assert {question.kind for record in one.records for question in record.questions} == {"order"}
    assert {answer.question for answer in one.answers} == {"order"}
    assert one.scored.summary["kind"].eq("order").all()


def test_a_saved_run_reads_back_and_has_a_page(ran: Ran, tmp_path: Path) -> None:
    folder = ran.save(tmp_path / "run")
    back = Ran.load(folder)
    assert (back.digest, back.notes) == (ran.digest, ran.notes)
    assert [record.task for record in back.records] == [record.task for record in ran.records]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "necessary, not sufficient" in page
    assert ran.digest in page
    assert "How many layers off" in page
    assert len(pd.read_parquet(folder / "tables" / "rows.parquet")) == len(ran.answers)
    with pytest.raises(OptionError, match="no run"):
        Ran.load(tmp_path)


def test_words_claim_nothing_without_an_interval(ran: Ran) -> None:
    said = " ".join(sentences(ran.scored.summary))
    assert "too few clusters for an interval" in said
    assert "nearer than" not in said
    assert "abstains" not in said
    table = readme_table(ran.scored.summary)
    assert "| logit_lens | lens | ± 0.0" in table
    assert not worst(ran.scored.rows)["method"].str.startswith("control").any()


def test_each_analysis_is_said_what_it_cannot_tell(ran: Ran, tmp_path: Path) -> None:
    assert set(CANNOT_TELL) == set(ADAPTED)
    page = method_list(ran.scored.summary)
    assert all(f"### {title}" in page for title in (SHIPPED[name][1] for name in ADAPTED))
    assert "- logit_lens, lens, compiled: off by 0.00 layers" in page
    write_between = runpy.run_path(str(BENCH))["write_between"]
    written = tmp_path / "page.md"
    written.write_text("above\n<!-- depth: begin -->\nold\n<!-- depth: end -->\nbelow\n")
    write_between(written, "new")
    assert written.read_text() == "above\n<!-- depth: begin -->\nnew\n<!-- depth: end -->\nbelow\n"
    written.write_text("above")
    with pytest.raises(OptionError, match="no markers"):
        write_between(written, "new")


def test_files_for_others_hold_no_truth(tmp_path: Path) -> None:
    task = build("A1", 0)
    folder = export([task], tmp_path / "out")
    assert exported(folder) == ["A1@0"]
    own = folder / "A1@0"
    questions = json.loads((own / "questions.json").read_text())
    assert {question["key"] for question in questions} == {question.key for question in task.record.questions}
    text = "".join(path.read_text() for path in own.glob("*.json"))
    assert not {"truth", "certificate", "note", "planted"} & set(text.replace('"', " ").split())
    prompt = json.loads((own / "prompts.json").read_text())[0]
    assert prompt["positions"]["ask"] == len(prompt["tokens"]) - 1
    with pytest.raises(OptionError, match=r"answers\*.json"):
        handed_in(folder)
    (folder / "answers-me.json").write_text(
        json.dumps(
            [{"method": "me", "task": "A1@0", "question": "lens:ask", "decision": "answered", "estimate": [6, 6]}]
        )
    )
    answers = handed_in(folder)
    assert score(answers, records=[task.record]).rows["error"].item() == 0
    (folder / "answers-you.json").write_text("[{}]")
    with pytest.raises(OptionError, match=r"answers-you\.json"):
        handed_in(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(OptionError, match="something other"):
        export([task], tmp_path / "full")


def command(*flags: str) -> None:
    previous, sys.argv = sys.argv, [str(BENCH), *flags]
    try:
        runpy.run_path(str(BENCH), run_name="__main__")
    finally:
        sys.argv = previous


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tier", "toy"), "tier"), (("--methods", "magic"), "method"), (("--seeds", "x"), "dev, test"), (("score",), "needs a folder"),
        (("score", "nowhere"), "no exported tasks"), (("--tier", "trained", "--quick"), "no task"),
    ],
)  # fmt: skip
def test_flags_that_mean_nothing_are_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        command(*flags)


def test_quick_tasks_exist_and_test_seeds_follow_from_the_release() -> None:
    assert {name[0] for name in QUICK} == {name[0] for name in tasks("compiled")} - {"A", "B", "H", "I", "L"}
    kinds = kinds_asked()
    assert set.union(*(kinds[f"{name}@0"] for name in QUICK)) == set(CHECKS)
    assert chosen_tasks(("compiled", "noised", "trained"), (), quick=True) == sorted(QUICK)
    assert seed_of_release("v1", "A1") != seed_of_release("v2", "A1")
    assert 0 <= seed_of_release("v1", "A1") < 2**31


def test_a_task_without_a_certificate_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from probes import planted
    from probes.errors import ModelError

    def refuse(name: str, seed: int = 0) -> None:
        raise ModelError("exhaustive intervention does not give the truth")

    monkeypatch.setattr(planted, "task", refuse)
    left = run_bench([Job("A1", 0, LIGHT)], processes=1)
    assert (left.answers, left.records) == ((), ())
    assert "A1@0 is left out" in left.notes[0]


def test_size_alone_does_not_say_who_takes_part() -> None:
    task = build("A2", 0)
    answers = control_answers(task, from_hf(task.module, ref=task.ref))
    rows = score(answers, records=[task.record]).rows
    assert rows.query("method == 'control: largest update' and kind == 'nodes'")["auroc"].item() < 0.75


def test_the_truth_is_drawn_beside_the_profiles() -> None:
    marks = true_marks("planted:A2@0")
    names = [mark.name for mark in marks]
    assert "readable attribute at r" in names
    lens = marks[names.index("lens at ask")]
    assert lens.layers == (10,)
    assert "lens at ask 10" in in_words(marks)
    assert true_marks("smollm2-135m") == ()
    assert true_marks("planted:Z9@0") == ()
    assert mark_of(Question("pivot", None)) is None
    assert mark_of(Question("necessary", Interval(-1, -1), position="e")) is None, "the embedding is below the axis"
    table = pd.DataFrame({"layer": range(12), "value": 0.5})
    panels = [Panel("depth", "share", (Curve("run", "#000000", table, 12),))]
    plain, marked = (depth_figure(panels, 12, [], "light", truth=truth) for truth in ((), marks))
    assert len(marked.data) == len(plain.data) + len(marks)
    drawn = next(trace for trace in marked.data if trace.name == "readable attribute at r")
    assert list(drawn.y) == list(range(4, 12))


def test_a_digest_tells_answers_apart_by_what_is_chosen() -> None:
    one, two = (Answer("m", "A1@0", "void", "answered", chosen=frozenset({layer})) for layer in "12")
    assert digest([one]) != digest([two])
    assert json.loads(to_json([one]))[0]["chosen"] == ["1"]
