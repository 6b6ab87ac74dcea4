"""Circuits and ablations: what rows share changes no value, what is said beforehand is what runs, no claim without its sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import native

from analyses.contextual_decomposition import ContextualDecomposition
from analyses.contextual_decomposition.ablation import Ablation, shared_start, without
from analyses.contextual_decomposition.agreement import agreement_notes, agreement_tables
from analyses.contextual_decomposition.cases import Case, baseline_of
from analyses.contextual_decomposition.circuit import Search, search
from analyses.contextual_decomposition.prepared_cases import links_by_walking, links_from_sweep
from analyses.contextual_decomposition.scores import PreparedCase, Reading, sweep
from analyses.results.result import Result
from probes.decomposition import PRESETS, Decomposer, head
from probes.errors import OptionError
from probes.progress import Progress
from probes.prompts import Prompt

START, TOKENS = (5, 6), (5, 6, 41, 30, 7, 12)
REFERENCES = ((5, 6, 9, 50, 71, 3), (5, 6, 20, 8, 66, 90), (5, 6, 77, 13, 2, 40))
CASE = Case(0, TOKENS, (5, 6), (7,), REFERENCES, tuple(range(6)), "planted")
HEADS = [head(layer, h) for layer in range(3) for h in range(4)]


def prompts(n: int) -> list[Prompt]:
    rows = torch.randint(3, 97, (n, 6), generator=torch.Generator().manual_seed(3)).tolist()
    return [Prompt(tuple(row), None, {"answer_tokens": [5], "distractor_tokens": [7]}) for row in rows]


class Phases(Progress):
    """What was announced, and how much of it was done."""

    def __init__(self) -> None:
        self.phases: list[list[Any]] = []

    def start(self, total: int, what: str) -> None:
        self.phases.append([what, total, 0])

    def advance(self, done: int = 1) -> None:
        self.phases[-1][2] += done


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("width", [1, 6])
def test_rows_that_share_blocks_give_what_each_gives_by_a_whole_forward(family: str, width: int) -> None:
    model = native(family)
    baseline = baseline_of(model, REFERENCES)
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(24, 3, width, 4, generator=generator) < 0.6
    keep[::5, 0] = True  # some begin later
    keep[7], keep[8] = True, False  # nothing and everything
    keep[9] = keep[10]
    shared, plain = Ablation(model, CASE, baseline), Ablation(model, CASE, baseline)
    plain.cached = None
    expected = plain.metric(keep)
    assert torch.allclose(shared.metric(keep), expected, atol=1e-5)
    assert float(expected.std()) > 1e-3
    assert shared.forwards == plain.forwards == 23  # all but the one that changes nothing


def test_each_block_is_passed_once_by_all_that_agree_up_to_it() -> None:
    model = native("llama")
    passed = [0, 0, 0]
    hooks = []
    ablation = Ablation(model, CASE, baseline_of(model, REFERENCES))
    for layer in range(3):

        def count(_: Any, args: Any, output: Any, layer: int = layer) -> None:
            passed[layer] += len(args[0])

        hooks.append(model.module.get_submodule(f"model.layers.{layer}").register_forward_hook(count))
    try:
        without(ablation, HEADS)
    finally:
        for hook in hooks:
            hook.remove()
    assert passed == [4, 8, 12]  # four heads a block, none in a block before its own


def test_what_every_reference_begins_with_needs_no_forward() -> None:
    model = native("llama")
    baseline = baseline_of(model, REFERENCES)
    start = shared_start(TOKENS, REFERENCES)
    assert start == len(START)
    late, whole = Ablation(model, CASE, baseline, start), Ablation(model, CASE, baseline)
    assert late.cached is not None
    assert len(late.cached.entering[0]) == len(TOKENS) - len(START)
    assert torch.allclose(without(late, HEADS), without(whole, HEADS), atol=1e-5)
    assert shared_start(TOKENS, ()) == 0
    assert shared_start(TOKENS, [TOKENS]) == len(TOKENS)


@pytest.mark.parametrize("at", ["z", "q", "k", "v"])
@pytest.mark.parametrize("how", ["dot", "ratio"])
def test_one_sweep_holds_the_links_that_a_sweep_for_each_step_finds(at: Any, how: Any) -> None:
    model, rules, reading = native("qwen2"), PRESETS["faithful"], Reading(at, how)
    decomposer = Decomposer(model, TOKENS)
    opened = [PreparedCase(CASE, decomposer.prepare(TOKENS), baseline_of(model, REFERENCES))]
    scores, pairs = sweep(decomposer, opened[0], [(node,) for node in HEADS], rules, reading)
    assert pairs is not None
    assert float(pairs.abs().max()) > 1e-3
    circuits = [
        search(links, HEADS, scores, Search(2, 2, False))
        for links in (links_from_sweep(pairs, HEADS), links_by_walking(decomposer, opened, rules, reading))
    ]
    assert circuits[0][0] == circuits[1][0]
    assert len(circuits[0][1]) > 2
    for own, other in zip(circuits[0][1], circuits[1][1], strict=True):
        assert (own.source, own.target, own.step) == (other.source, other.target, other.step)
        assert own.score == pytest.approx(other.score, abs=1e-6)


@pytest.mark.parametrize(("n", "randoms", "bounded", "banded"), [(2, 1, False, False), (6, 6, True, True)])
def test_neither_few_prompts_nor_few_circuits_have_an_interval(
    n: int, randoms: int, bounded: bool, banded: bool
) -> None:
    analysis = ContextualDecomposition(
        mode="zero", random_circuits=randoms, words="none", mlps=False, shares=(0.3, 0.6)
    )
    result = analysis.run(native("llama"), prompts(n))
    for name, columns in {
        "heads": ("ci_low", "ci_high"), "faithfulness": ("ci_low", "ci_high"),
        "agreement": ("pearson_low", "spearman_high"), "agreement_differences": ("ci_low", "ci_high"),
    }.items():  # fmt: skip
        for column in columns:
            rows = result.tables[name]
            # Two of twelve heads remain without the ten largest, which have no correlation to be bounded.
            values = (
                rows[column] if "difference" not in rows else rows.query("statistic != 'pearson_without_top10'")[column]
            )
            assert (values.notna() if bounded else values.isna()).all(), (name, column)
    assert result.tables["faithfulness"][["random_low", "random_high"]].notna().all(axis=None) == banded
    assert result.tables["faithfulness"]["random_mean"].notna().all()
    drawn = {trace.name for trace in result.figure("faithfulness").data}
    assert ("random circuits, 5–95 %" in drawn) == banded
    assert any(note.startswith("2 prompts support no interval") for note in result.notes) == (not bounded)


def planted(noise: float, n: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Effects of 60 heads of which ten are large, and scores that know those ten, and the rest as `noise` lets them."""
    rng = np.random.default_rng(0)
    mean = np.concatenate([rng.choice([-1, 1], 10) * rng.uniform(5, 9, 10), rng.normal(0, 0.1, 50)])
    own = np.concatenate([mean[:10], (1 - noise) * mean[10:] + noise * rng.normal(0, 0.1, 50)])
    return mean + rng.normal(0, 0.01, (n, 60)), own + rng.normal(0, 0.01, (n, 60))


