"""Scores of answers, computed by hand; controls at their analytic values."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest

from analyses.ground_truth import controls, measures
from analyses.ground_truth.answers import Answer, digest, from_json, to_json
from analyses.ground_truth.score import layer_of, score
from analyses.ground_truth.spans import longest_run
from probes.errors import OptionError
from probes.planted.record import Interval, Question, Record

CANDIDATES = ("0.0", "0.1", "1.0", "1.1", "mlp.0", "mlp.1")


def record(task: str = "A1", *questions: Question, layers: int = 8, tier: str = "compiled", seed: int = 0) -> Record:
    return Record(task, tier, seed, {"layers": layers}, {"ask": -1}, {}, {"plain": 1.0}, questions)  # type: ignore[arg-type]


def lens(layer: int) -> Question:
    return Question("lens", Interval(layer, layer), position="ask")


def test_errors_and_bounds_by_hand() -> None:
    truth = Interval(2, 6)
    assert measures.layer_errors((3, 6), truth) == (1, 0)
    assert measures.layer_error((1, 3), truth) == 3
    assert measures.layer_error((4, nan), truth) == 2
    assert measures.covered((1, 7), (2, 9), truth) == 0.5
    assert measures.covered((1, nan), (2, nan), truth) == 1
    assert isnan(measures.covered((nan, nan), (nan, nan), truth))
    assert (
        measures.width(
            (1, 5),
            (4, 6),
        )
        == 2
    )
    # Widths 3 and 1; the truth 2 lies inside the first, 6 is one above the second: 2 / 0.1 * 1 is added.
    assert measures.interval_score((1, 4), (4, 5), truth, 0.9) == pytest.approx((3 + 1 + 20) / 2)


def test_ranking_by_hand() -> None:
    scores = {"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}
    assert measures.auroc(scores, {"a", "d"}, scores) == 0.5
    assert measures.auroc(scores, {"b"}, scores) == pytest.approx((1 + 0.5) / 3)
    assert measures.average_precision(scores, {"a", "b"}, scores) == pytest.approx((1 + 2 / 3) / 2)
    # Who is not scored comes last, level with the others who are not.
    assert measures.auroc({"a": 1.0}, {"b"}, {"a", "b", "c"}) == 0.25
    assert isnan(measures.auroc(scores, set(), scores))
    assert isnan(measures.auroc(scores, set(scores), scores))


def test_sets_by_hand() -> None:
    assert measures.f1({"a", "b"}, {"b", "c", "d"}) == pytest.approx(2 / 5)
    assert measures.jaccard({"a", "b"}, {"b", "c", "d"}) == 0.25
    assert measures.f1(set(), {"a"}) == 0
    assert isnan(measures.jaccard(set(), set()))


def test_a_row_of_layers() -> None:
    truth = record("A1", Question("readable", Interval(2, 7), concept="c", position="r"))
    answer = Answer("m", "A1@0", "readable:c:r", "answered", (4, 7), (2, nan), (5, nan))
    (row,) = score([answer], records=[truth]).rows.to_dict("records")
    assert (row["error"], row["error_share"], row["within_1"], row["bias_first"], row["bias_last"]) == (
        2,
        0.25,
        0,
        2,
        0,
    )
    assert (row["covered"], row["width"], row["interval_score"], row["miss"]) == (1, 3, 3, 0)
    # The constant says 3.5 to 7, which is 1.5 off.
    summary = score([answer], records=[truth]).summary.iloc[0]
    assert summary["skill"] == pytest.approx(1 - 2 / 1.5)
    assert isnan(summary["skill_low"]), "one cluster supports no interval"


def test_rows_of_sets_and_of_nothing() -> None:
    questions = (
        Question("nodes", frozenset({"0.1", "mlp.1"}), candidates=CANDIDATES),
        Question("void", frozenset(), candidates=("0", "1")),
        Question("moved", frozenset({"1.0"}), position="r", to="ask", candidates=CANDIDATES),
        Question("mending", frozenset({"3->1"}), candidates=("3->1", "2->1"), ranking_only=True),
        Question("pivot", None),
    )
    answers = [
        Answer("m", "A1@0", "nodes", "answered", scores={"0.1": 2.0, "1.1": 1.0}, chosen=frozenset({"0.1", "1.1"})),
        Answer("m", "A1@0", "void", "answered", chosen=frozenset({"1"})),
        Answer("m", "A1@0", "moved:r>ask", "answered", scores={"0.1": 2.0, "1.0": 1.0}),
        Answer("m", "A1@0", "mending", "answered", scores={"3->1": 0.4, "2->1": 0.1}),
        Answer("m", "A1@0", "pivot", "none"),
    ]
    rows = score(answers, records=[record("A1", *questions)]).rows.set_index("question")
    assert rows.loc["nodes", "f1"] == 0.5
    assert rows.loc["nodes", "jaccard"] == pytest.approx(1 / 3)
    assert rows.loc["void", "false_positive"] == 1
    assert rows.loc["pivot", "false_positive"] == 0
    assert isnan(rows.loc["void", "miss"])
    assert rows.loc["moved:r>ask", "error"] == 1, "the best named head is one block early"
    assert rows.loc["mending", "auroc"] == 1
    assert isnan(rows.loc["mending", "f1"]), "only the order is asked for"


def test_none_where_there_is_something_is_a_miss_and_declining_is_no_claim() -> None:
    something, empty = lens(3), Question("pivot", None)
    answers = [
        Answer("a", "A1@0", "lens:ask", "none"), Answer("a", "A1@0", "pivot", "declined"),
        Answer("b", "A1@0", "lens:ask", "declined"), Answer("b", "A1@0", "pivot", "answered", (1, 2)),
    ]  # fmt: skip
    rows = score(answers, records=[record("A1", something, empty)]).rows.set_index(["method", "question"])
    assert rows.loc[("a", "lens:ask"), "miss"] == 1
    assert rows.loc[("b", "lens:ask"), "miss"] == 1
    assert rows.loc[("b", "lens:ask"), "declined"] == 1
    assert rows.loc[("a", "pivot"), "false_positive"] == 0
    assert rows.loc[("b", "pivot"), "false_positive"] == 1


def test_what_a_tier_asks_and_a_method_leaves_out_counts_as_declined() -> None:
    truths = [record("A1", lens(3)), record("A2", lens(4)), record("T1", lens(5), tier="trained")]
    answers = [Answer("m", "A1@0", "lens:ask", "answered", (3, 3)), Answer("m", "T1@0", "lens:ask", "answered", (1, 1))]
    rows = score(answers, "compiled", truths).rows
    assert rows[["task", "decision"]].to_numpy().tolist() == [["A1@0", "answered"], ["A2@0", "declined"]]
    assert score(answers, "compiled", truths).summary["miss"].tolist() == [0.5]


def test_intervals_come_from_six_clusters_on() -> None:
    truths = [record(f"{letter}1", lens(3)) for letter in "ABCDEF"]
    answers = [Answer("m", f"{letter}1@0", "lens:ask", "answered", (3 + i, 3 + i)) for i, letter in enumerate("ABCDEF")]
    summary = score(answers, records=truths).summary.iloc[0]
    assert summary["error"] == 2.5
    assert 0 < summary["error_low"] < 2.5 < summary["error_high"] < 5
    assert isnan(score(answers[:5], records=truths).summary.iloc[0]["error_low"])


def test_the_oracle_is_right_and_always_answering_never_abstains() -> None:
    questions = (
        lens(3), Question("pivot", None), Question("nodes", frozenset({"0.1"}), candidates=CANDIDATES),
        Question("void", frozenset(), candidates=("0", "1")),
    )  # fmt: skip
    truth = record("A1", *questions)
    answers = [control(truth, q) for control in (controls.oracle, controls.always) for q in questions]
    rows = score(answers, records=[truth]).rows.set_index(["method", "kind"])
    oracle, always = rows.loc["control: oracle"], rows.loc["control: always answers"]
    assert oracle.loc["lens", "error"] == 0
    assert (oracle.loc["nodes", "auroc"], oracle.loc["nodes", "f1"]) == (1, 1)
    assert oracle["false_positive"].dropna().tolist() == [0, 0]
    assert always["false_positive"].dropna().tolist() == [1, 1]
    assert always.loc["nodes", "auroc"] == 0.5


def test_a_uniform_draw_against_a_uniform_truth_is_off_by_its_analytic_value() -> None:
    n_layers, draws = 12, 4000
    errors = [
        measures.layer_error(controls.uniform(record("A1", lens(i % n_layers), layers=n_layers), lens(i % n_layers), i).estimate, Interval(i % n_layers, i % n_layers))
        for i in range(draws)
    ]  # fmt: skip
    expected = (n_layers**2 - 1) / (3 * n_layers)
    assert np.mean(errors) == pytest.approx(expected, abs=4 * np.std(errors) / draws**0.5)


def test_the_constant_against_a_uniform_truth_is_off_by_its_analytic_value() -> None:
    n_layers = 12
    truths = [record("A1", lens(layer), layers=n_layers) for layer in range(n_layers)]
    errors = [measures.layer_error(controls.constant(t, t.questions[0]).estimate, t.questions[0].truth) for t in truths]  # type: ignore[arg-type]
    assert np.mean(errors) == pytest.approx(n_layers / 4)


def test_answers_survive_json_and_the_digest_ignores_order_and_seconds() -> None:
    one = Answer("m", "A1@0", "lens:ask", "answered", (3, 3), (2, 2), (nan, 4), seconds=1.5)
    two = Answer("m", "A1@0", "nodes", "answered", scores={"0.1": 0.5}, chosen=frozenset({"0.1"}), forwards=3)
    assert [answer.record() for answer in from_json(to_json([one, two]))] == [one.record(), two.record()]
    slower = Answer("m", "A1@0", "lens:ask", "answered", (3, 3), (2, 2), (nan, 4), seconds=9.0)
    assert digest([one, two]) == digest([two, slower])
    later = Answer("m", "A1@0", "lens:ask", "answered", (4, 4), (2, 2), (nan, 4))
    assert digest([one, two]) != digest([later, two])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Answer("m", "A1@0", "q", "perhaps"), "decision"),  # type: ignore[arg-type]
        (lambda: Answer("m", "A1@0", "q", "answered"), "with nothing"),
        (lambda: Answer("m", "A1@0", "q", "none", level=95), "no share"),
        (lambda: from_json('{"method": "m"}'), "no list"),
        (lambda: from_json('[{"method": "m", "layer": 3}]'), "entry of an answer"),
        (lambda: from_json('[{"method": "m"}]'), "no answer"),
        (lambda: score([Answer("m", "A9@0", "lens:ask", "none")], records=[record("A1", lens(3))]), "A9@0"),
        (lambda: score([Answer("m", "A1@0", "lens:end", "none")], records=[record("A1", lens(3))]), "lens:end"),
        (lambda: score([Answer("m", "A1@0", "lens:ask", "none")] * 2, records=[record("A1", lens(3))]), "twice"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused(wrong, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match=said):
        wrong()


def test_the_longest_run_of_effects() -> None:
    effects = np.array([[1, 1, 0, 0.5, 0.9, 0.7], [0, 0, 0, 0, 0, 0.4], [1, 0, 1, 0, 1, 0]])
    runs = longest_run(effects)
    assert runs[0].tolist() == [3, 5]
    assert np.isnan(runs[1]).all()
    assert runs[2].tolist() == [0, 0], "of equal runs the earlier"


def test_layers_of_nodes() -> None:
    assert [layer_of(node) for node in ("7.2", "mlp.4", "attn.3")] == [7, 4, 3]
