"""Edges: exact path patching against hand-made forwards, and the sums that edge attribution must keep."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from families import FAMILIES, make
from test_causal_patching import CLEAN, CORRUPTED, native
from test_causal_patching_attribution import pair
from torch import Tensor

from analyses.causal_patching.attribution import Attributed
from analyses.causal_patching.cells import Cell
from analyses.causal_patching.edges import EdgeAttribution, Line
from analyses.causal_patching.figure_graph import graph, largest, place
from analyses.causal_patching.graph import Receiver, Sender, count_edges, parse_edges, receivers_of, senders_of
from analyses.causal_patching.grid import Sources, capture_values
from analyses.causal_patching.paths import PathGrid, sender_changes, written_points
from analyses.causal_patching.resumed_grid import ResumedGrid
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.rerouting import module_of
from probes.edits import Replace, Values, read
from probes.errors import OptionError, PointError
from probes.models.backends.native import NativeModel
from probes.points import Address

ADDING = tuple(family for family in FAMILIES if family not in ("bert", "opt_post_norm"))


def changes_of(model: NativeModel, senders: list[Sender]) -> Tensor:
    points = written_points(model.shape.n_layers)
    base, source = (capture_values(model, tokens, points) for tokens in (CORRUPTED, CLEAN))
    return sender_changes(model, senders, base, Sources(source, {p: p for p in range(len(CLEAN))}))


def paths(model: NativeModel, through: str = "residual") -> PathGrid:
    with module_of(model) as (_, anatomy):
        return PathGrid(model, ResumedGrid(CachedPrompt(model, CORRUPTED, 2)), anatomy.parallel, through)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ADDING)
def test_what_senders_write_adds_up_to_the_stream(family: str) -> None:
    model = native(family)
    senders = [sender for sender in senders_of(model.shape) if sender.layer < 2]
    changes = changes_of(model, senders)
    at = Address("resid_pre", 2)
    clean, corrupted = (capture_values(model, tokens, {at})[at] for tokens in (CLEAN, CORRUPTED))
    with module_of(model) as (_, anatomy):
        sandwich = anatomy.map.path("ln1_post", 0) is not None
    if not sandwich:
        assert torch.allclose(changes.sum(0), clean - corrupted, atol=1e-4)
    assert float(changes[:, :2].abs().max()) < 1e-6


@pytest.mark.parametrize("family", ADDING)
def test_an_edge_is_the_hand_made_one(family: str) -> None:
    """The receiver's input is what its projection makes of the changed stream, and all else is the patched run's."""
    model = native(family)
    grid = paths(model)
    sender, receiver = Sender(0, 1), Receiver(2, "q", 3)
    change = changes_of(model, [sender])
    tokens = torch.tensor([CORRUPTED])
    queries: list[Tensor] = []
    model.run(
        tokens, {Address("q", 2): lambda t: queries.append(t.clone())}, {Address("resid_pre", 2): lambda t: t + change}
    )

    def put(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        out[:, :, 3] = queries[0][:, :, 3]
        return out

    last: list[Tensor] = []
    model.run(tokens, {Address("resid_post", 2): lambda t: last.append(t[0, -1].clone())}, {Address("q", 2): put})
    edges = [(sender, receiver), (sender, Receiver(3, "logits"))]
    rows = grid.last_rows(edges, {sender: change[0]})
    assert torch.allclose(rows[0], last[0], atol=1e-4)
    assert torch.allclose(rows[1], grid.grid.unpatched + change[0, -1], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_all_edges_out_of_a_sender_are_the_sender_itself(family: str) -> None:
    """With one receiver's layer left, patching every edge of a last-block sender is patching the sender."""
    model = native(family)
    sender = Sender(2)
    change = changes_of(model, [sender])
    row = paths(model).last_rows([(sender, Receiver(3, "logits"))], {sender: change[0]})[0]
    base = CachedPrompt(model, CORRUPTED, 2)
    sources = Sources(capture_values(model, CLEAN, {Address("mlp_out", 2)}), {p: p for p in range(6)})
    node = ResumedGrid(base).last_rows([Cell("mlp_out", 2, position=5)], sources)[0]
    assert torch.allclose(row, node, atol=1e-4)


