"""Group similarity: cosines with their controls, steps between layers, read-outs, and overlaps of weight masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import native
from torch import Tensor

from analyses.depth_use import DepthUse
from analyses.similarity.alignment import alignment_table, norm_table
from analyses.similarity.cosines import Cosines
from analyses.similarity.divergence import entropy, jensen_shannon, kullback_leibler
from analyses.similarity.groups import Regroupings, Rows, deals, redrawn
from analyses.similarity.masks import POINTS, chance, kept_weights, mask_needs, mask_table, mean_square, overlap
from analyses.similarity.readouts import readout_table
from analyses.similarity.steps import step_table
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.points import Address
from probes.prompts import Prompt
from probes.reducers import ROWS, Reducer
from probes.store import ActivationStore

WIDTH = 16


@dataclass
class Streams:
    """Rows of texts by layer, as activations give them."""

    layers: Sequence[Rows]

    @property
    def model(self) -> SimpleNamespace:
        return SimpleNamespace(shape=SimpleNamespace(n_layers=len(self.layers)))

    def get(self, address: Address, reducer: Reducer = ROWS) -> Rows:
        assert (address.point, reducer) == ("resid_post", ROWS)
        return self.layers[address.layer or 0]


def texts(n: int, seed: int, scale: float = 1.0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(3 + i % 4, WIDTH, generator=generator) for i in range(n)]


def rotation(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))).Q


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    """Sixteen texts on a tiny model: the first eight, and the same eight once more."""
    own = [(5 + i, 9 + 2 * i, 40 - i, 7 + i % 3) for i in range(8)]
    model = native()
    needs = [Need("resid_post.*"), *mask_needs(model, first_token=False)]
    return capture(model, [*own, *own], needs, ActivationStore(tmp_path_factory.mktemp("store")))


TWINS = [*"aaaaaaaabbbbbbbb"]


class TestGroupsOfTheSameTexts:
    def test_have_the_same_mean(self, captured: Activations) -> None:
        table = alignment_table(captured, TWINS, False, 0)
        plain = table[~table["centred"]]
        assert plain["mean_cosine"].to_numpy() == pytest.approx(1)
        assert (plain[["max_cosine", "best_cosine"]].to_numpy() <= 1 + 1e-6).all()
        assert plain["best_cosine"].to_numpy() == pytest.approx(1)

    def test_need_the_same_weights(self, captured: Activations) -> None:
        table = mask_table(captured, TWINS, (0.3, 0.5), False, 0)
        assert (table["iou"] == 1).all()
        assert (table["shuffled_high"] <= 1).all()
        assert set(table["matrix"]) == {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out"}
        assert (table["chance"].round(3) == np.where(table["sparsity"] == 0.3, 0.538, 0.333)).all()

    def test_say_the_same(self, captured: Activations) -> None:
        table = readout_table(captured, TWINS, False, 0)
        assert table[["kl", "jsd"]].abs().max(axis=None) < 1e-6
        assert (table["low"] > 0).all(), "halves that differ say different things"
        assert table["entropy_a"].to_numpy() == pytest.approx(table["entropy_b"].to_numpy())


class TestCosines:
    def test_every_reduction_by_hand(self) -> None:
        rows, members = [*texts(3, 0), *texts(3, 1)], [*"aaabbb"]
        columns = Cosines(rows, rows).table(Regroupings(members, "a", "b", 0))
        matrices = [torch.cosine_similarity(x[:, None], y[None], dim=-1) for x in rows[:3] for y in rows[3:]]
        by_hand = {
            "min_cosine": [m.min() for m in matrices],
            "max_cosine": [m.max() for m in matrices],
            "median_cosine": [m.median() for m in matrices],
            "best_text_cosine": [m.amax(1).mean() for m in matrices],
            "text_cosine": [torch.cosine_similarity(x.mean(0), y.mean(0), dim=0) for x in rows[:3] for y in rows[3:]],
        }
        for name, values in by_hand.items():
            assert columns[name] == pytest.approx(float(torch.stack(values).mean()), abs=1e-5), name
        pairs = torch.cat([m.flatten() for m in matrices])
        assert columns["pair_cosine"] == pytest.approx(float(pairs.mean()), abs=1e-6)
        assert columns["min_cosine"] <= columns["median_cosine"] <= columns["max_cosine"]
        assert columns["min_cosine"] <= columns["pair_cosine"] <= columns["max_cosine"]

    def test_a_group_within_itself_leaves_out_each_text_with_itself(self) -> None:
        rows = texts(4, 2)
        pairs = [
            torch.cosine_similarity(rows[i][:, None], rows[j][None], dim=-1).flatten()
            for i in range(4)
            for j in range(4)
            if i != j
        ]
        within = Cosines(rows, rows).within([*"aaaa"], "a")
        assert within == pytest.approx(float(torch.cat(pairs).mean()), abs=1e-6)
        assert np.isnan(Cosines(rows[:1], rows[:1]).within(["a"], "a"))

    def test_a_rotation_changes_nothing(self) -> None:
        rows, turn = [*texts(6, 3), *texts(6, 4)], rotation(0)
        turned = [h @ turn for h in rows]
        members = [*"aaaaaabbbbbb"]
        plain, other = (Cosines(h, h).table(Regroupings(members, "a", "b", 0)) for h in (rows, turned))
        assert plain == pytest.approx(other, abs=2e-6)

    def test_a_weighting_is_a_list_of_texts(self) -> None:
        """Texts drawn twice count twice, in every comparison."""
        rows = texts(5, 5)
        a, b = np.array([[2.0, 1, 0, 0, 0]]), np.array([[0.0, 0, 1, 0, 3]])
        listed = [rows[i] for i in (0, 0, 1, 2, 4, 4, 4)]
        first, second = np.array([[1.0, 1, 1, 0, 0, 0, 0]]), np.array([[0.0, 0, 0, 1, 1, 1, 1]])
        for name, statistic in Cosines(rows, rows).statistics().items():
            again = Cosines(listed, listed).statistics()[name]
            assert statistic(a, b) == pytest.approx(again(first, second)), name


class TestControls:
    def test_deals_keep_sizes_and_texts(self) -> None:
        in_a, in_b = np.array([1.0, 1, 1, 0, 0, 0, 0, 0, 0]), np.array([0.0, 0, 0, 1, 1, 1, 1, 0, 0])
        assert deals(in_a, in_b, 0) is None, "35 ways are too few"
        in_b[7] = 1
        dealt = deals(in_a, in_b, 0)
        assert dealt is not None
        assert (dealt[0].sum(1) == 3).all()
        assert (dealt[0] + dealt[1] == in_a + in_b).all()
        assert (redrawn(in_a, 0)[:, in_a == 0] == 0).all()
        assert (redrawn(in_a, 0).sum(1) == 3).all()

    def test_an_offset_planted_from_a_layer_on_shows_there(self) -> None:
        offset, members = torch.zeros(WIDTH), [*"a" * 8, *"b" * 8, *"c" * 8]
        offset[0] = 8
        layers = []
        for layer in range(6):
            rows = texts(24, 10 + layer)
            layers.append([h + offset if m == "a" and layer >= 3 else h for h, m in zip(rows, members, strict=True)])
        table = alignment_table(Streams(layers), members, True, 0)  # type: ignore[arg-type]
        centred = table[table["centred"] & (table["group_a"] == "a") & (table["group_b"] == "b")].set_index("layer")
        assert (centred["mean_cosine"][:3] > -0.8).all()
        assert (centred["mean_cosine"][3:] < -0.95).all()
        beyond = centred["pair_cosine"] < centred["pair_cosine_low"]
        assert beyond.tolist() == [False] * 3 + [True] * 3
        assert (centred["pair_cosine_ci_high"][3:] < 0).all()
        unmoved = table[table["centred"] & (table["group_a"] == "b")].set_index("layer")
        assert (unmoved["pair_cosine_ci_high"] > unmoved["pair_cosine_low"]).all()

    def test_an_anchor_compares_with_layer_0(self) -> None:
        layers = [texts(8, 20), texts(8, 21)]
        members = [*"aaaabbbb"]
        table = alignment_table(Streams(layers), members, True, 0, anchor=True)  # type: ignore[arg-type]
        row = table.query("anchored and not centred and layer == 1 and group_a == 'a'").iloc[0]
        low, high = torch.cat(layers[0][:4]).mean(0), torch.cat(layers[1][4:]).mean(0)
        assert row["mean_cosine"] == pytest.approx(float(torch.cosine_similarity(low, high, dim=0)), abs=1e-6)
        assert len(table.query("anchored")) == 2 * 2 * 2


class TestSteps:
    def test_a_block_that_adds_nothing_turns_nothing(self) -> None:
        first, other = texts(12, 30), texts(12, 31)
        streams = Streams([first, [2 * h for h in first], other])
        table = step_table(streams, [*"aaaaaabbbbbb"], (1, 2), True, 0)  # type: ignore[arg-type]
        plain = table[~table["centred"]].set_index(["layer", "step", "group"])
        assert plain["cosine"][0, 1, "a"] == pytest.approx(1)
        assert plain["low"][0, 1, "a"] == pytest.approx(1)
        same_text = [torch.cosine_similarity(x, y, dim=-1) for x, y in zip(first[6:], other[6:], strict=True)]
        assert plain["cosine"][0, 2, "b"] == pytest.approx(float(torch.cat(same_text).mean()), abs=1e-6)
        assert (1, 2, "a") not in plain.index

    def test_norms_are_of_tokens(self) -> None:
        rows = [torch.full((2, 4), float(i)) for i in range(8)]
        table = norm_table(Streams([rows]), [*"aaaaaaab"], True, 0, ("resid_post",))  # type: ignore[arg-type]
        own = table.set_index("group").loc["a"]
        assert (own["norm"], own["median"], own["least"], own["largest"]) == (6, 6, 0, 12)
        assert own["low"] < 6 < own["high"]
        assert np.isnan(table.set_index("group").loc["b", "low"])


class TestMasks:
    def test_random_masks_overlap_by_chance(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (400, 60)
        for sparsity in (0.3, 0.5):
            masks = [kept_weights(torch.randn(shape, generator=generator), torch.ones(60), sparsity) for _ in range(2)]
            p = 1 - sparsity
            error = (1 - p) / (400 * 60) ** 0.5 * 2
            assert overlap(*masks) == pytest.approx(chance(sparsity), abs=4 * error)

    def test_each_output_keeps_its_own_most_important_weights(self) -> None:
        weight = torch.tensor([[3.0, -2.0, 1.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
        assert kept_weights(weight, torch.ones(4), 0.5).tolist() == [
            [True, True, False, False],
            [False, False, True, True],
        ]
        loud = torch.tensor([0.0, 1.0, 1.0, 100.0])
        assert kept_weights(weight, loud, 0.5).tolist() == [[False, True, False, True], [False, False, True, True]]

    def test_the_order_of_features_means_nothing(self) -> None:
        generator = torch.Generator().manual_seed(1)
        weight, a, b = (torch.rand(n, generator=generator) for n in ((8, 30), (30,), (30,)))
        order = torch.randperm(30, generator=generator)
        plain = overlap(kept_weights(weight, a, 0.5), kept_weights(weight, b, 0.5))
        moved = [kept_weights(weight[:, order], squares[order], 0.5) for squares in (a, b)]
        assert overlap(*moved) == plain < 1

    def test_mean_squares_of_prompts_add_up_to_those_of_all_tokens(self, captured: Activations) -> None:
        model = captured.model
        for point in POINTS:
            whole = capture(model, captured.sequences, Need(f"{point}.1"), captured._lookup.store)
            rows = [h[1:].flatten(1) for h in whole.get(f"{point}.1")]
            squares = captured.get(Address(point, 1), mean_square(False))
            streamed = sum(x.flatten() * len(h) for x, h in zip(squares, rows, strict=True)) / sum(map(len, rows))
            torch.testing.assert_close(streamed, torch.cat(rows).square().mean(0), rtol=1e-6, atol=1e-9)


def test_divergences_by_hand() -> None:
    a, b = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    even = torch.tensor([0.5, 0.5]).log()
    assert float(jensen_shannon(a, b)) == pytest.approx(np.log(2))
    assert float(jensen_shannon(a, a)) == float(kullback_leibler(a, a)) == float(entropy(a)) == 0
    assert float(kullback_leibler(a, even)) == pytest.approx(np.log(2))
    assert float(kullback_leibler(even, a)) == float("inf")
    assert float(entropy(even)) == pytest.approx(np.log(2))


def test_depth_use_has_every_comparison_that_is_asked_for(store: ActivationStore) -> None:
    prompts = [((5 + i, 9 + 2 * i, 40 - i, 7 + i % 3), name) for i, name in enumerate("abababababab")]
    analysis = DepthUse(
        parts=("block",), skip_prompts=0, erasure_prompts=0, gradient_prompts=0, greedy_steps=0, drop_blocks=0, bits=(8,),
        windows=(2,), alignment_points=("resid_post", "mlp_post", "attn_in"), alignment_steps=(1,), alignment_anchor=True,
        alignment_readouts=True, mask_sparsity=(0.5,),
    )  # fmt: skip
    result = analysis.run(native(), [Prompt(t, None, {"group": g}) for t, g in prompts], store=store)
    assert {"alignment", "norms", "steps", "readouts", "masks"} <= set(result.tables)
    table = result.tables["alignment"]
    assert list(dict.fromkeys(table["point"])) == ["resid_post", "mlp_post", "attn_in"]
    assert {f"{n}_cosine" for n in ("mean", "pair", "best", "text", "min", "max", "median", "best_text")} <= set(table)
    for name in ("alignment", "alignment_points", "steps", "readouts", "masks"):
        assert result.figure(name).data
