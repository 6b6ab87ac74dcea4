"""Blocks restarted from stored streams, against whole forwards of the edited model."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import TypeVar

import numpy as np
import pytest
import torch
from families import VOCAB, make
from tiny import native

from analyses.depth_use.ablations import ChunkAblations, window_error
from analyses.depth_use.contributions import PARTS, Contributions, contribution
from analyses.depth_use.greedy import greedy_removal, mean_distance
from analyses.depth_use.outputs import Outputs
from analyses.depth_use.settings import SkipRule
from analyses.depth_use.skips import (
    Effects,
    depth_score,
    enter,
    future_effects,
    left_out_at,
    local_effects,
    relative_change,
    split,
    split_positions,
)
from analyses.depth_use.tokens import StreamMeans, Target, erasure, integrated_gradients
from analyses.depth_use.weights import NormScales, coarser, frozen_norms, matrices, z_share, z_share_of
from analyses.results.per_prompt import PerPrompt
from probes import edits
from probes.blocks.batch import Blocks, Chunk, Part, left_out, on_blocks
from probes.capture.needs import Need
from probes.capture.padded import chunks
from probes.capture.run import capture
from probes.models import Model, weights_digest
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.prompts import Prompt
from probes.store import ActivationStore

T = TypeVar("T")
NEED = Need(("resid_pre.0", "resid_post.*", "attn_out.*"))
PROMPTS = [(5, 6, 7, 8), (11, 12, 13, 14, 15, 16, 17), (9, 10, 30)]
FAMILIES = ("llama", "gpt2", "gemma2", "phi", "falcon_multi_query", "opt")


def one_chunk(model: Model, store: ActivationStore, prompts: list[tuple[int, ...]] | None = None) -> Chunk:
    prompts = prompts or PROMPTS
    activations = capture(model, prompts, [NEED], store)
    (chunk,) = chunks(activations, range(len(prompts)), together=True)
    return chunk


def study(model: Model, chunk: Chunk, work: Callable[[ChunkAblations], T]) -> T:
    return on_blocks(
        model,
        chunk.tokens,
        lambda blocks: work(ChunkAblations(blocks, chunk, Outputs(model, chunk), chunk.counted(False))),
    )


def removal(part: Part, layer: int, n_layers: int) -> edits.Edit:
    return (
        edits.skip(n_layers, layer)
        if part == "block"
        else edits.Scale(address=Address(f"{part}_out", layer), factor=0.0)
    )


def close(values: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((values - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_from_any_depth_gives_the_stored_stream(family: str, store: ActivationStore) -> None:
    model = native(family)
    chunk = one_chunk(model, store)

    def work(blocks: Blocks) -> None:
        for start in range(chunk.n_layers):
            for stream, expected in zip(blocks.run(chunk.stream[start], start), chunk.stream[start:], strict=True):
                assert close(stream[chunk.real], expected[chunk.real])

    on_blocks(model, chunk.tokens, work)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_that_run_together_end_as_each_alone(family: str, store: ActivationStore) -> None:
    model = native(family)
    chunk = one_chunk(model, store)

    def work(blocks: Blocks) -> None:
        entering = [blocks.leaving(chunk, part, 0) for part in PARTS]
        for own, together in zip(entering, blocks.run_several(chunk.tokens, entering, 1), strict=True):
            for alone, stream in zip(blocks.run(own, 1), together, strict=True):
                assert close(stream[chunk.real], alone[chunk.real])

    on_blocks(model, chunk.tokens, work)


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_by_restart_is_removal_in_a_whole_forward(family: str, store: ActivationStore) -> None:
    model = native(family)
    chunk = one_chunk(model, store)
    lengths = chunk.real.sum(1).tolist()

    def finals(blocks: Blocks) -> dict[tuple[Part, int], torch.Tensor]:
        return {(p, s): blocks.without(chunk, p, s)[-1] for p in PARTS for s in range(chunk.n_layers)}

    for (part, layer), final in on_blocks(model, chunk.tokens, finals).items():
        edit = removal(part, layer, chunk.n_layers)
        expected = edits.logits(model, chunk.tokens, [edit], lengths)[chunk.real].log_softmax(-1)
        outputs = Outputs(model, Chunk(chunk.prompts, chunk.tokens, chunk.real, [final], []))
        next_tokens = chunk.tokens.roll(-1, 1)[chunk.real]
        loss = -expected.gather(1, next_tokens[:, None])[:, 0]
        known = ~outputs.ce.isnan()
        assert int(known.sum()) == sum(lengths) - len(lengths)
        assert torch.allclose(outputs.ce[known], loss[known], atol=1e-4)


def test_nothing_is_left_hooked_or_changed(tiny: NativeModel, store: ActivationStore) -> None:
    before, logits = weights_digest(tiny.module), edits.logits(tiny, torch.tensor([PROMPTS[1]]))
    chunk = one_chunk(tiny, store)
    columns = {"delta_ce_int4": PerPrompt(3, 3), "delta_ce_frozen_norm": PerPrompt(3, 3)}
    scales = NormScales(tiny.anatomy)
    scales.add(chunk)
    study(
        tiny,
        chunk,
        lambda s: (
            s.run(s.coarser(columns, [4], range(3)), lambda _: None),
            s.run(s.frozen(columns, scales, range(3)), lambda _: None),
        ),
    )
    assert float(columns["delta_ce_int4"].mean().abs().min()) > 0
    assert float(columns["delta_ce_frozen_norm"].mean().abs().min()) > 0
    assert weights_digest(tiny.module) == before
    assert torch.equal(edits.logits(tiny, torch.tensor([PROMPTS[1]])), logits)


def test_contributions_sum_to_the_stream(tiny: NativeModel, store: ActivationStore) -> None:
    chunk = one_chunk(tiny, store)
    layers = range(chunk.n_layers)
    total = chunk.stream[0] + sum(chunk.added(part, layer) for layer in layers for part in ("attn", "mlp"))
    assert close(total[chunk.real], chunk.stream[-1][chunk.real])


def synthetic(before: torch.Tensor, added: torch.Tensor) -> Chunk:
    """A chunk of one prompt whose single block's attention adds `added` and whose MLP adds nothing."""
    real = torch.ones(1, len(before), dtype=torch.bool)
    tokens = torch.zeros(1, len(before), dtype=torch.long)
    return Chunk((0,), tokens, real, [before[None], (before + added)[None]], [added[None]])


