"""Composition scores: exact identities, invariances, the null, planted channels; and the analysis built on them."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, make, prompt, shared
from torch import Tensor, nn

from probes.edits import Coefficients, HeadWriteEdit, Values, logits, read
from probes.hooks.attention_probabilities import Attended, watched
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.weights import composition as comp
from probes.weights.composition import Circuit, Heads
from probes.weights.head_weights import head_weights, rotary


def native(module: nn.Module) -> NativeModel:
    return NativeModel(module, ref="tiny", weights="digest")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(n_layers: int = 3, n_heads: int = 2, d: int = 24, k: int = 4, seed: int = 0) -> Heads:
    w = [rand(n_layers, n_heads, d, k, seed=seed + i) for i in range(3)]
    return Heads(*w, rand(n_layers, n_heads, k, d, seed=seed + 3), fold_norm=False)


def full(circuit: Circuit) -> Tensor:
    return circuit.left @ circuit.right


def naive(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a @ b) / torch.linalg.matrix_norm(a) / torch.linalg.matrix_norm(b)


@pytest.mark.parametrize("kind", comp.KINDS)
def test_scores_are_the_full_width_ones(kind: comp.Kind) -> None:
    h = heads()
    scores = comp.composition_scores(h.ov, h.reader(kind))
    target = {"q": h.w_q @ h.w_k.mT, "k": h.w_k @ h.w_q.mT, "v": h.w_v @ h.w_o}[kind]
    for i, a, j, b in [(0, 0, 1, 1), (0, 1, 2, 0), (1, 0, 2, 1)]:
        torch.testing.assert_close(scores[i, a, j, b], naive(h.w_v[i, a] @ h.w_o[i, a], target[j, b]))
    layer = torch.arange(3)
    earlier = (layer[:, None] < layer[None])[:, None, :, None].expand_as(scores)
    assert torch.equal(scores.isnan(), ~earlier)


def test_svd_is_exact_and_its_components_sum_to_the_output() -> None:
    h = heads()
    read_, s, write = h.ov.svd
    torch.testing.assert_close(torch.einsum("lhk,lhkd,lhke->lhde", s, read_, write), full(h.ov), atol=1e-4, rtol=1e-5)
    eye = torch.eye(4).expand(3, 2, 4, 4)
    torch.testing.assert_close(write @ write.mT, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(read_ @ read_.mT, eye, atol=1e-5, rtol=0)
    x = rand(5, 24, seed=9)
    parts = torch.stack([(x @ read_[1, 0, i])[:, None] * s[1, 0, i] * write[1, 0, i] for i in range(4)])
    torch.testing.assert_close(parts.sum(0), x @ h.w_v[1, 0] @ h.w_o[1, 0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", comp.KINDS)
def test_recombination_identities(kind: comp.Kind) -> None:
    h = heads(seed=5)
    source, target = Circuit(h.w_v[0, 1], h.w_o[0, 1]), h.reader(kind)
    target = Circuit(target.left[2, 0], target.right[2, 0])
    whole = naive(full(source), full(target)).square()
    s2, t2 = source.svd[1].square(), target.svd[1].square()
    each = comp.component_scores(source, target).square()
    torch.testing.assert_close((s2 * each).sum() / s2.sum(), whole)
    pairs = comp.pairwise_scores(source, target).square()
    torch.testing.assert_close((s2[:, None] * t2 * pairs).sum() / (s2.sum() * t2.sum()), whole)
    assert (each.sqrt() <= t2.max().sqrt() / target.norm + 1e-6).all()
    torch.testing.assert_close(comp.principal_angles(source, target), pairs.sum() / 4)


def test_gauge_rotation_and_scale_do_not_change_scores() -> None:
    h = heads(seed=2)
    g, (rotate, _) = rand(4, 4, seed=7) + 3 * torch.eye(4), torch.linalg.qr(rand(24, 24, seed=8))
    gauge = Heads(h.w_q @ g, h.w_k @ torch.linalg.inv(g).T, h.w_v @ g, torch.linalg.inv(g) @ h.w_o, False)
    turned = Heads(*(rotate.T @ w for w in (h.w_q, h.w_k, h.w_v)), h.w_o @ rotate, False)
    scaled = Heads(h.w_q * 3, h.w_k * 0.2, h.w_v * 7, h.w_o * 0.01, False)
    for kind in comp.KINDS:
        expected = comp.composition_scores(h.ov, h.reader(kind))
        parts = comp.component_scores(h.ov, h.reader(kind))
        for other in (gauge, turned, scaled):
            scores = comp.composition_scores(other.ov, other.reader(kind))
            torch.testing.assert_close(scores, expected, equal_nan=True, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(comp.component_scores(other.ov, other.reader(kind)), parts, atol=1e-5, rtol=1e-4)


def test_the_random_null_has_the_analytic_moments() -> None:
    target = Circuit(rand(256, 16, seed=1), rand(16, 256, seed=2))
    mean, spread = comp.analytic_null(target)
    squares = comp.random_null(target, 4000, seed=3).square()
    torch.testing.assert_close(squares.mean(), mean, atol=4 * float(spread) / 4000**0.5, rtol=0)
    torch.testing.assert_close(squares.std(), spread, rtol=0.1, atol=0)


def test_p_values_are_uniform_on_random_weights() -> None:
    h = Heads(*(rand(2, 8, 256, 16, seed=i) for i in range(3)), rand(2, 8, 16, 256, seed=3), False)
    target = h.reader("q")
    late = Circuit(target.left[1], target.right[1])
    null = comp.random_null(late, 1999, seed=11)
    early = Circuit(h.w_v[0][:, None], h.w_o[0][:, None])
    scores = comp.component_scores(early, Circuit(late.left[None], late.right[None]))
    p = comp.exceedance(scores, null[:, None].expand(-1, 8, -1)).flatten()
    ranks = (torch.arange(len(p)) + 0.5) / len(p)
    # Components that meet the same target share its null, so the bound is looser than for independent draws.
    assert (p.sort().values - ranks).abs().max() < 0.08
    assert (comp.benjamini_hochberg(p) < 0.05).sum() <= 1


def test_benjamini_hochberg_by_hand() -> None:
    adjusted = comp.benjamini_hochberg(torch.tensor([0.04, 0.01, 0.5, 0.02]))
    torch.testing.assert_close(adjusted, torch.tensor([0.04 * 4 / 3, 0.04, 0.5, 0.04]))


def test_a_planted_channel_stands_out_where_the_whole_score_does_not() -> None:
    d, k = 768, 64
    ov, qk = Circuit(rand(d, k, seed=1), rand(k, d, seed=2)), Circuit(rand(d, k, seed=3), rand(k, d, seed=4))
    unit = [torch.nn.functional.normalize(rand(d, seed=seed), dim=0)[:, None] for seed in (5, 6, 7)]
    come_from, channel, go_to = unit

    def planted(circuit: Circuit, enters: Tensor, leaves: Tensor) -> Circuit:
        """Of unit norm, plus a fifth of a unit of one direction to another."""
        left = torch.cat((circuit.left / circuit.norm, 0.2 * enters), dim=1)
        return Circuit(left, torch.cat((circuit.right, leaves.T)))

    source, target = planted(ov, come_from, channel), planted(qk, channel, go_to)
    scores = comp.component_scores(source, target)
    z = comp.robust_z(scores)
    strongest = int(z.argmax())
    assert z[strongest] > 20
    assert (source.svd[2][strongest] @ channel).abs() > 0.5
    assert z.sort().values[-2] < 5
    null = d**-0.5
    assert scores[strongest] > 4 * null
    assert naive(full(source), full(target)) < 1.6 * null
    assert naive(full(ov), full(qk)) < 1.1 * null


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_weights_reproduce_queries_keys_values_and_output(family: str) -> None:
    model, tokens = native(shared(family)), prompt()
    h = head_weights(model, fold_norm=False)
    points = [Address(name, 1) for name in ("attn_in", "q", "k", "v", "z")]
    activations = read(model, tokens, points)
    x = activations[points[0]]
    zero = read(model, tokens, points, [])  # a second forward: reading changes nothing
    assert torch.equal(zero[points[0]], x)
    group = model.shape.n_heads // model.shape.n_kv_heads
    for point, w in zip(points[1:4], (h.w_q, h.w_k, h.w_v), strict=True):
        product = torch.einsum("bpd,hdk->bphk", x, w[1])
        theirs = activations[point] if point.point == "q" else activations[point].repeat_interleave(group, dim=2)
        # What is left is the projection's bias, the same at every position.
        rest = theirs - product
        torch.testing.assert_close(rest, rest[:, :1].expand_as(rest), atol=1e-5, rtol=1e-4)
    out = model.component("attn.o", 1)
    z = activations[points[4]]
    bias = getattr(out, "bias", None)
    product = torch.einsum("bphk,hkd->bpd", z, h.w_o[1]) + (0 if bias is None else bias)
    torch.testing.assert_close(out(z.flatten(-2)), product, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt", "gpt_neox"])
def test_folding_moves_the_gain_and_the_centring_into_the_weights(family: str) -> None:
    model, tokens = native(shared(family)), prompt()
    folded, plain = head_weights(model), head_weights(model, fold_norm=False)
    points = [Address("resid_pre", 1), Address("attn_in", 1), Address("attn_scale", 1)]
    pre, x, scale = (read(model, tokens, points)[point] for point in points)
    difference = torch.einsum("bpd,hdk->bphk", x, plain.w_q[1]) - torch.einsum(
        "bpd,hdk->bphk", pre / scale[..., None], folded.w_q[1]
    )
    # The norm's own bias remains, the same at every position.
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-4, rtol=1e-4)
    if family != "gpt2":
        return
    ones = torch.ones(32)
    assert (ones @ folded.w_q[1]).abs().max() < 1e-4
    assert (ones @ head_weights(model, center=False).w_q[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_rotary_matrix_gives_the_model_s_own_scores(family: str) -> None:
    module = make(family)
    model, tokens, seen = native(module), prompt(), list[Attended]()
    with watched(module.config, dict.fromkeys(model.component("attn", 1).modules(), 1), {1: seen.append}):
        raw = read(model, tokens, [Address("q", 1), Address("k", 1), Address("resid_post", 1)])
    q, k = raw[Address("q", 1)][0], raw[Address("k", 1)][0].repeat_interleave(4 // model.shape.n_kv_heads, 1)
    for query, key in ((6, 2), (8, 7), (3, 3)):
        matrix = rotary(model, query - key)
        score = q[query, 3] @ (torch.eye(len(q[0, 0])) if matrix is None else matrix) @ k[key, 3]
        keys = seen[0].key.repeat_interleave(4 // seen[0].key.shape[1], 1)
        torch.testing.assert_close(score, seen[0].query[0, 3, query] @ keys[0, 3, key], atol=1e-4, rtol=1e-4)


# A model whose only channel is known


R, END, IO, S = 5, 1, 2, 3


def writer_and_reader() -> NativeModel:
    """GPT-2 of two blocks: head 0.1 writes direction R at END; head 1.0 asks for IO, and against S, by R alone."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, n_inner=8)
    module = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        module.transformer.wte.weight.copy_(torch.eye(32))
        first, second = module.transformer.h[0].attn, module.transformer.h[1].attn
        # c_attn's columns are q, k and v, each of two heads of 16; head 1's first value is column 64 + 16.
        first.c_attn.weight[END, 64 + 16] = 1.0
        first.c_proj.weight[16, R] = 20.0
        first.c_attn.weight[:, 64 + 17 : 64 + 32] = 0.05 * rand(32, 15, seed=1)
        first.c_proj.weight[17:32, 8:] = 0.05 * rand(15, 24, seed=2)
        # A difference of two coordinates, so that the norm's centring drops out.
        second.c_attn.weight[R, 0], second.c_attn.weight[R + 1, 0] = 8.0, -8.0
        second.c_attn.weight[IO, 32], second.c_attn.weight[S, 32] = 4.0, -4.0
    return native(module)


