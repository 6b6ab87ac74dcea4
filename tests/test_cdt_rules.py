"""The rules by hand, and the whole walk beside a two-sided one written out for GPT-2."""

from __future__ import annotations

import pytest
import torch
from doubled import double, float64
from families import prompt
from torch import Tensor, nn

from probes.decomposition import Rules, decompose, head
from probes.decomposition import rules as rule
from probes.decomposition.nodes import groups
from probes.errors import OptionError
from probes.models.backends.native import NativeModel
from probes.points import Address

TOKENS = prompt()[0].tolist()
Pair = tuple[Tensor, Tensor]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_bias_is_shared_by_magnitude() -> None:
    linear = rule.Linear(torch.eye(3, dtype=torch.float64), vector(10, 10, 10))
    total = vector(4, -2, 0)
    rel = vector(1, -3, 0)
    # Irrelevant parts 3, 1 and 0: shares 1/4, 3/4 and, where both are 0, none.
    assert rule.linear(rel, linear, total, Rules(bias="shared")).tolist() == [1 + 2.5, -3 + 7.5, 0]
    assert rule.linear(rel, linear, total, Rules(bias="irrelevant")).tolist() == [1, -3, 0]


def test_the_larger_part_takes_the_sum_where_signs_differ() -> None:
    total, rel = vector(1, 1, 5, -1), vector(3, -2, 2, 0)
    assert rule.dominate(rel, total, Rules(normalise="on")).tolist() == [1, 0, 2, 0]
    assert rule.dominate(rel, total, Rules(normalise="off")).tolist() == rel.tolist()


def test_an_activation_is_split_by_removal_or_by_both_orders() -> None:
    total, rel = vector(3), vector(5)
    out = torch.relu(total)
    assert rule.function(torch.relu, (rel,), (total,), Rules(), out).item() == 3  # relu(3) - relu(-2)
    assert rule.function(torch.relu, (rel,), (total,), Rules(activation="shapley"), out).item() == 4  # (3 + 5) / 2


def test_a_gated_product_gives_cross_terms_to_the_relevant_part_or_halves_them() -> None:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return gate * up

    rels, totals = (vector(1), vector(2)), (vector(4), vector(7))
    out = product(*totals)
    assert rule.function(product, rels, totals, Rules(), out).item() == 28 - 3 * 5
    assert rule.function(product, rels, totals, Rules(activation="shapley"), out).item() == (13 + 2) / 2


def test_a_norm_divides_by_the_totals_scale() -> None:
    norm = rule.Norm(vector(2, 2), vector(1, 1), 0.0, centred=True)
    total, rel = vector(5, 1), vector(3, 1)  # mean 3, scale 2
    assert rule.norm(rel, norm, total, Rules()).tolist() == [1, -1]
    assert rule.norm(rel, norm, total, Rules(bias="shared")).tolist() == [1 + 3 / 5, -1 + 1]


def test_an_unknown_switch_names_the_legal_ones() -> None:
    with pytest.raises(OptionError, match=r"rule for bias 'sharde'.*Did you mean 'shared'"):
        Rules(bias="sharde")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown preset 'papers'"):
        decompose(None, TOKENS, [], rules="papers")  # type: ignore[arg-type]


def test_sources_are_batched_by_where_they_begin() -> None:
    sources = [(head(layer, h, p),) for p in (6, 0) for layer in (1, 0) for h in range(3)]
    batches = groups(sources, 8, rows=16, causal=True)
    assert sorted(i for group in batches for i in group) == list(range(len(sources)))
    for group in batches:
        layers = [sources[i][0].layer for i in group]
        assert layers == sorted(layers)
        width = 8 - min(sources[i][0].position for i in group)
        assert len(group) * width <= 16


# The authors' conventions written out for GPT-2, both parts carried side by side.


def _shares(rel: Tensor, irr: Tensor) -> Pair:
    both = rel.abs() + irr.abs()
    both = torch.where(both == 0, torch.ones_like(both), both)
    return rel.abs() / both, irr.abs() / both


def _linear(parts: Pair, weight: Tensor, bias: Tensor) -> Pair:
    rel, irr = (part @ weight for part in parts)
    a, b = _shares(rel, irr)
    return rel + bias * a, irr + bias * b