@pytest.mark.parametrize(
    ("factor", "cosine", "similarity"), [(0.5, 1.0, 0.0), (3.0, 1.0, 0.0), (-0.5, -1.0, 0.0), (-3.0, -1.0, 2.0)]
)
def test_similarity_of_an_amplifier_and_an_eraser(factor: float, cosine: float, similarity: float) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    contributions = contribution(synthetic(x, factor * x), "block", 0, parallel=False)
    assert torch.allclose(contributions.relative_norm, torch.full((1, 6), abs(factor)), atol=1e-5)
    assert torch.allclose(contributions.cosine, torch.full((1, 6), cosine), atol=1e-5)
    assert torch.allclose(contributions.similarity, torch.full((1, 6), similarity), atol=1e-5)


def test_an_identity_block_has_similarity_0_and_lim_minus_1() -> None:
    x = torch.randn(6, 8)
    columns = {f"{n}_{p}": PerPrompt(1, 1) for n in ("relative_norm", "cosine", "similarity") for p in PARTS}
    columns["lim"] = PerPrompt(1, 1)
    Contributions(1, False, True).add(synthetic(x, torch.zeros_like(x)), columns)
    assert columns["lim"].mean().item() == pytest.approx(-1, abs=1e-6)
    assert columns["similarity_block"].mean().item() == pytest.approx(0, abs=1e-6)