def test_zeroing_the_planted_component_makes_the_reader_attend_evenly() -> None:
    from analyses.communication_channels.edits import Change, changed_head
    from analyses.communication_channels.scan import composition_table, ranked, scan
    from probes.blocks.cached_prompt import CachedPrompt

    model = writer_and_reader()
    weights = head_weights(model, center=False)
    table = composition_table([scan(weights, "q")], "analytic", 100, 0, 5.0)
    top = ranked(table, "q", (1, 0)).iloc[0]
    assert (top["source_layer"], top["source_head"]) == (0, 1)
    component = int(top["component"])
    v = Circuit(weights.w_v[0, 1], weights.w_o[0, 1]).svd[2][component]
    assert v[R].abs() > 0.99
    tokens = [7, IO, 9, S, END]
    pattern: list[Tensor] = []
    changes = [Change("as it is", component, v, keep=1.0), Change("zero", component, v)]
    CachedPrompt(model, tokens, -1).edited(
        0,
        2,
        {Address("z", 0): changed_head(1, weights.w_o[0, 1], changes)},
        {Address("pattern", 1): lambda p: pattern.append(p[:, 0, -1].clone())},
    )
    kept, zeroed = pattern[0]
    assert kept[1] > 0.9
    assert kept[3] < 0.01
    torch.testing.assert_close(zeroed, torch.full((5,), 0.2), atol=5e-3, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_zeroing_a_component_is_the_weight_edit(family: str) -> None:
    from analyses.communication_channels.edits import Change, changed_head
    from probes.blocks.cached_prompt import CachedPrompt

    model, tokens = native(shared(family)), [11]
    weights = head_weights(model)
    v = Circuit(weights.w_v[1, 2], weights.w_o[1, 2]).svd[2][3]
    for keep in (0.0, 1.0, 2.5):
        write = changed_head(2, weights.w_o[1, 2], [Change("", 3, v, keep=keep)])
        by_activation = CachedPrompt(model, tokens, -1).edited(1, 1, {Address("z", 1): write})[0]
        edit = HeadWriteEdit(1, 2, Values(v[None]), keep=keep)
        last = Address("resid_post", model.shape.n_layers - 1)
        by_weight = read(model, torch.tensor([tokens]), [last], [edit])[last][0, -1]
        torch.testing.assert_close(by_activation, by_weight, atol=1e-4, rtol=1e-4)


def test_removing_and_adding_back_a_component_is_a_no_op() -> None:
    model, tokens = native(shared("llama")), prompt()
    weights = head_weights(model)
    z = read(model, tokens, [Address("z", 1)])[Address("z", 1)][0, -1, 2]
    v = Circuit(weights.w_v[1, 2], weights.w_o[1, 2]).svd[2][0]
    c = float(z @ weights.w_o[1, 2] @ v)
    reading, writing = Values((weights.w_o[1, 2] @ v)[None]), Values((v @ torch.linalg.pinv(weights.w_o[1, 2]))[None])
    where = {"address": Address("z", 1), "positions": "last", "heads": (2,), "read": reading, "write": writing}
    same = Coefficients(keep=0.0, offset=(c,), **where)  # type: ignore[arg-type]
    zero = Coefficients(keep=0.0, **where)  # type: ignore[arg-type]
    plain = logits(model, tokens)
    torch.testing.assert_close(logits(model, tokens, [same]), plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model, tokens, [zero]), plain, atol=1e-4)


