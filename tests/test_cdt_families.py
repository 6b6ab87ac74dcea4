"""What must hold of a contextual decomposition on every family and under every rule, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import get_args, get_type_hints

import pytest
import torch
from doubled import double, float64
from families import FAMILIES, prompt
from torch import Tensor

from probes.decomposition import PRESETS, Baseline, Decomposer, Rules, decompose, head, mlp, token
from probes.decomposition.decomposer import POINTS
from probes.errors import PointError
from probes.models.backends.native import NativeModel
from probes.points import Address

EXACT = 1e-10
TOKENS = prompt()[0].tolist()
IDS = [5, 6]
MIXED = [
    Rules("shared", "on", "joint", "cd"),
    Rules("irrelevant", "off", "joint", "shapley"),
    Rules("shared", "off", "frozen", "cd"),
    Rules("irrelevant", "on", "frozen", "shapley"),
    Rules("shared", "off", "function", "shapley"),
    Rules("irrelevant", "on", "function", "cd"),
]
"""Every pair of settings of two rules."""
SOME = [
    PRESETS["paper"],
    PRESETS["faithful"],
    Rules(bias="shared", attention="frozen", activation="shapley", gate="frozen"),
    Rules(bias="shared", normalise="on", attention="function", activation="shapley", gate="joint"),
]
CASES = [(family, rules) for family in FAMILIES for rules in SOME]
CROSSED = [("gpt2", rules) for rules in MIXED]
CROSSED += [("gemma3", replace(rules, gate=gate)) for rules in MIXED for gate in ("joint", "frozen")]  # type: ignore[arg-type]
CASES += [case for case in CROSSED if case not in CASES]
PRESET_CASES = [case for case in CASES if case[1] in PRESETS.values() or case in CROSSED]


def test_every_pair_of_settings_is_tried() -> None:
    for one, other in combinations(("bias", "normalise", "attention", "activation"), 2):
        tried = {(getattr(rules, one), getattr(rules, other)) for rules in MIXED}
        legal = [get_args(get_type_hints(Rules)[name]) for name in (one, other)]
        assert tried == set(product(*legal))


def label(value: object) -> str:
    return "-".join(map(str, vars(value).values())) if isinstance(value, Rules) else str(value)


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with float64():
        yield


@cache
def opened(family: str) -> Decomposer:
    return Decomposer(double(family), TOKENS)


def points_of(model: NativeModel) -> list[str]:
    addresses = [Address(point, layer) for point in POINTS for layer in range(model.shape.n_layers)]
    return [str(a) for a in addresses if model.refusal(a) is None]


@cache
def own(family: str) -> dict[str, Tensor]:
    """The model's own activations, by plain hooks."""
    model, activations = opened(family).model, dict[str, Tensor]()
    reads = {}
    for name in (*points_of(model), "logits"):  # type: ignore[arg-type]
        reads[Address.parse(name)] = lambda t, name=name: activations.__setitem__(name, t[0].clone())
    model.run(torch.tensor([TOKENS]), reads)
    return activations


def baseline_of(model: NativeModel) -> Baseline:
    """Tables that differ between positions."""
    shape, n, draw = model.shape, len(TOKENS), torch.Generator().manual_seed(3)
    sizes = ((shape.n_heads, shape.d_head), (shape.d_model,), (shape.d_model,))
    return Baseline(*(0.1 * torch.randn(shape.n_layers, n, *size, generator=draw).double() for size in sizes))


def largest(x: Tensor) -> float:
    return float(x.abs().max())


@pytest.mark.parametrize(("family", "rules"), CASES, ids=label)
def test_the_parts_sum_to_the_models_own_activation_at_every_point(family: str, rules: Rules) -> None:
    points = points_of(opened(family).model)  # type: ignore[arg-type]
    decomposed = decompose(opened(family), TOKENS, [(head(1, 2, 3),)], points=points, logits=IDS, rules=rules)
    assert set(decomposed) == {*points, "logits"}
    for name, parts in decomposed.items():
        expected = own(family)[name] if name != "logits" else own(family)[name][:, IDS]
        total = parts.relevant[0] + parts.irrelevant[0]
        assert largest(total - expected) <= EXACT * max(1.0, largest(expected)), name


@pytest.mark.parametrize(("family", "rules"), CASES, ids=label)
def test_with_every_token_relevant_nothing_is_left_and_with_none_nothing_appears(family: str, rules: Rules) -> None:
    points = points_of(opened(family).model)  # type: ignore[arg-type]
    sources = [tuple(token(p) for p in range(len(TOKENS))), ()]
    shared = replace(rules, bias="shared")
    decomposed = decompose(opened(family), TOKENS, sources, points=points, logits=IDS, rules=shared, restart=False)
    for name, parts in decomposed.items():
        assert largest(parts.irrelevant[0]) <= EXACT * max(1.0, largest(parts.total)), name
        assert largest(parts.relevant[1]) == 0, name
    nothing = decompose(opened(family), TOKENS, [()], points=points, logits=IDS, rules=rules, restart=False)
    assert all(largest(parts.relevant) == 0 for parts in nothing.values())