def test_similarity_ignores_scale_and_rotation() -> None:
    g = torch.Generator().manual_seed(1)
    x, added = torch.randn(6, 8, generator=g), torch.randn(6, 8, generator=g)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    plain = contribution(synthetic(x, added), "block", 0, parallel=False)
    for other in (synthetic(7 * x, 7 * added), synthetic(x @ rotation, added @ rotation)):
        assert torch.allclose(contribution(other, "block", 0, parallel=False).similarity, plain.similarity, atol=1e-5)


def test_an_mlp_is_measured_against_the_stream_it_reads() -> None:
    x, attn = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    mlp = torch.tensor([[0.0, 1.0]])
    real = torch.ones(1, 1, dtype=torch.bool)
    chunk = Chunk((0,), torch.zeros(1, 1, dtype=torch.long), real, [x[None], (x + attn + mlp)[None]], [attn[None]])
    sequential, parallel = (contribution(chunk, "mlp", 0, parallel=p) for p in (False, True))
    assert sequential.relative_norm.item() == pytest.approx(1 / 8**0.5)
    assert sequential.cosine.item() == pytest.approx(0.5**0.5)
    assert parallel.relative_norm.item() == pytest.approx(0.5)
    assert parallel.cosine.item() == pytest.approx(0)


def test_future_effects_are_those_of_brute_force_and_zero_up_to_the_skipped_block(
    tiny: NativeModel, store: ActivationStore
) -> None:
    chunk = one_chunk(tiny, store)
    halves = split(chunk, 4, 0, "released")
    assert halves is not None
    assert halves.chunk.prompts == (0, 1)  # three tokens are too short to split
    n, lengths = chunk.n_layers, halves.chunk.real.sum(1).tolist()
    effects, outputs = Effects.empty(3, n), Outputs(tiny, halves.chunk, halves.after)
    on_blocks(
        tiny,
        halves.chunk.tokens,
        lambda b: future_effects(effects, b, halves, "attn", outputs, range(3), lambda _: None),
    )
    posts = [Address("resid_pre", 0), *(Address("resid_post", layer) for layer in range(n))]
    clean = edits.read(tiny, halves.chunk.tokens, posts, [], lengths)
    for skipped in range(n):
        zero = left_out([("attn", skipped)], halves.skipped)
        changed: dict[Address, torch.Tensor] = {}
        reads = {a: lambda t, a=a, into=changed: into.__setitem__(a, t.clone()) for a in posts}
        tiny.run(halves.chunk.tokens, reads, zero, lengths)
        for layer in range(n):
            c, d = (s[posts[layer + 1]] - s[posts[layer]] for s in (clean, changed))
            effect = ((c - d).norm(dim=-1) / c.norm(dim=-1))[1][halves.after[1]]
            if layer <= skipped:
                assert float(effect.max()) < 1e-5
            else:
                assert effects.highest[1, skipped, layer] == pytest.approx(float(effect.max()), rel=1e-3)
                assert effects.highest[1, skipped, layer] > 1e-3
    lower = np.tril(np.ones((n, n), dtype=bool))
    assert np.nanmax(effects.highest[:, lower]) < 1e-5


def test_a_block_left_out_before_the_split_is_untouched_after_it(tiny: NativeModel, store: ActivationStore) -> None:
    halves = split(one_chunk(tiny, store), 4, 0, "released")
    assert halves is not None
    effects, outputs = Effects.empty(3, 3), Outputs(tiny, halves.chunk, halves.after)
    on_blocks(
        tiny,
        halves.chunk.tokens,
        lambda b: future_effects(effects, b, halves, "block", outputs, range(3), lambda _: None),
    )
    assert [effects.highest[0, s, s] for s in range(3)] == [0, 0, 0]
    assert effects.highest[0, 0, 1] > 1e-3


def test_leaving_out_nothing_changes_nothing(tiny: NativeModel, store: ActivationStore) -> None:
    chunk = one_chunk(tiny, store)
    nowhere = torch.zeros_like(chunk.real)

    def largest(blocks: Blocks, part: Part, where: torch.Tensor | None) -> float:
        effects = Effects.empty(3, 3)
        for layer in range(3):
            enter(effects, chunk, layer, blocks.without(chunk, part, layer, where), chunk.real)
        return float(np.nanmax(effects.highest))

    def work(blocks: Blocks) -> None:
        for part in PARTS:
            assert largest(blocks, part, nowhere) < 1e-5
            assert largest(blocks, part, None) > 1e-2

    on_blocks(tiny, chunk.tokens, work)