def test_what_knows_only_the_ten_largest_heads_is_told_from_what_knows_all() -> None:
    effects, known = planted(0.0)
    _, blind = planted(1.0)
    table, gaps = agreement_tables({"cdt": blind, "attribution": known}, effects, 0)
    rows = table.set_index("method")
    assert rows.loc["cdt", "pearson"] > 0.99
    assert rows.loc["attribution", "pearson_without_top10"] > 0.95
    assert rows.loc["cdt", "pearson_without_top10_high"] < rows.loc["attribution", "pearson_without_top10_low"]
    assert rows.loc["cdt", "spearman_high"] < rows.loc["attribution", "spearman_low"]
    by_hand = rows.loc["cdt", "spearman"] - rows.loc["attribution", "spearman"]
    assert gaps.set_index("statistic").loc["spearman", "difference"] == pytest.approx(by_hand)
    (said,) = agreement_notes(table, gaps)
    assert said.count("lower (difference") >= 2
    (said,) = agreement_notes(*agreement_tables({"cdt": known, "attribution": blind}, effects, 0))
    assert said.count("higher (difference") >= 2
    (said,) = agreement_notes(*agreement_tables({"cdt": known, "attribution": known}, effects, 0))
    assert said.count("not told apart (difference") == 3


def test_fewer_heads_than_are_left_out_have_no_correlation_without_them() -> None:
    effects = np.random.default_rng(0).normal(size=(8, 12))
    table, gaps = agreement_tables({"cdt": effects, "attribution": -effects}, effects, 0)
    assert table["pearson_without_top10"].isna().all()
    assert "without" not in agreement_notes(table, gaps)[0]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"layers": (2, 0)}, [n for n in HEADS if n.layer != 1]),
        ({"stride": 2}, [n for n in HEADS if n.layer != 1]),
        ({"heads": ("2.3", "0.1", "2.3")}, [head(0, 1), head(2, 3)]),
    ],
)
def test_only_the_chosen_heads_are_scored_and_ablated(options: dict[str, Any], chosen: list[Any]) -> None:
    base = {"mode": "zero", "random_circuits": 2, "words": "none", "shares": (1.0,)}
    part: Result = ContextualDecomposition(**base, **options).run(native("llama"), prompts(2))  # type: ignore[arg-type]
    whole = ContextualDecomposition(**base).run(native("llama"), prompts(2))  # type: ignore[arg-type]
    rows = part.tables["heads"]
    assert list(zip(rows["layer"], rows["head"], strict=True)) == [(n.layer, n.head) for n in chosen]
    merged = rows.merge(whole.tables["heads"], on=["layer", "head"], suffixes=("", "_whole"))
    for column in ("score", "ablation", "attribution", "direct"):
        assert np.allclose(merged[column], merged[f"{column}_whole"], atol=1e-5)
    assert set(part.tables["relevance"].query("kind == 'mlp'")["layer"]) == {n.layer for n in chosen}
    everything = part.tables["faithfulness"].query("method == 'cdt'")
    assert everything["size"].tolist() == [len(chosen)]
    assert everything["faithfulness"].item() == pytest.approx(1)
    assert any(f"{len(chosen)} of 12 heads were scored" in note for note in part.notes)
    assert part.provenance["counts"]["decomposed"] == 2 * len(chosen)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": (3,)}, "layer 3 does not exist: legal are 0 to 2"),
        ({"heads": ("3.0",)}, r"head '3.0' does not exist: layers are 0 to 2, heads 0 to 3"),
        ({"heads": ("2",)}, "head '2' is no layer.head"),
        ({"heads": ("²1.0",)}, "is no layer.head"),
        ({"heads": ("1.1",), "stride": 2}, "give either heads, or layers and stride"),
    ],
)
def test_heads_that_do_not_exist_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        ContextualDecomposition(mode="zero", **options).run(native("llama"), prompts(2))


