"""The benchmark of attribution: what its tables say, by hand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
from planted_kinds import kinds_asked

from analyses.ground_truth.score import family_of
from probes.planted.registry import tasks

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "bench_attribution.py"))


def tables(pearson: float, cpr: float) -> dict[str, pd.DataFrame]:
    numbers = {f"{name}{end}": pearson for name in BENCH["STATISTICS"] for end in ("", "_low", "_high")}
    agreement = pd.DataFrame([{"method": "relp", "kind": kind, **numbers} for kind in ("heads", "mlps")])
    areas = {f"{name}{end}": cpr for name in ("cpr", "cmd") for end in ("", "_low", "_high")}
    cases = pd.DataFrame({"metric": [2.0, 2.1] * 3, "metric_ablated": [0.1, 0.0] * 3})
    return {"agreement": agreement, "areas": pd.DataFrame([{"method": "relp", **areas}]), "cases": cases}


def test_a_table_has_a_line_a_method_and_says_intervals() -> None:
    text = BENCH["markdown"](BENCH["numbers_of"](tables(0.5, 0.9)))
    head, _, line = text.splitlines()
    assert head == (
        "| score | heads: Pearson | heads: ranks | heads: without the ten largest | MLPs: Pearson | MLPs: ranks | CPR | CMD |"
    )
    assert line.startswith("| RelP | 0.50 [0.50, 0.50] |")
    assert line.endswith("| 0.90 [0.90, 0.90] | 0.90 [0.90, 0.90] |")


def test_a_number_over_tasks_is_a_mean_with_an_interval_over_families() -> None:
    numbers = [
        (f"{letter}1", BENCH["numbers_of"](tables(value, value)))
        for letter, value in zip("ABDEFG", (0, 0, 0, 1, 1, 1), strict=True)
    ]
    row = BENCH["over_tasks"](numbers).set_index("column").loc["heads: Pearson"]
    assert row["value"] == 0.5
    assert 0 <= row["low"] < 0.5 < row["high"] <= 1
    few = BENCH["over_tasks"](numbers[:5]).set_index("column").loc["heads: Pearson"]
    assert few[["low", "high"]].isna().all()


def test_a_method_that_tells_no_nodes_apart_agrees_by_nothing() -> None:
    blind = BENCH["numbers_of"](tables(float("nan"), 0.5)).assign(method="lrp")
    both = pd.concat([BENCH["numbers_of"](tables(0.8, 0.5)), blind])
    rows = BENCH["over_tasks"]([("A1", both), ("B1", blind)]).set_index(["method", "column"])["value"]
    assert rows["lrp", "heads: Pearson"] == 0
    assert rows["relp", "heads: Pearson"] == 0.8, "where no effects differ, nobody is asked"
    assert rows["lrp", "CPR"] == 0.5


def test_circuits_are_left_out_where_heads_do_not_carry_the_answer() -> None:
    idle = tables(0.5, 0.9) | {"cases": pd.DataFrame({"metric": [2.0] * 6, "metric_ablated": [2.0, 2.01] * 3})}
    assert not BENCH["numbers_of"](idle)["column"].isin(["CPR", "CMD"]).any()


def test_every_family_that_is_asked_for_nodes_is_compared_once() -> None:
    kinds = kinds_asked()
    asking = {family_of(name) for name in tasks("compiled") if "nodes" in kinds[f"{name}@0"]}
    names = BENCH["TASKS"].split(",")
    assert {family_of(name) for name in names} == asking
    assert len(names) == len(asking)