def test_a_block_left_out_everywhere_changes_wholly_itself_and_nothing_before(
    tiny: NativeModel, store: ActivationStore
) -> None:
    chunk = one_chunk(tiny, store)
    effects = Effects.empty(3, 3)
    on_blocks(tiny, chunk.tokens, lambda b: enter(effects, chunk, 1, b.without(chunk, "block", 1), chunk.real))
    assert np.isnan(effects.mean[:, 1, 0]).all()
    assert effects.mean[:, 1, 1] == pytest.approx(1)
    assert (effects.mean[:, 1, 2] > 1e-3).all()


def test_local_effects_do_not_propagate(tiny: NativeModel, store: ActivationStore) -> None:
    chunk = one_chunk(tiny, store)
    effects = Effects.empty(3, 3)
    on_blocks(
        tiny,
        chunk.tokens,
        lambda b: local_effects(effects, b, chunk, "block", chunk.real, chunk.real, range(3), lambda _: None),
    )
    lacking = chunk.stream[2] - chunk.added("block", 0)
    alone = on_blocks(tiny, chunk.tokens, lambda b: b.call(2, lacking))
    row = chunk.prompts.index(1)
    expected = relative_change(chunk, 2, lacking, alone)[row][chunk.real[row]]
    assert effects.mean[1, 0, 2] == pytest.approx(float(expected.mean()), rel=1e-5)
    adjacent = on_blocks(tiny, chunk.tokens, lambda b: b.without(chunk, "block", 0)[:3])
    now = relative_change(chunk, 1, adjacent[1], adjacent[2])[row][chunk.real[row]]
    assert effects.mean[1, 0, 1] == pytest.approx(float(now.mean()), rel=1e-4)


@pytest.mark.parametrize("variant", ["current", "future", "local"])
def test_the_released_rule_leaves_the_first_token_as_it_is(
    variant: str, tiny: NativeModel, store: ActivationStore
) -> None:
    """Nothing before or at a position that is kept changes, in a causal model; left out everywhere, it does."""
    chunk = one_chunk(tiny, store, [PROMPTS[1]])
    first = torch.zeros_like(chunk.real)
    first[:, 0] = True

    def change(rule: SkipRule) -> np.ndarray:
        effects, at = Effects.empty(1, 3), left_out_at(chunk, rule)
        halves = split(chunk, 1, 0, rule)
        assert halves is not None
        where = halves.skipped if variant == "future" else at

        def work(blocks: Blocks) -> None:
            if variant == "local":
                local_effects(effects, blocks, chunk, "block", at, first, range(3), lambda _: None)
            for layer in range(3) if variant != "local" else ():
                enter(effects, chunk, layer, blocks.without(chunk, "block", layer, where), first)

        on_blocks(tiny, chunk.tokens, work)
        return effects.highest[0][np.triu_indices(3, 1)]

    assert (change("released") < 1e-5).all()
    assert (change("everywhere") > 1e-3).all()


def test_the_released_current_skip_is_a_whole_forward_with_the_first_token_kept(
    tiny: NativeModel, store: ActivationStore
) -> None:
    chunk = one_chunk(tiny, store, [PROMPTS[1]])
    at, address = left_out_at(chunk, "released"), Address("mlp_out", 1)
    assert at.tolist() == [[False, *[True] * 6]]
    streams = on_blocks(tiny, chunk.tokens, lambda b: b.without(chunk, "mlp", 1, at))
    last: list[torch.Tensor] = []
    keep_first = {address: lambda added: torch.cat([added[:, :1], torch.zeros_like(added[:, 1:])], dim=1)}
    tiny.run(chunk.tokens, {Address("resid_post", 2): lambda t: last.append(t.clone())}, keep_first)
    assert close(streams[-1], last[0])


