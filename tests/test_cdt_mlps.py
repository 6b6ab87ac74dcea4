"""MLPs compared: their ablation against plain hooks, their attribution against the first-order effect."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny import native
from torch import Tensor

from analyses.contextual_decomposition import ContextualDecomposition
from analyses.contextual_decomposition.ablation import Ablation
from analyses.contextual_decomposition.cases import Case, baseline_of
from analyses.contextual_decomposition.gradient_scores import metric_of
from analyses.contextual_decomposition.node_effects import mlp_ablation, stream_ablation
from analyses.contextual_decomposition.unseen import unseen, unseen_note
from analyses.ground_truth.contestants import runs_of
from probes import from_hf
from probes.decomposition import Baseline
from probes.edits import read
from probes.models.protocol import Model
from probes.planted.registry import build
from probes.points import Address
from probes.prompts import Prompt
from probes.relevance import relevance_of

ROWS = [[5, 6, 7, 8], [9, 4, 3, 8], [2, 11, 7, 10]]


def case_on(model: Model) -> tuple[Case, Baseline]:
    references = tuple(map(tuple, ROWS[1:]))
    case = Case(0, tuple(ROWS[0]), (5,), (7,), references, (0, 1, 2, 3), "length 4")
    return case, baseline_of(model, references)


def near(model: Model, case: Case, step: float) -> Baseline:
    """A baseline a small step away from the prompt's own MLP outputs."""
    addresses = [Address("mlp_out", layer) for layer in range(model.shape.n_layers)]
    own = torch.cat(list(read(model, torch.tensor([case.tokens]), addresses).values()))
    generator = torch.Generator().manual_seed(0)
    moved = own + step * torch.randn(own.shape, generator=generator)
    return replace(baseline_of(model, case.references), mlp_out=moved)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "gemma2", "opt_post_norm"])
def test_attribution_is_the_first_order_effect(family: str) -> None:
    model = native(family)
    case, _ = case_on(model)
    baseline = near(model, case, 1e-3)
    read = relevance_of(model, torch.tensor([case.tokens]), metric_of(model, case), "gradient")
    attribution = read.layers("mlp_out", baseline.mlp_out)[0].sum(1)
    effect = mlp_ablation(Ablation(model, case, baseline), range(model.shape.n_layers))
    assert attribution.double().tolist() == pytest.approx(effect.tolist(), rel=0.05, abs=2e-5)


def test_ablation_equals_a_plain_hook() -> None:
    model = native("gpt2")
    case, baseline = case_on(model)
    tokens = torch.tensor([case.tokens])

    def metric(layer: int | None) -> float:
        def replaced(_, __, output: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return baseline.mlp_out[layer].expand_as(output)

        mlp = None if layer is None else model.module.transformer.h[layer].mlp
        hook = None if mlp is None else mlp.register_forward_hook(replaced)
        with torch.no_grad():
            logits = model.module(tokens).logits[0, -1]
        if hook is not None:
            hook.remove()
        return float(logits[5] - logits[7])

    n_layers = model.shape.n_layers
    expected = [metric(None) - metric(layer) for layer in range(n_layers)]
    assert max(map(abs, expected)) > 1e-3
    assert mlp_ablation(Ablation(model, case, baseline), range(n_layers)).tolist() == pytest.approx(expected, abs=1e-5)
    plain = Ablation(model, case, baseline)
    plain.cached = None
    assert mlp_ablation(plain, range(n_layers)).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stream_position_is_ablated_alone(family: str) -> None:
    model = native(family)
    case, baseline = case_on(model)
    restarted, plain = Ablation(model, case, baseline), Ablation(model, case, baseline)
    plain.cached = None
    effects = stream_ablation(restarted, (0, 1))
    assert torch.allclose(effects, stream_ablation(plain, (0, 1)), atol=1e-5)
    assert float(effects.abs().min(0).values.max()) > 1e-3
    late = stream_ablation(Ablation(model, case, baseline, start=2), (0, 1))
    assert late[:, :2].abs().sum() == 0
    assert torch.allclose(late[:, 2:], effects[:, 2:], atol=1e-5)


def test_the_table_of_mlps_and_its_forwards() -> None:
    prompts = [Prompt(tuple(row), None, {"answer_tokens": [5], "distractor_tokens": [7]}) for row in ROWS]
    analysis = ContextualDecomposition(search_steps=0, random_circuits=0, words="none")
    model = native("gpt2")
    result = analysis.run(model, prompts)
    table = result.tables["mlps"]
    assert table["layer"].tolist() == list(range(model.shape.n_layers))
    assert {"score", "attribution", "attribution_low", "ablation", "ablation_high"} <= set(table)
    assert result.provenance["counts"]["intervention_forwards"] == analysis.interventions(model, prompts).total
    without = replace(analysis, ablation=False).run(model, prompts).tables
    assert "ablation" not in without["mlps"]
    assert "mlps" not in replace(analysis, mlps=False).run(model, prompts).tables


def compared(score: tuple[float, float], cost: tuple[float, float]) -> pd.DataFrame:
    return pd.DataFrame({
        "layer": [4], "head": [2], "ci_low": score[0], "ci_high": score[1], "ablation": sum(cost) / 2, "ablation_low": cost[0],
        "ablation_high": cost[1],
    })  # fmt: skip


def test_what_costs_the_metric_and_has_no_relevance_is_said() -> None:
    cases = pd.DataFrame({"metric": [10.0, 10.0]})
    silent, costly = (0.0, 0.0), (2.0, 4.0)
    tables = {"cases": cases, "heads": compared(silent, costly), "mlps": compared(silent, costly).drop(columns="head")}
    assert unseen(tables) == ["4.2", "mlp 4"]
    (note,) = unseen_note(tables, frozen_gate=True)
    assert "4.2, mlp 4" in note
    assert "--gate joint" in note
    assert "--gate" not in unseen_note(tables, frozen_gate=False)[0]
    assert unseen({"cases": cases, "heads": compared((0.5, 1.0), costly)}) == [], "it has relevance"
    assert unseen({"cases": cases, "heads": compared(silent, (0.5, 4.0))}) == [], "its cost may be small"
    nan = float("nan")
    assert unseen_note({"cases": cases, "heads": compared((nan, nan), (nan, nan))}, True) == [], "no interval, no claim"


def test_a_head_that_acts_through_a_gate_is_named_and_seen_by_the_joint_rule() -> None:
    task = build("A1", 0)
    model = from_hf(task.module, ref=task.ref)
    (run,) = runs_of("contextual_decomposition", task)
    analysis = replace(run.analysis, other_preset=False)
    mover = next(iter(task.record.question("moved:attribute:r>ask").truth))
    notes = " ".join(analysis.run(model, list(run.prompts)).notes)
    assert mover in notes.partition("under these rules: ")[2]
    heads = replace(analysis, gate="joint").run(model, list(run.prompts)).tables["heads"]
    best = heads.loc[heads["score"].abs().nlargest(2).index]
    assert mover in {f"{layer}.{head}" for layer, head in zip(best["layer"], best["head"], strict=True)}
