"""Circuits of edges: the whole is the clean run, nothing is the baseline, and one edge less is that edge patched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES
from test_causal_patching import CLEAN, CORRUPTED, logits, native, pair_line
from torch import Tensor

from analyses.causal_patching import CausalPatching
from analyses.causal_patching.ablation import ablated
from analyses.causal_patching.circuit_checks import Checks
from analyses.causal_patching.circuit_plan import TAKEN_WITH
from analyses.causal_patching.circuit_tables import shuffled_pairs
from analyses.causal_patching.edge_circuits import edge_weights
from analyses.causal_patching.edge_tables import OpenedEdges
from analyses.causal_patching.edges import Line
from analyses.causal_patching.graph import receivers_of, senders_of
from analyses.causal_patching.levels import EdgeLevel, NodeLevel, circuit_metrics, level_of, supports
from analyses.causal_patching.pairs import Pair, pair_of, resolved
from analyses.causal_patching.running import Run
from analyses.interventions import Tally
from probes.errors import OptionError, PointError, PromptError
from probes.progress import QUIET
from probes.store import ActivationStore

NORMALISED = ("gemma2", "gemma3", "olmo2")
"""Families that normalise what their heads write together."""
ADDING = tuple(family for family in FAMILIES if family not in ("bert", "opt_post_norm", *NORMALISED))


def opened(family: str, **fields: object) -> tuple[Run, Pair]:
    model = native(family)
    line = pair_line(model)
    line.fields.update(fields)  # type: ignore[attr-defined]
    pair = pair_of(0, resolved(model, [line], ["a.jsonl:1"], False)[0], False)
    return CausalPatching(min_gap=0, min_pairs=1, nulls="none")._run(model, [pair], Tally(QUIET), None), pair


def difference(pair: Pair, row: Tensor) -> float:
    return float(row[list(pair.answers)].mean() - row[list(pair.distractors)].mean())


@pytest.mark.parametrize("family", ADDING)
def test_circuits_of_edges_keep_the_identities_of_the_graph(family: str) -> None:
    run, pair = opened(family)
    level = level_of(run, "edges", Line(5, "gauss", "inputs"))
    assert isinstance(level, EdgeLevel)
    one, every = ablated(run, pair, "counterfactual"), np.arange(len(level.layers))
    places = level.connected.nonzero().tolist()
    senders, receivers = senders_of(run.model.shape), receivers_of(run.model.shape)
    lost = [place for place in range(0, len(every), 7) if senders[places[place][0]].layer < 2]
    # A node whose edges all go is a node that is ablated.
    gone = senders.index(next(sender for sender in senders if sender.layer == 1 and sender.head == 2))
    without_node = np.array([i for i, (sender, _) in enumerate(places) if sender != gone])
    circuits = [every, every[:0], without_node, *(np.delete(every, place) for place in lost)]
    full, empty, node, *each = one.reader.read(level.last_rows(one, circuits))[:, 0].tolist()
    clean, corrupted = (difference(pair, logits(run.model, tokens)) for tokens in (CLEAN, CORRUPTED))
    assert full == pytest.approx(clean, abs=1e-4)
    assert empty == pytest.approx(corrupted, abs=1e-4)
    nodes = NodeLevel(run.model.shape)
    kept = np.delete(np.arange(len(nodes.nodes)), nodes.nodes.index(senders[gone]))
    assert node == pytest.approx(float(one.reader.read(nodes.last_rows(one, [kept]))[0, 0]), abs=1e-4)
    edges = [(senders[places[place][0]], receivers[places[place][1]]) for place in lost]
    paths = OpenedEdges.of(run, pair, "noise", sorted({sender for sender, _ in edges}))
    effects = paths.effects(run.model, edges, "residual", level.attribution.parallel)
    assert np.array(each) - clean == pytest.approx(effects, abs=1e-4)


@pytest.mark.parametrize("family", NORMALISED)
def test_heads_that_are_normalised_together_have_no_circuits_of_edges(family: str) -> None:
    with pytest.raises(PointError, match="--circuit nodes"):
        edge_weights(native(family))


def test_a_mean_is_that_of_the_references_at_every_position() -> None:
    """With one reference the baseline is a run of its own: nothing kept is that run, from the first token that differs."""
    reference = [5, 11, 12, 8, 13, 10]
    run, pair = opened("llama", reference_tokens=[reference, [1, 2]])
    assert pair.references == (tuple(reference),)
    one = ablated(run, pair, "mean")
    assert one.base.start == 1
    level = level_of(run, "edges", Line(5, "gauss", "inputs"))
    empty = float(one.reader.read(level.last_rows(one, [np.arange(0)]))[0, 0])
    assert empty == pytest.approx(difference(pair, logits(run.model, tuple(reference))), abs=1e-4)
    two = opened("llama", reference_tokens=[reference, list(CORRUPTED)])
    means = [ablated(opened("llama", reference_tokens=[r])[0], opened("llama", reference_tokens=[r])[1], "mean").given
             for r in (reference, list(CORRUPTED))]  # fmt: skip
    both = ablated(*two, "mean").given
    for address, values in both.items():
        parts = [given[address][-len(values) :] for given in means]
        assert torch.allclose(values[-4:], (parts[0][-4:] + parts[1][-4:]) / 2, atol=1e-5)


def test_a_mean_without_references_says_where_they_are_missing() -> None:
    run, pair = opened("llama")
    with pytest.raises(PromptError, match=r'a.jsonl:1: a mean needs "references"'):
        ablated(run, pair, "mean")


def test_zero_is_zero_at_every_position() -> None:
    run, pair = opened("gpt2")
    one = ablated(run, pair, "zero")
    assert one.base.start == 0
    assert not any(values.any() for values in one.given.values())


def test_permuted_items_change_nothing_and_exact_support_is_the_loss() -> None:
    run, pair = opened("qwen2")
    level = level_of(run, "nodes", Line(5, "gauss", "inputs"))
    exact = supports(run, level, "exact", QUIET)[0]
    one = ablated(run, pair, "counterfactual")
    rng, n = np.random.default_rng(0), len(exact)
    circuit = rng.choice(n, n // 2, replace=False)
    rows = level.last_rows(one, [circuit, rng.permutation(circuit), np.delete(np.arange(n), 3), np.arange(n)])
    values = one.reader.read(rows)[:, 0].numpy()
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert values[3] - values[2] == pytest.approx(exact[3], abs=1e-5)


def test_edges_are_ordered_tried_and_drawn(store: ActivationStore) -> None:
    model = native("llama")
    lines = [pair_line(model, (5, 6, 7 + i, 8), (5, 6, 17 + i, 8)) for i in range(2)]
    options = {
        "circuit": "edges",
        "circuit_methods": ("eap", "eap_ig"),
        "ig_steps": 2,
        "n_random": 1,
        "sizes": (0.1, 1.0),
    }
    analysis = CausalPatching(min_gap=0, min_pairs=1, nulls="none", components=("mlp_out",), **options)  # type: ignore[arg-type]
    result = analysis.run(model, lines, store=store)
    table = result.tables["faithfulness"]
    assert table[table["share"] == 1]["f"].to_numpy() == pytest.approx(1, abs=1e-3)
    assert set(table["method"]) == {"eap", "eap_ig", "eap_shuffled", "eap_ig_shuffled"}
    assert set(result.tables["circuit_area"]["level"]) == {"edges"}
    assert result.figure("faithfulness").data
    with pytest.raises(OptionError, match="'atp' does not order edges: legal are eap, eap_ig"):
        CausalPatching(circuit="edges", circuit_methods=("atp",))


def test_the_whole_is_complete_and_every_item_that_matters_is_needed() -> None:
    """Subsets leave the whole as they leave the whole; an item's need is the largest fall of what is left, by hand."""
    run, _ = opened("llama")
    level = level_of(run, "nodes", Line(5, "gauss", "inputs"))
    every = np.arange(len(level.layers))
    checks = Checks.of(level, every, 6, np.random.default_rng(0))
    assert all(0.1 * len(every) - 1 <= len(subset) <= 0.9 * len(every) + 1 for subset in checks.subsets["circuit"])
    values = circuit_metrics(run, level, checks.circuits, "counterfactual", QUIET)
    ends = circuit_metrics(run, level, [every, every[:0]], "counterfactual", QUIET)
    row = checks.row(values, ends[:, 0], ends[:, 1], 0)
    assert row["incompleteness"] == pytest.approx(0, abs=1e-5)
    exact, span = supports(run, level, "exact", QUIET)[0], float(ends[0, 0] - ends[0, 1])
    needs = [exact[checks.tried] / span]
    for subset in checks.subsets["circuit"][:TAKEN_WITH]:
        left = np.setdiff1d(every, subset)
        circuits = [left, *(np.setdiff1d(left, [item]) for item in checks.tried)]
        alone = circuit_metrics(run, level, circuits, "counterfactual", QUIET)[0]
        needs.append((alone[0] - alone[1:]) / span)
    need = np.max(needs, axis=0)
    assert row["need_median"] == pytest.approx(float(np.median(need)), abs=1e-4)
    assert row["need_least"] == pytest.approx(float(need.min()), abs=1e-4)