@pytest.mark.parametrize(("family", "rules"), PRESET_CASES, ids=label)
def test_restart_batch_and_causality(family: str, rules: Rules) -> None:
    model = opened(family).model
    sources = [
        (head(1, 0, 3),),
        (head(2, 1, 5),),
        (mlp(0, 2),),
        (head(1, 3, 4), head(2, 0, 7)),
        (token(6),),
        (head(0, 1),),
    ]
    points = [a for a in points_of(model) if a.split(".")[0] in ("resid_post", "z", "mlp_out", "k")]  # type: ignore[arg-type]
    settings = {"points": points, "logits": IDS, "rules": rules, "baseline": baseline_of(model)}  # type: ignore[arg-type]
    whole = decompose(opened(family), TOKENS, sources, restart=False, **settings)  # type: ignore[arg-type]
    quick = decompose(opened(family), TOKENS, sources, **settings)  # type: ignore[arg-type]
    for index, source in enumerate(sources):
        alone = decompose(opened(family), TOKENS, [source], **settings) if index < 2 else None  # type: ignore[arg-type]
        for name, parts in whole.items():
            scale = max(1.0, largest(parts.relevant))
            assert largest(quick[name].relevant - parts.relevant) <= EXACT * scale
            if alone is not None:
                assert largest(alone[name].relevant[0] - parts.relevant[index]) <= EXACT * scale
            start = min(node.position for node in source)
            if model.shape.causal and start > 0:
                assert largest(parts.relevant[index, :start]) == 0
    assert largest(whole["resid_post.2"].relevant[0]) > 1e-6
    lean = decompose(opened(family), TOKENS, sources, **{**settings, "points": []})  # type: ignore[arg-type]
    assert largest(lean["logits"].relevant - whole["logits"].relevant) <= EXACT * largest(whole["logits"].relevant)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["joint", "frozen"])
def test_a_gated_mlp_splits_both_factors_or_one(gate: str) -> None:
    model, points = opened("llama").model, ["mlp_in.1", "mlp_post.1"]
    rules = replace(PRESETS["faithful"], gate=gate)  # type: ignore[arg-type]
    decomposed = decompose(opened("llama"), TOKENS, [(head(0, 1),)], points=points, rules=rules)
    mlp_of = model.module.get_submodule("model.layers.1.mlp")  # type: ignore[attr-defined]
    entering, units = decomposed["mlp_in.1"], decomposed["mlp_post.1"]

    def gated(x: Tensor) -> Tensor:
        return mlp_of.act_fn(mlp_of.gate_proj(x))

    if gate == "joint":
        expected = units.total - gated(entering.irrelevant) * mlp_of.up_proj(entering.irrelevant)
    else:
        expected = gated(entering.total) * mlp_of.up_proj(entering.relevant)
    assert largest(units.relevant - expected) <= EXACT
    assert largest(units.relevant) > 1e-6


def test_positions_that_are_kept_are_those_of_the_whole_walk() -> None:
    decomposer = opened("gpt2")
    prompt = decomposer.prepare(TOKENS)
    ends: dict[bool, Tensor] = {}
    for some in (False, True):

        def end(rel: Tensor, at: Tensor, some: bool = some) -> None:
            assert at.tolist() == ([3, 6] if some else list(range(2, len(TOKENS))))
            ends[some] = rel

        decomposer.walk(prompt, [(head(0, 1, 2),)], lambda _, end=end: ({}, end), keep=(3, 6, 0) if some else None)  # type: ignore[misc]
    assert largest(ends[True] - ends[False][:, [1, 4]]) <= EXACT


def test_biases_go_to_the_irrelevant_part_and_nothing_else_does() -> None:
    model = double("gpt2")
    decomposer = Decomposer(model, TOKENS)
    everything = [tuple(token(p) for p in range(len(TOKENS)))]
    decomposed = decompose(decomposer, TOKENS, everything, points=["attn_in.0", "q.0", "v.0"], rules=Rules())
    block, bias = decomposer.operations.blocks[0], model.component("ln1", 0).bias
    assert torch.allclose(decomposed["attn_in.0"].irrelevant[0], bias.expand(9, -1), atol=EXACT)  # type: ignore[operator,union-attr,arg-type]
    for name, linear in (("q.0", block.q), ("v.0", block.v)):
        expected = bias @ linear.weight + linear.bias  # type: ignore[operator]
        assert torch.allclose(decomposed[name].irrelevant[0].flatten(-2), expected.expand(9, -1), atol=EXACT)


def attention_only(family: str = "llama") -> NativeModel:
    """A model without biases whose MLPs add nothing."""
    model = double(family, seed=1)
    with torch.no_grad():
        for layer in range(model.shape.n_layers):
            model.component("mlp.out", layer).weight.zero_()  # type: ignore[operator,union-attr]
    return model


