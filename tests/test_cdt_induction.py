"""A two-layer model trained to continue repeated sequences: the search must find its induction circuit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from analyses.contextual_decomposition.ablation import Ablation, without
from analyses.contextual_decomposition.cases import Case, baseline_of
from analyses.contextual_decomposition.circuit import Search, search
from analyses.contextual_decomposition.gradient_scores import metric_of
from analyses.contextual_decomposition.prepared_cases import links_by_walking
from analyses.contextual_decomposition.scores import PreparedCase, Reading, position_sources, to_metric, to_nodes
from probes.decomposition import PRESETS, Decomposer, head
from probes.models.backends.native import NativeModel
from probes.planted.registry import build
from probes.planted.trained_prompts import REPEATED_VOCAB, repeated
from probes.points import Address
from probes.relevance import relevance_of

HEADS = [head(layer, h) for layer in range(2) for h in range(2)]


@pytest.fixture(scope="module")
def trained() -> NativeModel:
    """Attention only, two layers of two heads; as shipped, since training ends elsewhere on another processor."""
    return NativeModel(build("T1").module, ref="T1", weights="trained")


def patterns(model: NativeModel, tokens: tuple[int, ...]) -> Tensor:
    """[layer, head, query, key]."""
    by_layer: list[Tensor] = []
    reads = {Address("pattern", layer): lambda t: by_layer.append(t[0].clone()) for layer in range(2)}
    model.run(torch.tensor([tokens]), reads)
    return torch.stack(by_layer)


PERIOD = 9


def cases() -> list[Case]:
    """Prompts that end at the token whose successor stood one period earlier; references repeat nothing."""
    generator = torch.Generator().manual_seed(7)
    drawn = []
    references = tuple(
        tuple(torch.randint(0, REPEATED_VOCAB, (14,), generator=generator).tolist()) for _ in range(32)
    )  # fmt: skip
    for index in range(6):
        tokens = repeated(1, PERIOD, generator)[0, :14].tolist()
        answer = tokens[14 - PERIOD]
        others = tuple(t for t in tokens[:PERIOD] if t != answer)
        drawn.append(Case(index, tuple(tokens), (answer,), others, references, tuple(range(14)), "repeated"))
    return drawn


@pytest.mark.parametrize("preset", ["faithful", "paper"])
def test_the_search_returns_previous_token_head_to_induction_head_at_the_right_positions(
    trained: NativeModel, preset: str
) -> None:
    every = cases()
    attention = torch.stack([patterns(trained, case.tokens) for case in every]).mean(0)
    successor, before = 14 - PERIOD, 13 - PERIOD
    # By what they attend to: in block 0 the head that looks back one token at the successor, in block 1 the head
    # that looks from the end to the successor.
    previous = int(attention[0, :, successor, before].argmax())
    induction = int(attention[1, :, -1, successor].argmax())
    assert attention[0, previous, successor, before] > 0.5
    assert attention[1, induction, -1, successor] > 0.3
    decomposer = Decomposer(trained, every[0].tokens)
    baseline = baseline_of(trained, every[0].references)
    opened = [PreparedCase(case, decomposer.prepare(case.tokens), baseline) for case in every]
    rules = PRESETS[preset]
    sources = position_sources(HEADS, range(14))
    scores = torch.stack([to_metric(decomposer, one, sources, rules) for one in opened]).mean(0)
    nodes = [source[0] for source in sources]
    best = nodes[int(scores.argmax())]
    assert (best.layer, best.head, best.position) == (1, induction, 13)
    how = Search(top=1, steps=3, layer_normalise=False)
    if preset == "faithful":
        circuit, edges = search(links_by_walking(decomposer, opened, rules, Reading()), nodes, scores, how)
        assert [edge.source for edge in edges if edge.target is None] == [head(1, induction, 13)]
        assert circuit[1] == head(0, previous, successor)
        assert edges[1].target == circuit[0]


def test_the_faithful_scores_follow_the_measured_effects(trained: NativeModel) -> None:
    every = cases()
    baseline = baseline_of(trained, every[0].references)
    decomposer = Decomposer(trained, every[0].tokens)
    opened = [PreparedCase(case, decomposer.prepare(case.tokens), baseline) for case in every]
    sources = [(node,) for node in HEADS]
    effects = torch.stack([without(Ablation(trained, case, baseline), HEADS).float() for case in every])
    scores = torch.stack([to_metric(decomposer, one, sources, PRESETS["faithful"]) for one in opened]).float()
    assert float(torch.corrcoef(torch.stack([scores.flatten(), effects.flatten()]))[0, 1]) > 0.8
    assert int(effects.mean(0).argmax()) == int(scores.mean(0).argmax())


def test_attribution_patching_is_the_first_order_effect(trained: NativeModel) -> None:
    """Towards a baseline very near the activation itself, the change of the metric is the attribution."""
    case = cases()[0]
    baseline = baseline_of(trained, case.references)
    z: dict[int, Tensor] = {}
    reads = {Address("z", layer): lambda t, at=layer: z.__setitem__(at, t[0].clone()) for layer in range(2)}
    trained.run(torch.tensor([case.tokens]), reads)
    own = torch.stack([z[layer] for layer in range(2)])
    near = type(baseline)(own + 0.01 * (baseline.z - own), baseline.mlp_out, baseline.stream)
    read = relevance_of(trained, torch.tensor([case.tokens]), metric_of(trained, case), "gradient")
    attribution = read.layers("z", near.z)[0].sum(1)
    effects = without(Ablation(trained, case, near), HEADS).reshape(2, 2).float()
    assert float(effects.abs().max()) > 1e-3
    assert torch.allclose(attribution, effects, atol=0.1 * float(effects.abs().max()))


def test_target_scores_of_a_heads_own_source_are_all_of_it(trained: NativeModel) -> None:
    case = cases()[0]
    decomposer = Decomposer(trained, case.tokens)
    one = PreparedCase(case, decomposer.prepare(case.tokens), baseline_of(trained, case.references))
    rules = PRESETS["faithful"]
    scores = to_nodes(decomposer, one, [(head(1, 0),), (head(1, 1),)], [head(1, 0), head(1, 1)], rules)
    assert torch.allclose(scores, torch.eye(2, dtype=torch.float64), atol=1e-5)
    zero = PreparedCase(case, one.prompt, None)
    ratio = to_nodes(decomposer, zero, [(head(1, 0),), (head(1, 1),)], [head(1, 0)], rules, Reading(how="ratio"))
    assert torch.allclose(ratio[:, 0], torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-6)