def test_shuffled_pairs_keep_their_clean_prompts_and_never_their_own_corruption() -> None:
    model = native("llama")
    lines = [pair_line(model, (5, 6, 7 + i, 8), (5, 6, 17 + i, 8)) for i in range(3)]
    lines.append(pair_line(model, (5, 6, 9, 4, 8), (5, 6, 19, 4, 8)))
    pairs = [pair_of(i, prompt, False) for i, prompt in enumerate(resolved(model, lines, ["a"] * 4, False))]
    analysis = CausalPatching(min_gap=0, min_pairs=1, nulls="none")
    mixed = shuffled_pairs(analysis._run(model, pairs[:3], Tally(QUIET), None))
    assert mixed is not None
    assert [pair.clean for pair in mixed.pairs] == [pair.clean for pair in pairs[:3]]
    assert [pair.corrupted for pair in mixed.pairs] == [pairs[i].corrupted for i in (1, 2, 0)]
    assert shuffled_pairs(analysis._run(model, pairs, Tally(QUIET), None)) is None


def test_a_circuit_is_checked_where_one_is_faithful(store: ActivationStore) -> None:
    model = native("llama")
    lines = [pair_line(model, (5, 6, 7 + i, 8), (5, 6, 17 + i, 8)) for i in range(4)]
    options = {
        "circuit": "nodes",
        "circuit_methods": ("exact", "atp"),
        "n_random": 1,
        "n_subsets": 3,
        "sizes": (0.2, 0.5),
    }
    analysis = CausalPatching(min_gap=0, min_pairs=1, nulls="none", components=("mlp_out",), **options)  # type: ignore[arg-type]
    result = analysis.run(model, lines, store=store)
    assert set(result.tables["faithfulness"]["method"]) == {"exact", "atp", "atp_shuffled"}
    checks = result.tables["circuit_checks"]
    faithful = result.tables["faithfulness"].query("split == 'held_out' and ordered_by == 'score' and f >= 0.8")
    assert set(checks["method"]) == set(faithful["method"]) - {"atp_shuffled"}
    assert (checks["f"] >= 0.8).all()
    said = " ".join(result.notes)
    assert all(f"{method}: the smallest circuit" in said for method in checks["method"])
    assert result.figure("faithfulness").data