def test_a_last_layer_head_equals_direct_logit_attribution_through_the_frozen_norm() -> None:
    model = attention_only()
    sources = [(head(2, h, p),) for h in range(4) for p in range(len(TOKENS))]
    for rules in (Rules(), Rules(bias="shared", attention="frozen"), Rules(activation="shapley", attention="joint")):
        decomposed = decompose(model, TOKENS, sources, points=["z.2"], logits=IDS, rules=rules)
        stream: list[Tensor] = []
        model.run(torch.tensor([TOKENS]), {Address("resid_post", 2): lambda t, s=stream: s.append(t[0].clone())})
        scale = (stream[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        gain, unembed = model.component("ln_final").weight, model.component("unembed").weight
        w_o = model.component("attn.o", 2).weight.T.reshape(4, 8, -1)  # type: ignore[union-attr,operator]
        for row, ((node,), z) in enumerate(zip(sources, decomposed["z.2"].relevant, strict=True)):
            with torch.no_grad():
                direct = z[:, node.head] @ w_o[node.head] / scale * gain @ unembed[IDS].T  # type: ignore[operator,index,union-attr]
            assert largest(decomposed["logits"].relevant[row] - direct) <= EXACT


def test_same_layer_sources_add_where_attention_is_frozen_and_not_where_it_is_split() -> None:
    model = attention_only()
    both = [(head(0, 0, 2),), (head(0, 3, 4),), (head(0, 0, 2), head(0, 3, 4))]
    gaps = {}
    for how in ("frozen", "joint", "function"):
        rel = decompose(model, TOKENS, both, logits=IDS, rules=Rules(attention=how))["logits"].relevant  # type: ignore[arg-type]
        gaps[how] = largest(rel[0] + rel[1] - rel[2])
    assert gaps["frozen"] <= EXACT
    assert gaps["joint"] > 1e-4
    assert gaps["function"] > 1e-4


def test_the_function_rules_leave_what_the_model_computes_without_the_source_when_norms_are_free() -> None:
    """Attention and MLPs as functions: the irrelevant part is the ablated model's own, up to the divisors of norms."""
    model = double("gpt2", seed=2)
    with torch.no_grad():
        for layer in range(3):
            for name in ("ln1", "ln2"):
                # A norm whose epsilon dwarfs the variance divides by a constant.
                model.component(name, layer).eps = 1e12  # type: ignore[assignment]
                model.component(name, layer).weight.mul_(1e6)  # type: ignore[operator,union-attr]
    parts = decompose(model, TOKENS, [(head(0, 1, 2),)], points=["resid_post.2"], rules="faithful")["resid_post.2"]
    seen: list[Tensor] = []

    def ablate(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, 2, 1] = 0
        return z

    writes = {Address("z", 0): ablate}
    model.run(torch.tensor([TOKENS]), {Address("resid_post", 2): lambda t: seen.append(t[0].clone())}, writes)
    assert largest(parts.relevant) > 1e-3
    assert largest(parts.irrelevant[0] - seen[0]) <= 1e-9


def test_attention_that_the_rules_do_not_reproduce_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import probes.decomposition.decomposer as module

    right = module.scoring_of
    monkeypatch.setattr(module, "scoring_of", lambda *a: replace(right(*a), scale=0.9 * right(*a).scale))
    with pytest.raises(PointError, match="the attention probabilities of block 0 are not what the rules compute"):
        opened("llama").prepare(TOKENS)


def test_what_cannot_be_decomposed_is_refused_by_name() -> None:
    model = double("llama", seed=3)
    norm = model.component("ln2", 1)
    plain = norm.forward
    norm.forward = lambda x: plain(x).clamp(-0.5, 0.5)  # type: ignore[method-assign]
    with pytest.raises(PointError, match="block 1, ln2: LlamaRMSNorm is neither"):
        Decomposer(model, TOKENS)
    norm.forward = plain  # type: ignore[method-assign]
    act = model.component("mlp", 2).act_fn
    act.forward = lambda x: torch.sin(3 * x) + x.mean(-1, keepdim=True)  # type: ignore[union-attr,method-assign,assignment]
    model.component("mlp", 2).forward = lambda x: x.flip(-1)  # type: ignore[method-assign]
    with pytest.raises(PointError, match="block 2: mlp"):
        Decomposer(model, TOKENS)


@pytest.mark.parametrize(
    ("source", "text"),
    [(head(9, 0), "layer 9 does not exist; legal are 0 to 2"), (head(0, 9), "head 9"), (token(20), "position 20")],
)
def test_nodes_that_do_not_exist_are_refused(source: object, text: str) -> None:
    with pytest.raises(PointError, match=text):
        decompose(opened("llama"), TOKENS, [(source,)], logits=IDS)  # type: ignore[arg-type]