@pytest.mark.parametrize("family", ADDING)
def test_edges_of_a_sender_sum_to_its_attribution(family: str) -> None:
    model = native(family)
    attribution = EdgeAttribution.of(model)
    one = pair(model)
    senders = [Sender(-1), Sender(0), Sender(1), Sender(2)] + [Sender(1, head) for head in range(4)]
    gradients = attribution.receiver_gradients(CORRUPTED, one, "logit_diff", {}, [1.0])
    table = attribution.scores(gradients, senders, changes_of(model, senders))
    cells = [[Cell("resid_pre", 0, position=p) for p in range(2, 6)]]
    cells += [[Cell("mlp_out", layer, position=p) for p in range(2, 6)] for layer in range(3)]
    with module_of(model) as (_, anatomy):
        heads = anatomy.map.path("ln1_post", 0) is None
    cells += [[Cell("z", 1, head, p) for p in range(2, 6)] for head in range(4)] if heads else []
    attributed = Attributed(model, one, "denoise", "logit_diff")
    for row, own in zip(table, cells, strict=False):
        expected = float(attributed.scores(own, "atp").sum())
        assert float(row.nansum()) == pytest.approx(expected, rel=2e-3, abs=2e-4)


def nearer(family: str, share: float) -> NativeModel:
    """A tiny model in which the tokens that the prompts differ in lie nearer to one another, so that less bends between them."""
    module = make(family)
    table = module.get_input_embeddings().weight
    with torch.no_grad():
        for clean, corrupted in zip(CLEAN, CORRUPTED, strict=True):
            table[corrupted] = table[clean] + share * (table[corrupted] - table[clean])
    return NativeModel(module, ref=f"near-{family}", weights=f"near-{family}-{share}")


@pytest.mark.parametrize("family", ADDING)
def test_gradients_along_the_line_sum_to_the_gap(family: str) -> None:
    """Five nodes are within a hundredth where the line is short; along the whole line the sum comes nearer as they grow."""
    # Where the routing of experts switches along the line, the metric jumps, and no gradient sees that.
    routed = family == "mixtral"
    short = nearer(family, 0.01 if routed else 0.2), 1, 5
    for model, few, many in (short,) if routed else (short, (native(family), 2, 40)):
        attribution, one = EdgeAttribution.of(model), pair(model)
        gap = 0.0
        for sign, tokens in ((1, CLEAN), (-1, CORRUPTED)):
            at = Address("logits")
            logits = capture_values(model, tokens, {at})[at][-1]
            gap += sign * float(logits[list(one.answers)].mean() - logits[list(one.distractors)].mean())
        change, sums = changes_of(model, [Sender(-1)]), {}
        for steps in (few, many):
            ((_, gradients),) = attribution.along(one, "denoise", "logit_diff", Line(steps, "gauss", "inputs"))
            sums[steps] = float(attribution.scores(gradients, [Sender(-1)], change).nansum())
        assert sums[many] == pytest.approx(gap, rel=0.01)
        assert abs(sums[many] - gap) < abs(sums[few] - gap)


@pytest.mark.parametrize("family", ADDING)
def test_a_component_on_the_line_by_itself_sums_to_its_own_effect(family: str) -> None:
    """Along its own line, the edges out of the embedding, an attention or an MLP add up to what patching it alone does."""
    model = nearer(family, 0.01 if family == "mixtral" else 0.2)  # routing jumps along a longer line
    attribution, one = EdgeAttribution.of(model), pair(model)
    with module_of(model) as (_, anatomy):
        sandwich = anatomy.map.path("ln1_post", 0) is not None
    senders, addresses = senders_of(model.shape), [Address("embed")]
    addresses += [Address(name, layer) for layer in range(3) for name in ("attn_out", "mlp_out")]
    values = capture_values(model, CLEAN, {*addresses})
    changes, seen = changes_of(model, senders), 0

    def gap(edits: list[Replace]) -> float:
        logits = read(model, torch.tensor([CORRUPTED]), [Address("logits")], edits)[Address("logits")][0, -1]
        return float(logits[list(one.answers)].mean() - logits[list(one.distractors)].mean())

    whole = gap([Replace(address=Address("embed"), value=Values(values[Address("embed")]))]) - gap([])
    lines = attribution.along(one, "denoise", "logit_diff", Line(8, "gauss", "activations"))
    for address, (rows, gradients) in zip(addresses, lines, strict=True):
        seen += len(senders[rows])
        if address.point == "attn_out" and sandwich:  # the norm behind all heads is not any one head's
            continue
        edges = attribution.scores(gradients, senders[rows], changes[rows]).nansum()
        exact = gap([Replace(address=address, value=Values(values[address]))]) - gap([])
        assert float(edges) == pytest.approx(exact, rel=0.01, abs=0.005 * abs(whole))
    assert seen == len(senders)


def test_rules_of_the_line_integrate_what_they_should() -> None:
    for rule, degree in (("left", 0), ("right", 0), ("midpoint", 1), ("gauss", 9)):
        places, weights = Line(5, rule, "inputs").places  # type: ignore[arg-type]
        for power in range(degree + 1):
            integral = sum(w * p**power for p, w in zip(places, weights, strict=True))
            assert integral == pytest.approx(1 / (power + 1))
    assert Line(4, "left", "inputs").places[0] == [0, 0.25, 0.5, 0.75]