def _layer_norm(parts: Pair, norm: nn.LayerNorm) -> Pair:
    total = parts[0] + parts[1]
    scale = (total.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return tuple(  # type: ignore[return-value]
        (part - part.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias * share
        for part, share in zip(parts, _shares(*parts), strict=True)
    )


def _normalise(parts: Pair) -> Pair:
    rel, irr = parts
    differ, larger = rel * irr < 0, rel.abs() > irr.abs()
    total = rel + irr
    zero = torch.zeros_like(rel)
    return (
        torch.where(differ, torch.where(larger, total, zero), rel),
        torch.where(differ, torch.where(larger, zero, total), irr),
    )


def _attention(parts: Pair, attn: nn.Module, d_head: int) -> Pair:
    n = parts[0].shape[-2]
    joint = _linear(parts, attn.c_attn.weight, attn.c_attn.bias)  # type: ignore[union-attr,arg-type]
    q, k, v = zip(*(part.unflatten(-1, (3, -1, d_head)).transpose(-4, -2).unbind(-3) for part in joint), strict=True)
    mask = torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1)

    def pattern(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(-1, -2) / d_head**0.5 + mask).softmax(-1)

    whole = pattern(q[0] + q[1], k[0] + k[1]) @ (v[0] + v[1])
    rel = pattern(q[0], k[0]) @ v[0]
    return tuple(part.transpose(-3, -2) for part in (rel, whole - rel))  # type: ignore[return-value]


def _two_sided(model: NativeModel, embedded: Tensor, layer: int, h: int, position: int) -> Pair:
    """Logits of one head at one position declared relevant as it is, under the authors' rules."""
    module = model.module.transformer  # type: ignore[union-attr]
    parts: Pair = (torch.zeros_like(embedded), embedded)
    for index, block in enumerate(module.h):  # type: ignore[arg-type,union-attr]
        z = _attention(_layer_norm(parts, block.ln_1), block.attn, model.shape.d_head)
        if index == layer:
            z[0][position, h] += z[1][position, h]
            z[1][position, h] = 0
        flat: Pair = (z[0].flatten(-2), z[1].flatten(-2))
        added = _linear(flat, block.attn.c_proj.weight, block.attn.c_proj.bias)
        parts = (parts[0] + added[0], parts[1] + added[1])
        units = _normalise(_linear(_layer_norm(parts, block.ln_2), block.mlp.c_fc.weight, block.mlp.c_fc.bias))
        irr = block.mlp.act(units[1])
        hidden = (block.mlp.act(units[0] + units[1]) - irr, irr)
        out = _normalise(_linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias))
        parts = _normalise((parts[0] + out[0], parts[1] + out[1]))
    final = _layer_norm(parts, module.ln_f)  # type: ignore[union-attr,arg-type]
    unembed = model.module.lm_head.weight.T  # type: ignore[union-attr,operator]
    return final[0] @ unembed, final[1] @ unembed


@pytest.mark.parametrize(("layer", "h", "position"), [(0, 1, 0), (1, 3, 4), (2, 0, 8)])
def test_the_paper_preset_is_the_authors_walk(layer: int, h: int, position: int) -> None:
    with float64(), torch.no_grad():
        model = double("gpt2", seed=4)
        module = model.module.transformer  # type: ignore[union-attr]
        ids = torch.tensor(TOKENS)
        embedded = module.wte(ids) + module.wpe(torch.arange(len(ids)))  # type: ignore[union-attr,operator]
        expected = _two_sided(model, embedded, layer, h, position)
        parts = decompose(model, TOKENS, [(head(layer, h, position),)], logits=range(97), rules="paper")["logits"]
        assert torch.allclose(parts.relevant[0], expected[0], atol=1e-9)
        assert torch.allclose(parts.irrelevant[0], expected[1], atol=1e-9)
        assert float(parts.relevant[0].abs().max()) > 1e-3


def test_the_released_epsilon_is_another_models_configuration() -> None:
    """The released code puts 1e-8 in place of a norm's epsilon: that is the same walk over a model that has it."""
    with float64(), torch.no_grad():
        model, released = double("gpt2", seed=4), double("gpt2", seed=4)
        for norm in (part for part in released.module.modules() if isinstance(part, nn.LayerNorm)):
            norm.eps = 1e-8
        module = released.module.transformer  # type: ignore[union-attr]
        embedded = module.wte(torch.tensor(TOKENS)) + module.wpe(torch.arange(len(TOKENS)))  # type: ignore[union-attr,operator]
        expected = _two_sided(released, embedded, 0, 1, 2)
        own, other = (
            decompose(m, TOKENS, [(head(0, 1, 2),)], logits=range(97), rules="paper")["logits"]
            for m in (model, released)
        )
        assert torch.allclose(other.relevant[0], expected[0], atol=1e-9)
        assert float((own.relevant - other.relevant).abs().max()) > 1e-6
        assert float((own.total - other.total).abs().max()) > 1e-6
        run: list[Tensor] = []
        model.run(torch.tensor([TOKENS]), {Address("logits"): lambda t: run.append(t[0].clone())})
        assert torch.allclose(own.relevant[0] + own.irrelevant[0], run[0], atol=1e-9)


def test_rules_that_would_give_parts_of_another_models_logits_are_not_offered() -> None:
    with pytest.raises(TypeError, match="eps"):
        Rules(eps="released")  # type: ignore[call-arg]