def test_unknown_rows_do_not_move_the_depth_score() -> None:
    known = np.where(np.triu(np.ones((4, 4)), 1) > 0, 1.0, np.nan)
    known[1] = np.nan
    assert depth_score(known) == pytest.approx((0 + 2) / 2)


def test_depth_score_is_the_centre_of_mass() -> None:
    n = 5
    even = np.where(np.triu(np.ones((n, n)), 1) > 0, 1.0, np.nan)
    assert depth_score(even) == pytest.approx((0 + 1 + 2 + 3) / 4)
    assert depth_score(3 * even) == pytest.approx(1.5)
    late = even.copy()
    late[:3] = np.where(np.isnan(late[:3]), np.nan, 0)
    assert depth_score(late) == pytest.approx(3)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(3, []), (4, [2]), (12, [6]), (13, [8]), (30, [8, 16, 24]), (29, [8, 16, 24]), (28, [8, 16])],
)
def test_split_positions(length: int, expected: list[int]) -> None:
    assert split_positions(length, 4, np.random.default_rng(0)) == expected


def test_outputs_against_the_formulas(tiny: NativeModel, store: ActivationStore) -> None:
    chunk = one_chunk(tiny, store)
    outputs = Outputs(tiny, chunk)
    same = outputs.change(chunk.stream[-1])
    assert same.jsd.tolist() == [0] * len(same.jsd)
    assert same.probability_distance.tolist() == [0] * len(same.jsd)
    other = chunk.stream[1]
    changes = outputs.change(other)
    p, q = (tiny_logits(tiny, h[chunk.real]).double().softmax(-1) for h in (chunk.stream[-1], other))
    m = (p + q) / 2
    jsd = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert torch.allclose(changes.jsd.double(), jsd, atol=1e-6)
    assert float(changes.jsd.min()) > 0
    assert float(changes.jsd.max()) < log(2)
    assert torch.allclose(changes.probability_distance.double(), (p - q).norm(dim=-1), atol=1e-6)
    lens = outputs.lens(other)
    assert torch.allclose(lens.kl.double(), (q * (q / p).log()).sum(-1), atol=1e-5)
    last = outputs.lens(chunk.stream[-1])
    assert float(last.kl.max()) < 1e-6
    assert last.overlap.tolist() == [1] * len(last.overlap)


@torch.no_grad()
def tiny_logits(model: NativeModel, rows: torch.Tensor) -> torch.Tensor:
    unembedding = model.unembedding()
    return unembedding.norm(rows) @ unembedding.weight.T


def test_zd_of_gaussian_weights() -> None:
    w = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    expected, error = 0.158655, (0.158655 * 0.841345 / 1e6) ** 0.5
    assert abs(z_share(w) - expected) < 3 * error
    assert z_share(5 * w - 3) == pytest.approx(z_share(w), abs=1e-5)
    assert z_share(-w) == pytest.approx(expected, abs=3 * error)
    assert z_share(torch.tensor([0.0, 0.0, 0.0, 1.0])) == 0.25


def test_zd_counts_every_matrix_of_a_block(tiny: NativeModel) -> None:
    block = tiny.component("block", 0)
    assert sum(w.numel() for w, _ in matrices(block)) == sum(p.numel() for p in block.parameters() if p.ndim > 1)
    assert z_share_of(block) == pytest.approx(0.1587, abs=0.02)


