"""Attribution patching: exact where the metric is linear, exact softmax changes where attention is saturated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from test_causal_patching import CLEAN, CORRUPTED, native, pair_line
from torch import Tensor

from analyses.causal_patching.attribution import Attributed, pair_metric
from analyses.causal_patching.cells import Cell
from analyses.causal_patching.grid import addresses, capture_values
from analyses.causal_patching.opened import Opener
from analyses.causal_patching.pairs import Pair, pair_of, resolved
from probes.edits.weights import matrix
from probes.gradients import values_and_gradients
from probes.models.backends.native import NativeModel
from probes.points import Address

CAUSAL = tuple(family for family in FAMILIES if family != "bert")


def pair(model: NativeModel) -> Pair:
    return pair_of(0, resolved(model, [pair_line(model)], ["a"], False)[0], False)


def last_metric(
    model: NativeModel, tokens: Tensor, metric: Callable[[Tensor], Tensor], writes: dict[Address, Any]
) -> float:
    rows: list[Tensor] = []
    model.run(tokens, {Address("logits"): lambda t: rows.append(t[:, -1].clone())}, writes)
    return float(metric(rows[0])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_points_are_those_of_small_changes(family: str) -> None:
    model = native(family)
    tokens = torch.tensor([[5, 6, 7, 8]])
    names = ("resid_pre", "z", "q", "v", "mlp_out")
    points = [Address(name, 1) for name in names if model.refusal(Address(name, 1)) is None]
    metric = lambda logits: logits[:, 5] - logits[:, 9]  # noqa: E731
    values, gradients = values_and_gradients(model, tokens, points, metric)
    generator = torch.Generator().manual_seed(0)
    for point in points:
        step = torch.randn(values[point].shape, generator=generator) * 1e-2
        up, down = (last_metric(model, tokens, metric, {point: partial(torch.add, sign * step)}) for sign in (1, -1))
        expected = float((gradients[point] * step).sum())
        assert (up - down) / 2 == pytest.approx(expected, rel=3e-2, abs=5e-5), point


@pytest.mark.parametrize(
    "family", [family for family in CAUSAL if family != "olmo2"]
)  # one norm over all heads' queries
def test_the_fix_for_queries_and_keys_is_exact_up_to_z(family: str) -> None:
    """What a query or key does to z is exact; from there on the gradient at z is followed."""
    model = native(family)
    one = Attributed(model, pair(model), "denoise", "logit_diff")
    kv_heads = model.shape.n_kv_heads
    cells = [Cell("q", 1, 1, 4), Cell("q", 2, 3, 5), Cell("k", 1, kv_heads - 1, 4), Cell("k", 2, 0, 2)]
    source = capture_values(model, CLEAN, {Address(cell.component, cell.layer) for cell in cells})
    base = torch.tensor([CORRUPTED])
    for cell, score in zip(cells, one.with_fix(cells).tolist(), strict=True):
        z, address = Address("z", cell.layer), Address(cell.component, cell.layer)
        values, gradients = values_and_gradients(model, base, [z], pair_metric(one.pair, "logit_diff"))

        def put(tensor: Tensor, cell: Cell = cell, address: Address = address) -> Tensor:
            out = tensor.clone()
            out[0, cell.position, cell.head] = source[address][cell.position, cell.head]
            return out

        patched: list[Tensor] = []
        model.run(base, {z: lambda t, kept=patched: kept.append(t.clone())}, {address: put})
        expected = float(((patched[0] - values[z]) * gradients[z]).sum())
        assert score == pytest.approx(expected, rel=1e-3, abs=1e-5), cell


def test_dropped_gradients_pass_the_skip_path_alone() -> None:
    model = native("llama")
    metric = pair_metric(pair(model), "logit_diff")
    points = [Address("mlp_out", 1), Address("resid_pre", 1), Address("resid_post", 1)]
    _, gradients = values_and_gradients(model, torch.tensor([CLEAN]), points, metric, stopped_block=1)
    assert not gradients[points[0]].any()
    assert torch.allclose(gradients[points[1]], gradients[points[2]], atol=1e-6)
    assert gradients[points[1]].any()


def straightened(family: str, whole: bool) -> NativeModel:
    """A tiny model whose norms divide by what their epsilon makes constant; with `whole`, nothing else bends either.

    Then queries are zero, so that attention is even, and MLPs write nothing that depends on their input.
    """
    module = make(family)
    module.config.final_logit_softcapping = None
    model = NativeModel(module, ref=f"straight-{family}", weights=f"straight-{family}")
    with torch.no_grad():
        for part in module.modules():
            for name in ("eps", "variance_epsilon"):
                if hasattr(part, name):
                    setattr(part, name, 1e6)
                    part.weight.fill_(1000)
        for layer in range(model.shape.n_layers if whole else 0):
            anatomy = model.anatomy
            if anatomy.map.path("attn.qkv", layer):
                projection, columns = anatomy.component("attn.qkv", layer), anatomy.layout.q.flatten()
            else:
                projection = anatomy.component("attn.q", layer)
                columns = torch.arange(projection.weight.shape[0])
            weight, rows = matrix(projection, model.shape.d_model)
            (weight if rows else weight.T)[:, columns] = 0
            if projection.bias is not None:
                projection.bias[columns] = 0
            parts = ["mlp"] if anatomy.map.path("mlp", layer) else ["mlp.in", "mlp.out"]
            for parameter in (p for part in parts for p in anatomy.component(part, layer).parameters()):
                parameter.zero_()
    return model


def effects_of(model: NativeModel, cells: list[Cell]) -> tuple[Tensor, Tensor, float]:
    """Return predicted and exact effects of cells under denoising, and the gap."""
    one = pair(model)
    opened = Opener(model, ("logit_diff",), frozenset(addresses(cells))).open(one, ("denoise",), None)[0]
    exact = opened.patched(cells)[:, 0] - opened.base[0]
    return Attributed(model, one, "denoise", "logit_diff").scores(cells, "atp").double(), exact, float(opened.gap[0])


@pytest.mark.parametrize("family", CAUSAL)
def test_attribution_is_exact_where_the_metric_is_linear(family: str) -> None:
    """After the last block only the final norm is left, and here it does not bend."""
    last = 2
    cells = [Cell("resid_post", last, position=5)]
    cells += [Cell("mlp_out", last, position=5)] if family != "opt_post_norm" else []
    predicted, exact, gap = effects_of(straightened(family, whole=False), cells)
    assert abs(gap) > 0
    assert torch.allclose(predicted, exact, rtol=2e-3, atol=2e-3 * abs(gap))


@pytest.mark.parametrize("family", CAUSAL)
def test_in_a_linear_net_the_rows_of_every_layer_hold_the_whole_gap(family: str) -> None:
    cells = [Cell("resid_post", layer) for layer in range(3)]
    predicted, exact, gap = effects_of(straightened(family, whole=True), cells)
    assert abs(gap) > 0
    assert torch.allclose(predicted, torch.full((3,), gap, dtype=torch.double), rtol=2e-3)
    assert torch.allclose(exact, predicted, rtol=2e-3)