# The analysis


@pytest.mark.parametrize("null", ["analytic", "random"])
def test_the_scan_of_weights_alone(null: str, tmp_path: object) -> None:
    from analyses.communication_channels import CommunicationChannels
    from probes.store import ActivationStore

    model = native(shared("llama"))
    analysis = CommunicationChannels(null=null, n_null=200, pairs=2)  # type: ignore[arg-type]
    result = analysis.run(model, [[5, 6]], store=ActivationStore(tmp_path))  # type: ignore[arg-type]
    table = result.tables["composition"]
    contract = ["kind", "source_layer", "source_head", "target_layer", "target_head", "score"]
    assert list(table.columns)[:6] == contract
    assert len(table) == 3 * 3 * 16  # three kinds, three pairs of layers, four by four heads
    weights = head_weights(model)
    scores = comp.composition_scores(weights.ov, weights.reader("k"))
    row = table[table["kind"] == "k"].iloc[5]
    score = scores[row["source_layer"], row["source_head"], row["target_layer"], row["target_head"]]
    assert row["score"] == pytest.approx(float(score), rel=1e-4)
    components = result.tables["components"]
    assert {"component", "singular_value", "energy_share", "relative_score", "z", "p", "q_value"} <= set(components)
    whole = components.groupby(contract[:5], sort=False).apply(
        lambda g: (g["energy_share"] * g["score"] ** 2).sum() ** 0.5
    )
    expected = components.groupby(contract[:5], sort=False)["pair_score"].first()
    assert whole.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-4)
    assert "edits" not in result.tables
    assert any("no tokenizer" in note for note in result.notes)
    result.figure("pairs")
    result.figure("components")