def test_edges_are_counted_as_published() -> None:
    """32,491 edges of GPT-2 small (Mueller et al. 2025); grouped keys and values are fewer."""
    from probes.models.protocol import Shape

    gpt2 = Shape("GPT2LMHeadModel", 12, 768, 12, 12, 64, 3072, 50257, 1024, True)
    qwen = Shape("Qwen2ForCausalLM", 24, 896, 14, 2, 64, 4864, 151936, 32768, True)
    assert count_edges(gpt2, False) == count_edges(gpt2, False, expanded=True) == 32_491
    assert (count_edges(qwen, False, expanded=True), count_edges(qwen, False)) == (179_749, 79_813)
    assert len(receivers_of(qwen)) == 24 * (14 + 2 + 2 + 1) + 1


def test_paths_are_named_and_refused_by_name() -> None:
    shape = native("llama").shape
    assert parse_edges(["0.1>2.3.q", "embed>m0", "m1 > logits"], shape, False)[1] == (Sender(-1), Receiver(0, "mlp"))
    for text, said in (("0.9>2.0.q", "layers are 0 to 2"), ("2.0>1.0.q", "leads nowhere"), ("0.1", "SENDER>RECEIVER")):
        with pytest.raises(OptionError, match=said):
            parse_edges([text], shape, False)


def test_models_that_normalise_sums_have_no_edges() -> None:
    with pytest.raises(PointError, match="normalises each sum"):
        EdgeAttribution.of(native("opt_post_norm"))


def test_query_heads_that_share_a_key_can_be_told_apart() -> None:
    """What every query head of a group sees alone adds up, at their z, to what the group sees together."""
    model = native("llama")
    grid, sender = paths(model), Sender(0)
    changes = {sender: changes_of(model, [sender])[0]}
    alone = parse_edges(["m0>2.2.k", "m0>2.3.k", "m0>2.0.k"], model.shape, False, alone=True)
    rows = grid.last_rows([*alone, (sender, Receiver(2, "k", 1))], changes) - grid.grid.unpatched
    assert [receiver.unit for _, receiver in alone] == ["query_head"] * 3
    assert float((rows[0] - rows[1]).abs().max()) > 1e-3
    # Of the last block only its own MLP mixes the two, so their sum is near the group's, and another group's is not.
    shared = rows[3]
    near, far = (float((value - shared).norm() / shared.norm()) for value in (rows[0] + rows[1], rows[2]))
    assert near < 0.2 < far


def test_a_path_through_mlps_differs_only_where_one_lies_between() -> None:
    model = native("llama")
    receiver = Receiver(1, "mlp")
    for sender, between in ((Sender(-1), True), (Sender(0), False)):
        changes = {sender: changes_of(model, [sender])[0]}
        direct, through = (
            paths(model, way).last_rows([(sender, receiver)], changes)[0] for way in ("residual", "mlps")
        )
        assert bool((direct - through).abs().max() > 1e-3) == between


def test_the_graph_draws_the_largest_by_what_was_patched() -> None:
    """An estimate stands only where nothing was patched; heads of keys and values lie in the middle of their group."""
    names = [
        ("embed", "m0", 1.0, -9.0),
        ("0.1", "2.1.k", 5.0, 0.5),
        ("m0", "logits", -2.0, math.nan),
        ("1.3", "m2", 8.0, 0.0),
    ]
    edges = pd.DataFrame(names, columns=["sender", "receiver", "score", "exact"])
    units = {"m0": "mlp", "2.1.k": "kv_head", "logits": "logits", "m2": "mlp"}
    edges = edges.assign(
        method="eap", direction="noise", receiver_unit=edges["receiver"].map(units), verified=edges["exact"].notna()
    )
    kept = pd.DataFrame({"metric": ["logit_diff"], "kept": [True], "corruption": ["token"]})
    tables = {"edges": edges, "pairs": kept}
    assert list(largest(tables)["size"]) == [-9.0, -2.0, 0.5, 0.0]
    assert place("2.1.k", 3, 4, 2) == (2.5, 2.0)
    assert place("1.3", 3, 4, 1) == (3.0, 1.0)
    assert place("m0", 3, 4, 2) == (4.5, 0.5)
    thickest = {}
    for trace in graph(tables).data:
        if trace.mode == "lines" and trace.x[0] is not None:
            thickest |= dict.fromkeys(zip(trace.x[::3], trace.y[::3], strict=True), trace.line.width)
            assert (trace.line.dash == "dot") == ((4.5, 0.5) in zip(trace.x[::3], trace.y[::3], strict=True))
    assert thickest == {(1.5, -1.0): 7.0, (4.5, 0.5): 1.0, (1.0, 0.0): 1.0}