def test_sixteen_bits_are_enough(tiny: NativeModel) -> None:
    tokens = torch.tensor([PROMPTS[1]])
    before = edits.logits(tiny, tokens)
    with coarser(tiny.component("block", 1), 16):
        fine = edits.logits(tiny, tokens)
    with coarser(tiny.component("block", 1), 2):
        coarse = edits.logits(tiny, tokens)
    assert 0 < float((fine - before).abs().max()) < 1e-3
    assert float((coarse - before).abs().max()) > 1e-2
    assert torch.equal(edits.logits(tiny, tokens), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_freezing_norms_at_a_token_s_own_divisor_changes_nothing(family: str, store: ActivationStore) -> None:
    model = native(family)
    chunk = one_chunk(model, store, [(5, 6)])  # one first token and one other: each mean is its own divisor
    longer = one_chunk(model, store, [(5, 6, 7, 8)])

    def change(chunk: Chunk, blocks: Blocks) -> float:
        scales = NormScales(model.anatomy)
        scales.add(chunk)
        rows = (chunk.tokens.shape[0], chunk.tokens.shape[1])
        with frozen_norms(model.module, scales.of(1), rows):
            frozen = blocks.call(1, chunk.stream[1])
        return float((frozen - chunk.stream[2]).abs().max() / chunk.stream[2].abs().max())

    assert on_blocks(model, chunk.tokens, lambda b: change(chunk, b)) < 1e-5
    assert on_blocks(model, longer.tokens, lambda b: change(longer, b)) > 1e-4


def test_a_window_of_one_block_is_exact_and_of_two_is_the_sum(tiny: NativeModel, store: ActivationStore) -> None:
    chunk = one_chunk(tiny, store)
    columns = {
        f"{n}_{w}": PerPrompt(3, 3) for w in (1, 2) for n in ("parallel_error", "parallel_cosine", "delta_ce_parallel")
    }
    study(tiny, chunk, lambda s: s.run(s.windows(columns, [1, 2], range(3)), lambda _: None))
    assert float(columns["parallel_error_1"].mean().max()) < 1e-5
    assert columns["parallel_error_2"].mean().isnan().tolist() == [False, False, True]

    def by_hand(blocks: Blocks) -> torch.Tensor:
        entering = chunk.stream[0]
        return entering + (blocks.call(1, entering) - entering) + (blocks.call(0, entering) - entering)

    joint = on_blocks(tiny, chunk.tokens, by_hand)  # the other order: a window does not know one
    where = chunk.counted(False)
    error = window_error(chunk.stream[0], chunk.stream[2], joint)[0][where]
    assert columns["parallel_error_2"].mean()[0].item() == pytest.approx(float(error.mean()), rel=1e-4)


def test_window_error_of_linear_blocks_is_the_product_term() -> None:
    a, b = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1))
    one = x + x @ a
    two = one + one @ b
    error, _ = window_error(x, two, x + x @ a + x @ b)
    assert torch.allclose(error, (x @ a @ b).norm(dim=-1) / (two - x).norm(dim=-1), atol=1e-5)


def greedy(model: NativeModel, chunk: Chunk, steps: int, distance: str = "jsd") -> object:
    return study(model, chunk, lambda s: greedy_removal(s, steps, distance, range(3), lambda _: None))  # type: ignore[arg-type]


@pytest.mark.parametrize("distance", ["jsd", "angular", "euclidean"])
def test_greedy_removal_starts_with_the_best_of_brute_force(
    distance: str, tiny: NativeModel, store: ActivationStore
) -> None:
    chunk = one_chunk(tiny, store)
    lengths = chunk.real.sum(1).tolist()
    last = Address("resid_post", 2)

    def measure(s: ChunkAblations) -> dict[tuple[str, int], float]:
        return {place: mean_distance(s, final, distance) for place, final in finals.items()}  # type: ignore[arg-type]

    places = [(part, layer) for part in ("attn", "mlp") for layer in range(3)]
    finals = {p: edits.read(tiny, chunk.tokens, [last], [removal(*p, 3)], lengths)[last] for p in places}
    by_hand = study(tiny, chunk, measure)
    best = min(by_hand, key=lambda place: by_hand[place])
    table = greedy(tiny, chunk, 5, distance)
    assert (table.part[0], table.layer[0]) == best
    assert table.distance[0] == pytest.approx(by_hand[best], rel=1e-3)
    gone: list[edits.Edit] = []
    for step, place in enumerate(zip(table.part, table.layer, strict=True)):
        others = [p for p in places if p not in list(zip(table.part, table.layer, strict=True))[:step]]
        finals = {p: edits.read(tiny, chunk.tokens, [last], [*gone, removal(*p, 3)], lengths)[last] for p in others}
        again = study(tiny, chunk, measure)
        assert table.distance[step] == pytest.approx(again[place], rel=1e-3)
        assert again[place] == min(again.values())
        gone.append(removal(*place, 3))