def test_held_out_steering_never_sees_its_own_prompt() -> None:
    import numpy as np

    from analyses.communication_channels.list_recall import held_out_correct, steering_grid

    answer = np.repeat(np.arange(2), 8)
    # Every prompt has a point of its own that is right: an oracle finds it, a point chosen elsewhere does not.
    chosen = np.where(np.eye(16, dtype=bool), answer[:, None], 1 - answer[:, None])
    assert not held_out_correct(chosen, answer, 2).any()
    steered = np.tile(np.arange(2), (16, 1))
    assert held_out_correct(steered, answer, 2).all()
    assert len(held_out_correct(steered, answer, 2)) == 8
    assert steering_grid(3, [1.0, 2.0, 3.0]).shape == (27, 3)


def test_generators_are_balanced_and_say_what_they_must() -> None:
    from collections import Counter

    from analyses.tasks import ioi as tasks_ioi
    from analyses.tasks import laundry_list as tasks_laundry

    for example in tasks_ioi.sample(40, seed=1):
        assert example.text.count(example.subject) == 2
        assert example.text.count(example.indirect) == 1
        assert (example.text.index(example.indirect) < example.text.index(example.subject)) == example.indirect_first
    assert Counter(p.indirect_first for p in tasks_ioi.sample(40)) == {True: 20, False: 20}
    for n in (2, 5, 9):
        prompts = tasks_laundry.sample(n, 3, seed=2)
        assert Counter(p.missing for p in prompts) == dict.fromkeys(range(n), 3)
        for laundry in prompts:
            assert laundry.text.count(f" {laundry.answer}") == 1
            assert len(set(laundry.items)) == n