@pytest.mark.parametrize("granularity", ["head", "position"])
def test_every_phase_over_prompts_says_how_far_it_is(granularity: Any) -> None:
    watch = Phases()
    analysis = ContextualDecomposition(
        mode="zero", random_circuits=1, prune=True, other_preset=True, granularity=granularity
    )
    analysis.run(native("llama"), prompts(2), progress=watch)
    assert all(total == done for _, total, done in watch.phases), watch.phases
    phases = {
        "prompt traced", "prompt scored", "prompt attributed", "prompt scored by paper rules", "prompt ablated",
        "prompt's MLPs", "prompt's MLPs compared", "prompt's circuits", "prompt's words",
    }  # fmt: skip
    assert {what for what, *_ in watch.phases} - {"prompt by position", "prompt searched"} == phases


def test_the_note_says_which_epsilon_the_papers_rules_have() -> None:
    small = {"mode": "zero", "random_circuits": 0, "words": "none", "mlps": False, "ablation": False}
    for options, said in (({"preset": "paper"}, True), ({"other_preset": True}, True), ({}, False)):
        notes = ContextualDecomposition(**small, **options).run(native("gpt2"), prompts(2)).notes  # type: ignore[arg-type]
        assert any("keep the model's own epsilons" in note for note in notes) == said
        assert any("Nothing was read from the activation store" in note for note in notes)


def test_a_figure_has_a_panel_for_each_statistic() -> None:
    effects, known = planted(0.0)
    table, gaps = agreement_tables({"cdt": known, "attribution": known}, effects, 0)
    assert isinstance(table, pd.DataFrame)
    from analyses.contextual_decomposition.figures import agreement

    assert len(agreement({"agreement": table, "agreement_differences": gaps}).data) == 3
