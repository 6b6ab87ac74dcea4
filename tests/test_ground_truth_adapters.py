"""One test an adapter: from tables, by hand, to the answer; and the ceiling and the runs on a planted model."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan, nan

import numpy as np
import pandas as pd
import pytest
from torch import nn

from analyses.ground_truth.adapters import back_patching as back_patching_adapter
from analyses.ground_truth.adapters import latent_language as latent_adapter
from analyses.ground_truth.adapters.adapter import examples_of
from analyses.ground_truth.adapters.logit_lens import settled
from analyses.ground_truth.answers import Answer
from analyses.ground_truth.contestants import ADAPTED, adapter_of, answer_task, answers_of, names, runs_of
from analyses.ground_truth.score import score
from analyses.registry import ANALYSES
from analyses.results.result import Result
from probes import ActivationStore, from_hf
from probes.errors import OptionError
from probes.planted.record import Interval, Kind, Question, Record
from probes.planted.registry import build
from probes.planted.task import Example, PlantedTask

LAYERS = 6


def task_of(*questions: Question, examples: int = 8) -> PlantedTask:
    record = Record("A1", "compiled", 0, {"layers": LAYERS}, {"r": 1, "ask": -1}, {"attribute": 4}, {}, questions)
    made_up = tuple(
        Example(
            (0, i + 1, 9), answer=7, partner=(0, i + 2, 9), partner_answer=8, values={"attribute": i % 4}, group=str(i)
        )
        for i in range(examples)
    )
    return PlantedTask(record, nn.Identity(), None, made_up)


def result(analysis: str, tables: Mapping[str, pd.DataFrame], **options: object) -> Result:
    counts = {"prompts": 8, "tokens": 24, "forwards": 8, "held_before": 0, "intervention_forwards": 2}
    return Result(analysis, options, dict(tables), {"counts": counts, "seconds": 3.0})


def only(answers: list[Answer]) -> Answer:
    (answer,) = answers
    return answer


def depths(low: float = 0.7, decodable: bool = True) -> dict[str, pd.DataFrame]:
    accuracy = [0.5, 0.5, 0.9, 0.96, 1.0, 0.5]
    return {
        "scores": pd.DataFrame({"layer": range(LAYERS), "accuracy": accuracy}),
        "depths": pd.DataFrame({
            "peak_accuracy_low": [low], "decodable": [decodable], "majority": [0.5], "depth_90": [3 / LAYERS],
            "depth_90_low": [2 / LAYERS], "depth_90_high": [4 / LAYERS],
        }),
    }  # fmt: skip


def test_concept_depth_answers_with_its_depth_and_the_last_layer_as_high() -> None:
    task = task_of(Question("readable", Interval(2, 4), concept="attribute", position="r"))
    answer = only(answers_of(result("concept_depth", depths()), task))
    assert (answer.decision, answer.estimate) == ("answered", (3, 4))
    assert (answer.low[0], answer.high[0]) == pytest.approx((2, 4))
    assert isnan(answer.low[1])
    assert (answer.seconds, answer.forwards) == (3.0, 10)
    assert only(answers_of(result("concept_depth", depths(decodable=False)), task)).decision == "none"
    assert only(answers_of(result("concept_depth", depths(low=nan)), task)).decision == "declined"


def test_probes_are_shown_prompts_that_end_where_the_concept_is_asked_for() -> None:
    task = task_of(Question("readable", Interval(2, 4), concept="attribute", position="r"))
    (run,) = runs_of("concept_depth", task)
    assert [prompt.tokens for prompt in run.prompts[:2]] == [(0, 1), (0, 2)]
    assert [prompt.fields["label"] for prompt in run.prompts[:4]] == [0, 0, 1, 1]


def test_the_lens_answers_with_the_median_layer_from_which_the_answer_stays() -> None:
    tops = [[1, 7, 2, 7, 7, 7], [7, 7, 7, 7, 7, 7], *[[1, 1, 1, 1, 7, 7]] * 6]
    rows = [(prompt, layer, top) for prompt, row in enumerate(tops) for layer, top in enumerate(row)]
    read = pd.DataFrame(rows, columns=["prompt", "layer", "top_token_id"])
    assert settled(read, [7] * 8).tolist() == [3, 0, *[4] * 6]
    assert settled(read, [1] * 8).tolist() == [np.inf] * 8
    task = task_of(Question("lens", Interval(4, 4), position="ask"))
    answer = only(answers_of(result("logit_lens", {"read": read}), task))
    assert answer.estimate == (4, 4)
    assert answer.low[0] <= 4 <= answer.high[0]
    other = read.assign(top_token_id=1)
    assert only(answers_of(result("logit_lens", {"read": other}), task)).decision == "none"


def test_latent_languages_answer_with_the_run_of_layers_that_lead() -> None:
    lead = pd.DataFrame({
        "layer": range(LAYERS), "leads": [False, True, True, True, False, True],
        "dominance_low": [0.1, 0.4, 0.6, 0.7, 0.2, 0.1], "dominance_high": [0.4, 0.7, 0.9, 0.9, 0.6, 0.3],
    })  # fmt: skip
    task = task_of(Question("pivot", Interval(1, 3), position="ask"))
    answer = only(answers_of(result("latent_language", {"lead": lead}), task))
    assert (answer.estimate, answer.low, answer.high) == ((1, 3), (1, 3), (2, 4))
    silent = lead.assign(leads=False)
    assert only(answers_of(result("latent_language", {"lead": silent}), task)).decision == "none"
    assert latent_adapter._other({}, task.examples[0], None) == 8, "without languages the partner's answer may lead"


def grid(successes: int, control_high: float) -> dict[str, pd.DataFrame]:
    cells = [(3, 0), (4, 1), (5, 3)]
    rows = [
        (prompt, source, target, (source, target) != (5, 3) and prompt < successes, False)
        for prompt in range(8) for source, target in cells
    ]  # fmt: skip
    rates = [("back_patch", 0.7, 1.0), ("forward", 0.0, control_high), ("noise", 0.0, 0.3)]
    return {
        "grid": pd.DataFrame(rows, columns=["prompt", "source_layer", "target_layer", "success", "baseline_success"]),
        "control_rates": pd.DataFrame(rates, columns=["variant", "held_out_low", "held_out_high"]).assign(
            set="incorrect"
        ),
    }


def test_back_patching_names_jumps_that_mend_more_often_than_not() -> None:
    task = task_of(Question("mending", frozenset({"3->1", "4->2"}), candidates=("3->1", "4->2", "5->4")))
    answer = only(answers_of(result("back_patching", grid(8, 0.3)), task))
    assert answer.chosen == {"3->1", "4->2"}
    assert answer.scores == {"3->1": 1.0, "4->2": 1.0, "5->4": 0.0}
    assert only(answers_of(result("back_patching", grid(8, 0.8)), task)).decision == "none", "level with a control"
    right = grid(8, 0.3)
    right["grid"]["baseline_success"] = True
    assert only(answers_of(result("back_patching", right), task)).decision == "none", "nothing to mend"
    assert back_patching_adapter.PROMPTS >= 8, "below that one success rate is not told from one half"


def test_voids_name_blocks_that_no_token_of_the_class_uses() -> None:
    rows = [(1, "c1", 0, True), (2, "w3", 0, True), (1, "c1", 1, True), (2, "w3", 1, False), (1, "c1", 2, False),
            (2, "w3", 2, False), (0, "<bos>", 2, True)]  # fmt: skip
    activity = pd.DataFrame(rows, columns=["position", "token", "layer", "active"])
    whole = Question("void", frozenset({"2"}), candidates=("0", "1", "2"))
    classes = Question("void", frozenset({"1:function"}), candidates=("1:function", "1:content"), subset="all")
    task = task_of(whole, classes)
    both = answers_of(result("voids", {"activity": activity}, delta="cosine"), task)
    assert [answer.method for answer in both] == ["voids (cosine)"] * 2
    assert both[0].chosen == {"2"}, "the first token, whose norm is massive, does not count"
    assert both[0].scores == {"0": 0.0, "1": 0.5, "2": 1.0}
    assert both[1].chosen == {"1:function"}


def test_depth_use_tells_removal_from_writing_and_erasure_by_half_of_the_most() -> None:
    proxies = pd.DataFrame({
        "layer": range(3), "jsd_block": [0.6, 0.001, 0.3], "relative_norm_block": [1.0, 0.5, 0.001], "jsd_mlp": [0.5, 0.0, 0.1],
        "jsd_attn": [0.1, 0.0, 0.2], "relative_norm_mlp": 0.1, "relative_norm_attn": 0.2,
    })  # fmt: skip
    change = {(1, 0): 1.0, (1, 1): 0.9, (1, 2): 0.1, (2, 0): 0.0, (2, 1): 0.0, (2, 2): 0.6}
    erasure = pd.DataFrame(
        [(prompt, layer, position, value) for prompt in range(8) for (position, layer), value in change.items()],
        columns=["prompt", "layer", "position", "answer_change"],
    )
    task = task_of(
        Question("void", frozenset({"2"}), candidates=("0", "1", "2")),
        Question("nodes", frozenset({"mlp.0"}), candidates=("0.0", "2.1", "mlp.0")),
        Question("necessary", Interval(-1, 0), position="r"), Question("necessary", Interval(1, 1), position="ask"),
    )  # fmt: skip
    answers = {
        (a.method, a.question): a
        for a in answers_of(result("depth_use", {"proxies": proxies, "erasure": erasure}), task)
    }
    removal = answers["depth_use (removal)", "void"]
    assert removal.chosen is None, "a block that nobody reads costs nothing either"
    assert max(removal.scores, key=lambda block: removal.scores[block]) == "1"
    assert answers["depth_use (writing)", "void"].chosen == {"2"}
    assert answers["depth_use (removal)", "nodes"].scores == {"0.0": 0.1, "2.1": 0.2, "mlp.0": 0.5}
    assert answers["residual_erasure", "necessary:r"].estimate == (-1, 0)
    assert answers["residual_erasure", "necessary:ask"].estimate == (1, 1)


def test_nodes_are_those_whose_interval_leaves_out_zero() -> None:
    rng = np.random.default_rng(0)
    rows = [(p, "head", 0, 1, -1, 2 + rng.normal()) for p in range(8)] + [
        (p, "mlp", 2, -1, -1, 0.1 * (-1) ** p) for p in range(8)
    ]
    relevance = pd.DataFrame(rows, columns=["prompt", "kind", "layer", "head", "position", "score"])
    relevance["source"] = np.where(relevance["kind"] == "mlp", "mlp 2", "0.1")
    bounds = {"ablation": [0.5, -3.0], "ablation_low": [-0.1, -4.0], "ablation_high": [1.0, -2.0]}
    heads = pd.DataFrame({"layer": [0, 1], "head": [1, 0], **bounds})
    mlps = pd.DataFrame({"layer": [2], "ablation": [1.0], "ablation_low": [0.9], "ablation_high": [1.1]})
    task = task_of(Question("nodes", frozenset({"0.1"}), candidates=("0.1", "1.0", "mlp.2")))
    tables = {"relevance": relevance, "heads": heads, "mlps": mlps}
    answers = {answer.method: answer for answer in answers_of(result("contextual_decomposition", tables), task)}
    assert set(answers) == {"cdt", "mean_ablation"}
    assert answers["cdt"].chosen == {"0.1"}
    assert answers["mean_ablation"].chosen == {"1.0", "mlp.2"}
    assert answers["mean_ablation"].scores == {"0.1": 0.5, "1.0": 3.0, "mlp.2": 1.0}


def test_channels_are_the_flagged_pairs() -> None:
    table = pd.DataFrame({
        "kind": ["q", "v"], "source_layer": [0, 1], "source_head": [2, 3], "target_layer": [4, 5], "target_head": [1, 0],
        "z": [9.0, 1.0], "flagged": [True, False],
    })  # fmt: skip
    task = task_of(Question("channel", frozenset({"0.2->4.1:q"}), candidates=("0.2->4.1:q", "1.3->5.0:v")))
    answer = only(answers_of(result("communication_channels", {"composition": table}), task))
    assert answer.chosen == {"0.2->4.1:q"}
    assert answer.scores == {"0.2->4.1:q": 9.0, "1.3->5.0:v": 1.0}


def test_norms_are_sites_that_cost_loss_or_layers_at_which_position_0_is_massive() -> None:
    effects = pd.DataFrame({
        "site": ["attn", "mlp", "final"], "layer": [0, 0, 1], "delta_ce": [0.0, 0.1, 2.0], "ci_low": [-0.1, -0.1, 1.0],
        "ci_high": [0.1, 0.3, 3.0],
    })  # fmt: skip
    norm = [1.0, 300, 300, 11, 1, 1]
    first = pd.DataFrame({"layer": range(LAYERS), "position_class": "first", "norm": norm, "ci_low": [0.9, 290, 290, 9, 1, 1], "ci_high": [1.1, 310, 310, 12, 1, 1]})  # fmt: skip
    other = pd.DataFrame({"layer": range(LAYERS), "position_class": "other", "norm": 1.0})
    task = task_of(
        Question("norm", frozenset({"final"}), candidates=("attn.0", "mlp.0", "final")),
        Question("norm", Interval(1, 3), position="bos"),
    )
    tables = {"freeze_effect": effects, "stream": pd.concat([first, other])}
    sites, massive = answers_of(result("norm_removal", tables), task)
    assert (sites.chosen, sites.scores) == ({"final"}, {"attn.0": 0.0, "mlp.0": 0.1, "final": 2.0})
    assert (massive.estimate, massive.low, massive.high) == ((1, 3), (1, 2), (1, 3))


def test_examples_are_spread_over_all_there_are() -> None:
    task = task_of(examples=8)
    assert [example.tokens[1] for example in examples_of(task, n=4)] == [1, 3, 5, 7]


def test_what_has_no_adapter_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match="adapter"):
        runs_of("two_hop", task_of())
    with pytest.raises(OptionError, match="method"):
        answer_task(task_of(), None, ActivationStore(tmp_path), ("probing",))  # type: ignore[arg-type]
    assert {"voids", "controls"} <= set(names())


@pytest.fixture(scope="module")
def planted() -> PlantedTask:
    return build("A1", 0)


def test_every_contestant_on_a_planted_model(planted: PlantedTask, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = from_hf(planted.module, tokenizer=planted.tokenizer, ref=planted.ref)
    light = ("logit_lens", "latent_language", "voids", "residual interchange", "controls")
    refused: list[str] = []
    answers = answer_task(planted, model, ActivationStore(tmp_path), light, refused.append)
    assert refused == []
    rows = score(answers, records=[planted.record]).rows.set_index(["method", "kind"]).sort_index()
    kinds: tuple[Kind, ...] = ("necessary", "sufficient")
    for kind in kinds:
        assert rows.loc[("residual interchange", kind), "error"].dropna().eq(0).all(), "the ceiling reaches the truth"
    assert rows.loc[("logit_lens", "lens"), "error"].item() == 0
    assert rows.loc[("latent_language", "pivot"), "false_positive"].item() == 0
    assert rows.loc[("control: largest update", "nodes"), "auroc"].item() < 0.75, (
        "size alone does not say who takes part"
    )


def test_a_tuned_lens_is_fitted_on_what_it_reads_and_read_as_the_logit_lens() -> None:
    task = task_of(Question("lens", Interval(4, 4), position="ask"))
    rows = [(prompt, layer, 7 if layer >= 2 else 1, "tuned") for prompt in range(8) for layer in range(LAYERS)]
    read = pd.DataFrame(rows, columns=["prompt", "layer", "top_token_id", "lens"])
    answer = only(answers_of(result("lenses", {"read": read}), task))
    assert (answer.method, answer.estimate) == ("lenses (tuned)", (2, 2))
    (run,) = runs_of("lenses", task)
    assert run.analysis.fit_on == "prompts", "planted words occur in no shipped sentence"  # type: ignore[attr-defined]


def moved(
    component: str, layer: int, head: int, recovery: float, role: str = "r", denoise: bool = True
) -> tuple[object, ...]:
    return ("denoise" if denoise else "noise", component, layer, head, role, recovery, recovery - 0.25, 1.0)


def test_causal_patching_names_the_part_that_brings_half_of_the_gap_first() -> None:
    nodes = ("1.0", "1.1", "mlp.1", "mlp.2", "4.0")
    task = task_of(
        Question("written", frozenset({"mlp.2"}), concept="attribute", position="r", candidates=nodes),
        Question("moved", frozenset({"4.0"}), concept="attribute", position="r", to="ask", candidates=nodes),
        Question("nodes", frozenset({"mlp.2", "4.0"}), candidates=nodes),
        Question("necessary", Interval(-1, 3), position="r"),
        Question("sufficient", None, position="r"),
    )
    table = pd.DataFrame(
        [
            moved("z", 1, 0, 0.2), moved("mlp_out", 1, -1, 0.4), moved("mlp_out", 2, -1, 0.9), moved("mlp_out", 3, -1, 1.0),
            moved("z", 4, 0, 1.0, "ask"), moved("mlp_out", 5, -1, 1.0, "ask"), moved("z", 1, 1, 0.5, denoise=False),
        ],
        columns=["direction", "component", "layer", "head", "role", "recovery", "ci_low", "ci_high"],
    )  # fmt: skip
    streams = [
        (
            "pair",
            direction,
            component,
            layer,
            pair,
            "r",
            float(direction == "noise" and layer + (component == "resid_post") <= 4),
        )
        for direction in ("noise", "denoise")
        for component in ("resid_pre", "resid_post")
        for layer in range(LAYERS)
        for pair in range(8)
    ]
    columns = ["source", "direction", "component", "layer", "pair", "role", "recovery"]
    tables = {"map": table, "cells": pd.DataFrame(streams, columns=columns)}
    written, carried, taking_part, necessary, sufficient = answers_of(result("causal_patching", tables), task)
    assert written.chosen == {"mlp.2"}
    assert written.scores["mlp.2"] > max(score for node, score in written.scores.items() if node != "mlp.2")
    assert carried.chosen == {"4.0"}
    assert taking_part.chosen == {"mlp.1", "mlp.2", "4.0", "1.1"}
    assert (necessary.estimate, necessary.low, necessary.high) == ((-1, 3),) * 3
    assert sufficient.decision == "none"


def test_keys_share_a_subspace_where_their_overlap_is_above_one_half_by_its_interval() -> None:
    task = task_of(Question("subspace", frozenset({"1+4"}), candidates=("0+1", "1+4", "2+3")))
    (run,) = runs_of("depth_use", task)
    assert run.method == "kv_subspaces"
    overlaps = pd.DataFrame({
        "kind": ["k", "k", "k", "v"], "layer_a": [1, 0, 2, 0], "layer_b": [4, 1, 3, 1], "overlap": [0.9, 0.7, 0.1, 1.0],
        "low": [0.8, 0.4, 0.0, 1.0],
    })  # fmt: skip
    tables = {"kv_subspaces": overlaps, "proxies": pd.DataFrame({"layer": [0]})}
    answer = only(answers_of(result("depth_use", tables), task, run.questions))
    assert answer.method == "kv_subspaces"
    assert answer.chosen == {"1+4"}
    assert answer.scores == {"1+4": 0.9, "0+1": 0.7, "2+3": 0.1}


def test_layer_programs_mend_exchange_and_replace() -> None:
    candidates = ("mlp.1+mlp.3", "1.0+3.2", "mlp.1+mlp.2", "2.0+2.1")
    mending = Question("mending", frozenset({"3->1"}), candidates=("3->1", "2->2"))
    order = Question("order", frozenset({"0+1"}), candidates=("0+1", "1+2"))
    redundant = Question("redundant", frozenset({"mlp.1+mlp.3"}), candidates=candidates)
    told = pd.DataFrame({"right": [False] * 12})
    jumps = pd.DataFrame(
        {"kind": ["repeat", "repeat", "skip"], "leave": [4, 3, 1], "enter": [1, 2, 3], "mended": [12, 5, 12]}
    )
    swaps = pd.DataFrame({
        "protocol": ["interchange", "interchange", "replacement"], "i": [0, 1, 1], "j": [1, 2, 0], "kl": [0.01, 2.0, 3.0],
        "delta": [0.0, -0.75, -1.0],
    })  # fmt: skip
    skips = pd.DataFrame({"i": [1, 1], "j": [3, 2], "excess": [-1.0, -0.1], "excess_high": [-1.0, -0.05]})
    for question, table, chosen in (
        (mending, {"jumps": jumps}, {"3->1"}),
        (order, {"swaps": swaps}, {"0+1"}),
        (redundant, {"skips": skips}, None),
    ):
        answer = only(answers_of(result("layer_programs", {**table, "questions": told}), task_of(question)))
        assert answer.chosen == chosen
        named = {"mlp.1+mlp.3", "1.0+3.2"} if chosen is None else chosen
        assert {name for name, score in answer.scores.items() if score == max(answer.scores.values())} == named
    assert set(answer.scores) == set(candidates) - {"2.0+2.1"}
    unsure = result("layer_programs", {"skips": skips.assign(excess_high=0.1), "questions": told})
    assert only(answers_of(unsure, task_of(redundant))).decision == "none"
    right = result("layer_programs", {"jumps": jumps, "questions": ~told})
    assert only(answers_of(right, task_of(mending))).decision == "none"


def test_passage_use_names_the_block_that_takes_from_a_position() -> None:
    own = Question(
        "moved", frozenset({"3.1"}), concept="attribute", position="r", to="ask", candidates=("3.1", "4.0", "mlp.3")
    )
    elsewhere = Question("moved", frozenset({"2.0"}), concept="attribute", position="ask", to="r")
    task = task_of(own, elsewhere)
    (run,) = runs_of("passage_use", task)
    assert run.questions == (own,), "only what stands at the end is read"
    assert run.prompts[0].fields["passage"] == [1, 2]
    assert run.prompts[0].fields["neutral"] == [run.prompts[0].tokens[1] + 1], "the partner's token"
    losses = pd.DataFrame({
        "measure": "knock_out_loss", "layer": range(LAYERS), "mean": [0.0, 0.0, 0.1, 2.0, 0.3, 0.0],
        "low": [0.0, -0.1, -0.1, 1.5, -0.1, 0.0],
    })  # fmt: skip
    masses = pd.DataFrame({"measure": "mass", "layer": range(LAYERS), "mean": 9.0, "low": 8.0})
    answer = only(answers_of(result("passage_use", {"means": pd.concat((masses, losses))}), task, run.questions))
    assert (answer.decision, answer.chosen) == ("answered", None)
    assert answer.scores == {"3.1": 2.0, "4.0": 0.3}
    blind = result("passage_use", {"means": losses.assign(low=-0.1)})
    assert only(answers_of(blind, task, run.questions)).decision == "none"


def test_every_analysis_takes_part() -> None:
    assert set(ANALYSES) == set(ADAPTED)
    assert {adapter_of(name).analysis for name in ADAPTED} == set(ADAPTED)
    with pytest.raises(OptionError, match="adapter"):
        adapter_of("magic")


def test_depth_use_is_not_asked_which_tokens_a_block_is_void_for() -> None:
    blocks = Question("void", frozenset({"1"}), candidates=("0", "1"))
    tokens = Question("void", frozenset({"1:a"}), candidates=("0:a", "1:a"))
    assert adapter_of("depth_use").questions(task_of(blocks)) == [blocks]
    assert adapter_of("depth_use").questions(task_of(tokens)) == []
