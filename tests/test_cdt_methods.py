"""The methods compared by contextual decomposition: their scores, how they are judged, and what is taken away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from tiny import native
from torch import nn

from analyses.contextual_decomposition import ContextualDecomposition
from analyses.contextual_decomposition.ablation import Ablation, without
from analyses.contextual_decomposition.agreement import agreement_tables
from analyses.contextual_decomposition.cases import Case, baseline_of
from analyses.contextual_decomposition.direct_attribution import direct_attribution, direct_of_mlps
from analyses.contextual_decomposition.gradient_scores import Plan, metric_of, read_scores
from analyses.contextual_decomposition.node_effects import mlp_ablation, stream_ablation
from analyses.contextual_decomposition.removal import SHARES, Unit, removal_tables, token_metric
from analyses.contextual_decomposition.scores import PreparedCase
from analyses.contextual_decomposition.token_relevance import pointing_table, span_of
from analyses.results.result import Result
from probes.decomposition import Decomposer, Rules, head
from probes.edits import read
from probes.errors import OptionError, PromptError
from probes.models.backends.native import NativeModel
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import QUIET
from probes.prompts import Prompt
from probes.relevance import relevance_of
from probes.relevance.read import TOKENS

ROWS = ((5, 6, 7, 8), (9, 4, 3, 8), (2, 11, 7, 10))
ALL = ("cdt", "attribution", "relp", "lrp", "ig", "direct")
SMALL = ContextualDecomposition(search_steps=0, random_circuits=0, words="none")


def prompts(n: int) -> list[Prompt]:
    rows = torch.randint(3, 97, (n, 4), generator=torch.Generator().manual_seed(3)).tolist()
    return [Prompt(tuple(row), None, {"answer_tokens": [row[1]], "distractor_tokens": [2]}) for row in rows]


def linear() -> NativeModel:
    """No norms, no MLPs, and keys of zero, so that attention is uniform: the metric is linear in every node."""
    module: Any = make("llama")
    with torch.no_grad():
        for block in module.model.layers:
            block.input_layernorm, block.post_attention_layernorm = nn.Identity(), nn.Identity()
            block.self_attn.k_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        module.model.norm = nn.Identity()
    return NativeModel(module, ref="linear", weights="linear")


def case_without_decomposer(model: Model) -> PreparedCase:
    case = Case(0, ROWS[0], (5,), (7,), ROWS[1:], (0, 1, 2, 3), "length 4")
    return PreparedCase(case, None, baseline_of(model, ROWS[1:]))  # type: ignore[arg-type]


def test_in_a_linear_model_every_method_with_a_baseline_is_the_measured_effect() -> None:
    model = linear()
    one = case_without_decomposer(model)
    scores = read_scores(model, [one], Plan(("attribution", "relp", "lrp", "ig"), "cp"), QUIET)
    heads = [head(layer, h) for layer in range(3) for h in range(4)]
    effects = without(Ablation(model, one.case, one.baseline), heads).numpy()
    streams = stream_ablation(Ablation(model, one.case, one.baseline), (0, 1)).numpy().flatten()
    assert np.abs(effects).max() > 1e-2
    for method in ("attribution", "relp", "ig"):
        assert np.allclose(scores.of_heads(method, heads)[0], effects, atol=1e-5)
        assert np.allclose(scores.of_streams(method, [0], (0, 1))[0], streams, atol=1e-5)
    assert not np.allclose(scores.of_heads("lrp", heads)[0], effects, atol=1e-3)  # its baseline is zero
    zero = read_scores(model, [PreparedCase(one.case, one.prompt, None)], Plan(("attribution", "lrp"), "cp"), QUIET)
    assert np.allclose(zero.of_heads("lrp", heads), zero.of_heads("attribution", heads), atol=1e-5)


def test_relp_is_not_attribution_near_the_prompt_either() -> None:
    """Towards a baseline very near, attribution patching is the effect, and RelP, which is no gradient, is not."""
    model = native("llama")
    one = case_without_decomposer(model)
    assert one.baseline is not None
    read = relevance_of(model, torch.tensor([one.case.tokens]), metric_of(model, one.case), "gradient")
    own = torch.stack([read.values[a][0] for a in sorted(read.values, key=str) if a.point == "mlp_out"])
    near = replace(one.baseline, mlp_out=own + 1e-3 * (one.baseline.mlp_out - own))
    scores = read_scores(model, [PreparedCase(one.case, one.prompt, near)], Plan(ALL, "attnlrp"), QUIET)
    effects = mlp_ablation(Ablation(model, one.case, near), range(3)).numpy()
    size = np.abs(effects).max()
    assert np.allclose(scores.of_layers("attribution", range(3))[0], effects, atol=0.03 * size)
    assert np.abs(scores.of_layers("relp", range(3))[0] - effects).max() > 0.1 * size


def test_integrated_gradients_of_tokens_add_up_to_the_difference() -> None:
    model = native("gpt2")
    one = case_without_decomposer(model)
    assert one.baseline is not None
    scores = read_scores(model, [one], Plan(("ig",), "attnlrp"), QUIET)
    metric, tokens = metric_of(model, one.case), torch.tensor([one.case.tokens])
    whole = relevance_of(model, tokens, metric, "gradient")
    start = relevance_of(model, tokens, metric, "gradient", first_stream=one.baseline.stream[:1])
    fall = float(whole.metric - start.metric)
    plain = float(whole.score(TOKENS, one.baseline.stream[0]).sum())
    summed = float(scores.nodes["ig"]["tokens"][0].sum())
    assert abs(fall) > 1e-2
    assert abs(summed - fall) < 0.1 * abs(fall)  # eight steps
    assert abs(summed - fall) < 0.3 * abs(plain - fall)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_prompts_that_pass_together_are_scored_as_alone(family: str) -> None:
    model = native(family)
    one = case_without_decomposer(model)
    cases = [replace(one, case=replace(one.case, tokens=tokens, answers=(i + 5,))) for i, tokens in enumerate(ROWS)]
    plan = Plan(ALL, "attnlrp", dynamic=True)
    together, alone = read_scores(model, cases, plan, QUIET), [read_scores(model, [c], plan, QUIET) for c in cases]
    for method, kinds in together.nodes.items():
        for kind, rows in kinds.items():
            for row, single in zip(rows, alone, strict=True):
                assert torch.allclose(row, single.nodes[method][kind][0], atol=1e-5), (method, kind)
    for rule, accounts in together.leaks.items():
        for (metric, leaks, missed), single in zip(accounts, alone, strict=True):
            expected = single.leaks[rule][0]
            assert metric == pytest.approx(expected[0], abs=1e-5)
            assert missed == expected[2]
            assert torch.allclose(leaks.softmax, expected[1].softmax, atol=1e-5)


def test_both_rules_stand_in_every_comparison() -> None:
    assert Plan(ALL, "attnlrp").token_methods == ["attribution", "relp", "lrp", "relp_cp", "lrp_cp", "ig"]
    assert Plan(ALL, "cp").rules == {"gradient": "", "cp": "", "attnlrp": "_attnlrp"}
    assert set(Plan(("cdt", "relp"), "gradient").token_methods) == {"relp", "relp_attnlrp", "relp_cp"}
    assert Plan(("cdt", "direct"), "attnlrp").rules == {}
    with pytest.raises(OptionError, match="cdt must be among them"):
        ContextualDecomposition(methods=("relp",))
    with pytest.raises(OptionError, match="relpp"):
        ContextualDecomposition(methods=("cdt", "relpp"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run() -> Result:
    analysis = replace(
        SMALL,
        methods=ALL,
        streams=True,
        removal=("heads", "tokens"),
        dynamic_lrp=True,
        random_circuits=2,
        shares=(0.2, 0.5),
    )
    model = native("llama")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
    result = analysis.run(model, prompts(6))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()) == hooks
    planned = analysis.interventions(model, prompts(6))
    assert planned.exact
    assert result.provenance["counts"]["intervention_forwards"] == planned.total
    assert planned.forwards["stream ablations"] == 6 * 2 * 4
    return result


def test_every_method_stands_beside_every_kind_of_node(run: Result) -> None:
    table = run.tables["agreement"]
    methods = {"attribution", "relp", "lrp", "relp_cp", "lrp_cp", "ig", "distance", "layer", "random"}
    assert set(table.query("kind == 'heads'")["method"]) == methods | {"cdt", "direct"}
    assert set(table.query("kind == 'mlps'")["method"]) == methods | {"cdt", "direct"}
    assert set(table.query("kind == 'streams'")["method"]) == methods
    assert table.query("kind == 'streams'")["n_nodes"].eq(8).all()
    rows = table.query("kind == 'heads'").set_index("method")
    assert rows.loc["relp", ["forwards", "backwards"]].tolist() == [1, 1]
    assert rows.loc["ig", ["forwards", "backwards"]].tolist() == [8, 8]
    assert rows.loc["direct", ["forwards", "backwards"]].tolist() == [1, 0]
    assert rows.loc["random", ["forwards", "backwards", "seconds"]].tolist() == [0, 0, 0]
    gaps = run.tables["agreement_differences"]
    assert set(gaps.query("base == 'relp'")["kind"]) == {"heads", "mlps", "streams"}
    assert set(gaps.query("base == 'relp'")["method"]) == {"attribution"}
    assert sum("RelP beside attribution patching" in note for note in run.notes) == 3
    streams = run.tables["streams"]
    assert {"layer", "position", "relp", "relp_low", "ablation"} <= set(streams)
    assert all(run.figure(name).data for name in run.figures)
    assert {"curves", "tokens", "routed"} <= set(run.figures)


def test_the_leaks_of_every_prompt_add_up_to_its_metric(run: Result) -> None:
    leak = run.tables["leak"]
    sums = leak.pivot_table(index=["rule", "prompt"], columns="kind", values="amount", aggfunc="sum")
    parts = sums[["tokens", "bias", "softmax", "activation", "rest"]].sum(axis=1)
    assert np.allclose(parts, sums["metric"], atol=1e-5)
    assert set(leak["rule"]) == {"attnlrp", "cp", "dynamic"}
    assert np.allclose(sums["metric"], np.tile(run.tables["cases"]["metric"], 3), atol=1e-5)
    tokens = run.tables["token_relevance"].query("method == 'lrp'").groupby("prompt")["score"].sum()
    assert np.allclose(tokens, sums.loc["attnlrp", "tokens"], atol=1e-5)
    routed = run.tables["routed"]
    assert set(routed["part"]) == {"attention", "mlp"}
    assert any("Under rule cp the metric" in note and "tokens +" in note for note in run.notes)


def test_a_prompt_whose_account_misses_is_said_and_left_out() -> None:
    result = replace(SMALL, mode="zero").run(native("bert"), prompts(2))
    assert any("2 of 2 prompts misses the metric" in note for note in result.notes)
    assert set(result.tables["token_relevance"]["method"]) == {"attribution"}
    assert "routed" not in result.tables  # a stream that is normalised after each sum has no layer's shares
    assert {"relp", "lrp"} <= set(result.tables["heads"])


def test_areas_and_removal_of_a_run(run: Result) -> None:
    areas = run.tables["areas"].set_index("method")
    scored = {"cdt", "attribution", "relp", "lrp", "relp_cp", "lrp_cp", "ig", "direct", "ablation", "distance"}
    assert set(areas.index) == scored | {"random"}
    assert areas.drop(index="random")[["cpr", "cpr_low", "cmd_high", "random_cpr"]].notna().all(axis=None)
    assert areas.loc["random", "cpr"] == areas.loc["cdt", "random_cpr"]
    curves, abpc = run.tables["curves"], run.tables["abpc"]
    whole = curves.query("share == 0 and method != 'random'")["value"]
    assert np.allclose(whole, 1)
    assert np.allclose(curves.query("share == 1")["value"], 0, atol=1e-9)
    assert set(abpc["unit"]) == {"heads", "tokens"}
    assert {"dynamic", "ig"} <= set(abpc.query("unit == 'tokens'")["method"])
    assert (abpc["random_low"] <= abpc["random_high"]).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_what_heads_and_mlps_add_directly_is_the_metric_less_what_the_rest_of_the_stream_adds(family: str) -> None:
    """From zero, and by constants of the final norm, the parts of the last stream share out the metric."""
    model = native(family)
    case = Case(0, ROWS[0], (5,), (7,), (), (0, 1, 2, 3), "length 4")
    decomposer = Decomposer(model, case.tokens)
    prompt = decomposer.prepare(case.tokens, joint=False)
    heads, mlps = direct_attribution(decomposer, prompt, case, None), direct_of_mlps(decomposer, prompt, case, None)
    assert heads is not None
    assert mlps is not None
    trace = prompt.trace
    last = trace.get("block", "out", model.shape.n_layers - 1)[-1:]
    added = read(model, torch.tensor([case.tokens]), [Address("mlp_out", i) for i in range(model.shape.n_layers)])
    for layer, out in enumerate(added.values()):
        part, _ = decomposer.logit_operations.relevant(out[:, -1:].to(last), last, torch.tensor(case.ids), Rules())
        assert float(case.metric(part)) == pytest.approx(float(mlps[layer]), abs=1e-5)
    if family == "llama":  # attention without biases or a norm behind it
        first = read(model, torch.tensor([case.tokens]), [TOKENS])[TOKENS][:, -1:].to(last)
        rest, _ = decomposer.logit_operations.relevant(first, last, torch.tensor(case.ids), Rules())
        whole = float(Ablation(model, case, None).whole().detach())
        assert float((heads.sum() + mlps.sum() + case.metric(rest)).detach()) == pytest.approx(whole, abs=1e-4)


def test_curves_by_hand_where_every_node_adds_its_own_part() -> None:
    worth = np.array([4.0, 3.0, 2.0, 1.0])

    def measure(_: int, gone: Any) -> Any:
        return np.array([worth.sum() - worth[chosen].sum() for chosen in gone])

    unit = Unit("heads", [4, 4], np.full(2, 10.0), np.zeros(2), measure)
    best, worst = np.arange(4), np.arange(4)[::-1].copy()
    curves, areas = removal_tables(unit, {"best": [best, best], "worst": [worst, worst]}, 0, QUIET)
    rows = areas.set_index("method")
    gone = {0: 0.0, 1: 4.0, 2: 7.0, 3: 9.0, 4: 10.0}
    value = [1 - gone[round(4 * share)] / 10 for share in SHARES]
    own = curves.query("method == 'best' and order == 'morf'")["value"]
    assert np.allclose(own, value)
    last = {0: 0.0, 1: 1.0, 2: 3.0, 3: 6.0, 4: 10.0}
    least = curves.query("method == 'best' and order == 'lerf'")["value"]
    assert np.allclose(least, [1 - last[round(4 * share)] / 10 for share in SHARES])
    assert rows.loc["best", "abpc"] == pytest.approx(np.trapezoid(least, SHARES) - np.trapezoid(value, SHARES))
    assert rows.loc["best", "abpc"] == pytest.approx(-rows.loc["worst", "abpc"])
    assert rows.loc["best", "comprehensiveness"] == pytest.approx(1 - np.trapezoid(value, SHARES))
    gap = rows.loc["best", "comprehensiveness"] - rows.loc["best", "sufficiency"]
    assert rows.loc["best", "abpc"] == pytest.approx(gap)
    assert rows.loc["best", "abpc"] >= rows.loc["best", "random_high"]
    assert rows.loc["best", "random_low"] <= 0 <= rows.loc["best", "random_high"]


def test_a_token_taken_away_is_the_references_mean_row() -> None:
    model = native("llama")
    one = case_without_decomposer(model)
    assert one.baseline is not None
    ablation = Ablation(model, one.case, one.baseline)
    removed = torch.tensor([[True, False, True, False], [False] * 4, [True, False, True, False]])
    values = token_metric(ablation, removed)
    metric, tokens = metric_of(model, one.case), torch.tensor([one.case.tokens])
    own = relevance_of(model, tokens, metric, "gradient").values[TOKENS]
    mixed = torch.where(removed[:1, :, None], one.baseline.stream[:1], own)
    by_hand = relevance_of(model, tokens, metric, "gradient", first_stream=mixed).metric
    assert float(values[0]) == pytest.approx(float(by_hand), abs=1e-5)
    assert values[0] == values[2] != values[1]
    assert ablation.forwards == 3


def test_ranking_by_hand() -> None:
    rng = np.random.default_rng(0)
    effects = np.zeros((8, 40))
    effects[:, :2], effects[:, 2:] = (5.0, -4.0), np.linspace(0.1, 1, 38)
    scores = {
        "same": effects,
        "turned": -effects,
        "blind": np.tile(rng.normal(size=40), (8, 1)),
        "flat": np.ones((8, 40)),
    }
    table = agreement_tables(scores, effects, 0, {"layer": scores["blind"]})[0].set_index("method")
    assert table.loc["same", ["sign_agreement", "precision_at_k", "auroc"]].tolist() == [1, 1, 1]
    assert table.loc["turned", ["sign_agreement", "precision_at_k", "auroc"]].tolist() == [0, 1, 1]
    assert table.loc["flat", ["precision_at_k", "auroc"]].isna().all()
    sizes = np.abs(scores["blind"][0])
    wins = np.mean([sizes[a] > sizes[b] for a in (0, 1) for b in range(2, 40)])
    assert table.loc["blind", "auroc"] == pytest.approx(wins)
    assert table.loc["random", "auroc_low"] < 0.5 < table.loc["random", "auroc_high"]
    assert table.loc["random", "pearson_low"] < 0 < table.loc["random", "pearson_high"]
    half = agreement_tables({"same": effects[:5]}, effects[:5], 0)[0]
    assert half["sign_agreement"].isna().all()  # five prompts tell no effect from zero


def test_pointing_by_hand() -> None:
    cases = [Case(i, (7, 5, 9, 5), (5,), (2,), (), (0,), "g") for i in range(2)]
    cases.append(Case(2, (7, 8, 9, 4), (5,), (2,), (), (0,), "g"))  # no answer among its tokens
    scores = {0: [9.0, 1, 0, 2], 1: [0.0, 5, 0, 1], 2: [0.0, 1, 0, 0]}
    tokens = pd.DataFrame(
        [(p, at, "lrp", value) for p, row in scores.items() for at, value in enumerate(row)],
        columns=["prompt", "position", "method", "score"],
    )
    table = pointing_table(cases, tokens).set_index("first_token")
    assert table.loc[True, ["rate", "chance", "n"]].tolist() == [0.5, 0.5, 2]
    assert table.loc[False, ["rate", "chance", "n"]].tolist() == pytest.approx([1, 2 / 3, 2])
    assert 0 < table.loc[True, "low"] < 0.5 < table.loc[True, "high"] < 1
    assert span_of(replace(cases[0], span=(2,))) == ("given", frozenset({2}))
    given = pointing_table([replace(cases[0], span=(0,)), *cases[1:]], tokens).query("span == 'given'")
    assert given["first_token"].tolist() == [True]  # without position 0 nothing is left of that span
    assert given["rate"].item() == 1


def test_the_span_of_a_prompt_may_be_given() -> None:
    own = [Prompt(p.tokens, None, {**p.fields, "span": [-1]}) for p in prompts(2)]
    table = replace(SMALL, mode="zero", mlps=False).run(native("llama"), own).tables["pointing"]
    assert set(table["span"]) == {"given"}
    assert table["chance"].tolist()[:1] == [0.25]


def test_a_span_outside_its_prompt_is_refused() -> None:
    own = [Prompt(p.tokens, None, {**p.fields, "span": [4]}) for p in prompts(2)]
    with pytest.raises(PromptError, match="position 4 is outside its 4 tokens"):
        replace(SMALL, mode="zero").run(native("llama"), own)