def test_a_part_that_adds_nothing_goes_first_at_no_cost(store: ActivationStore) -> None:
    module = make("llama", seed=3)
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.zero_()
    model = NativeModel(module, ref="zero", weights="zero")
    table = greedy(model, one_chunk(model, store), 1)
    assert (table.part[0], table.layer[0], table.distance[0]) == ("mlp", 1, pytest.approx(0, abs=1e-7))
    assert table.runner_up_distance[0] > 1e-4


def test_integrated_gradients_are_complete(tiny: NativeModel, store: ActivationStore) -> None:
    (prompt,) = [Prompt(PROMPTS[1])]
    chunk = one_chunk(tiny, store, [prompt.tokens])
    left = [
        integrated_gradients(tiny, chunk, prompt, PARTS, steps, "left", range(3), lambda _: None)
        .groupby(["part", "layer"])[["completeness_error", "attribution"]]
        .agg({"completeness_error": "first", "attribution": "sum"})
        for steps in (16, 256)
    ]
    coarse, fine = (table["completeness_error"].abs().max() for table in left)
    assert fine < 0.05 * left[1]["attribution"].abs().max()
    assert fine < coarse / 8
    midpoint = integrated_gradients(tiny, chunk, prompt, PARTS, 16, "midpoint", range(3), lambda _: None)
    assert midpoint["completeness_error"].abs().max() < fine


def test_the_attributed_change_is_the_models_own(tiny: NativeModel, store: ActivationStore) -> None:
    prompt = Prompt(PROMPTS[1], fields={"answer_from": 5})
    chunk = one_chunk(tiny, store, [prompt.tokens])
    attributions = integrated_gradients(tiny, chunk, prompt, ("mlp",), 64, "midpoint", range(3), lambda _: None)
    target = Target.of(prompt, Outputs(tiny, chunk))
    assert target.at.tolist() == [4, 5]
    assert target.ids.tolist() == [16, 17]

    def probability(edit: list[edits.Edit]) -> float:
        p = edits.logits(tiny, chunk.tokens, edit)[0].softmax(-1)
        return float(p[4, 16] + p[5, 17])

    mean = edits.Replace(address=Address("mlp_out", 1), value=edits.Values(chunk.added("mlp", 1)[0].mean(0)))
    expected = probability([]) - probability([mean])
    rows = attributions[attributions["layer"] == 1]
    assert rows["attribution"].sum() == pytest.approx(expected, abs=1e-4)
    assert rows["completeness_error"].abs().max() < 1e-4
    assert abs(expected) > 1e-4


def test_erasure_against_a_replaced_stream(tiny: NativeModel, store: ActivationStore) -> None:
    chunk = one_chunk(tiny, store)
    means = StreamMeans()
    means.add(chunk, chunk.real)
    alone = one_chunk(tiny, store, [PROMPTS[1]])
    table = erasure(tiny, alone, means, range(3), lambda _: None).set_index(["layer", "position"])
    assert means.of(1) == pytest.approx(chunk.stream[1][chunk.real].double().mean(0))
    erased = edits.Replace(address=Address("resid_pre", 1), positions=(2,), value=edits.Values(means.of(1).float()))
    p, q = (edits.logits(tiny, alone.tokens, e)[0].softmax(-1) for e in ([], [erased]))
    change = (p - q).norm(dim=-1)
    assert float(change[:2].max()) < 1e-6
    assert table.loc[(1, 2), "later_change"] == pytest.approx(float(change[3:].max()), rel=1e-3)
    assert table.loc[(1, 2), "answer_change"] == pytest.approx(float(change[-1]), rel=1e-3)
    assert np.isnan(table.loc[(1, 6), "later_change"])


def test_every_token_id_stays_in_the_vocabulary() -> None:
    assert max(max(p) for p in PROMPTS) < VOCAB
