"""Subspaces over tokens of keys, values and streams: identities, planted shares, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import native
from torch import Tensor

from analyses.depth_use import DepthUse
from analyses.depth_use.kv_subspaces import CrossProducts, cka, diagonal, joint_rank, kv_tables, overlaps
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import OptionError, PromptError
from probes.prompts import Prompt
from probes.store import ActivationStore

N, WIDTH, RANK = 400, 12, 4
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def compare(rows: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Overlaps and CKA of rows [layer, token, width]."""
    products = CrossProducts(len(rows), rows.shape[-1])
    products.add(rows)
    blocks = products.blocks()
    return overlaps(blocks, diagonal(blocks), rank), cka(blocks)


def whole(rows: Tensor, rank: int) -> Tensor:
    """Overlaps from the left singular vectors of the rows themselves."""
    left = [torch.linalg.svd(h - h.mean(0), full_matrices=False).U[:, :rank] for h in rows]
    return torch.stack([torch.stack([(a.T @ b).square().sum() / rank for b in left]) for a in left])


def test_streamed_equals_whole() -> None:
    rows = torch.cat([normal(2, N, WIDTH), normal(1, N, WIDTH).cumsum(-1)])
    products = CrossProducts(3, WIDTH)
    for part in torch.split(rows, 37, dim=1):
        products.add(part)
    blocks = products.blocks()
    torch.testing.assert_close(overlaps(blocks, diagonal(blocks), RANK), whole(rows, RANK), atol=1e-6, rtol=0)
    products.add(rows[:, :37], sign=-1)
    blocks = products.blocks()
    torch.testing.assert_close(overlaps(blocks, diagonal(blocks), RANK), whole(rows[:, 37:], RANK), atol=1e-6, rtol=0)


def test_a_rotation_of_the_features_changes_nothing() -> None:
    rows = normal(N, WIDTH) * torch.linspace(1, 3, WIDTH)
    turned = rows @ torch.linalg.qr(normal(WIDTH, WIDTH)).Q
    overlap, similar = compare(torch.stack([rows, turned]))
    assert overlap[0, 1].item() == pytest.approx(1, abs=1e-9)
    assert similar[0, 1].item() == pytest.approx(1, abs=1e-9)


def test_unrelated_layers_overlap_by_chance() -> None:
    values = torch.stack([compare(normal(2, N, WIDTH))[0][0, 1] for _ in range(40)])
    error = values.std() / len(values) ** 0.5
    assert values.mean().item() == pytest.approx(RANK / N, abs=4 * error.item())


def test_a_shared_subspace_is_seen_at_its_rank_and_not_beyond() -> None:
    shared = 20 * normal(N, RANK)
    rows = torch.stack([shared @ normal(RANK, WIDTH) + normal(N, WIDTH) for _ in range(2)])
    by_rank = {rank: compare(rows, rank)[0][0, 1].item() for rank in (RANK, RANK + 2, RANK + 6)}
    assert by_rank[RANK] > 0.97
    assert by_rank[RANK] > by_rank[RANK + 2] > by_rank[RANK + 6]
    assert by_rank[RANK + 2] == pytest.approx(RANK / (RANK + 2), abs=0.05)


def test_neighbours_that_share_a_basis_need_no_more_than_one() -> None:
    base = normal(N, 3)
    shared = torch.cat([base @ normal(3, WIDTH) for _ in range(2)], dim=1)
    apart = torch.cat([normal(N, 3) @ normal(3, WIDTH) for _ in range(2)], dim=1)
    assert joint_rank(shared.T @ shared) <= 3 < joint_rank(apart.T @ apart) <= 6


SEQUENCES = [tuple(int(t) for t in torch.randint(3, 90, (12,), generator=generator)) for _ in range(8)]


def test_of_a_model(store: ActivationStore) -> None:
    model = native()
    activations = capture(model, SEQUENCES, [Need(("k.*", "v.*", "resid_post.*"))], store)
    tables = kv_tables(activations, 4, [0, 1, 2], False, 0)
    table = tables["kv_subspaces"]
    assert table.groupby("kind").size().to_dict() == {"k": 3, "stream": 3, "v": 3}
    assert table["overlap"].between(0, 1).all()
    assert (table["low"] <= table["overlap"]).all()
    assert (table["overlap"] <= table["high"]).all()
    assert table["chance"].to_numpy() == pytest.approx(4 / 88)
    assert table["excess"].to_numpy() == pytest.approx((table["overlap"] - table["lexical"]).to_numpy())
    keys = torch.stack([torch.cat([h[1:].flatten(1) for h in activations.get(f"k.{i}")]) for i in range(3)]).double()
    assert table["overlap"].iloc[0] == pytest.approx(whole(keys, 4)[0, 1].item(), abs=1e-6)
    joint = tables["kv_joint"]
    assert (joint["rank"] <= joint["sum_of_ranks"]).all()
    assert joint.query("kind == 'k'")["first"].tolist() == [0, 1]
    assert DepthUse.figures["kv_subspaces"].draw(tables).data


def test_what_the_token_alone_decides_is_not_in_excess(store: ActivationStore) -> None:
    """Before the first attention, keys follow from the token: changing places among equal tokens changes nothing."""
    tokens = [tuple(3 + (i * 7 + j) % 6 for j in range(12)) for i in range(8)]
    activations = capture(native(), tokens, [Need(("k.*", "v.*", "resid_post.*"))], store)
    twice = kv_tables(activations, 4, [0, 0], False, 0)["kv_subspaces"].set_index("kind")
    assert twice["overlap"]["k"] == pytest.approx(1, abs=1e-6)
    assert twice["excess"]["k"] == pytest.approx(0, abs=1e-6)
    assert twice["excess"]["stream"] > 1e-3


@pytest.mark.parametrize(
    ("options", "n", "error", "says"),
    [
        ({"kv_rank": 16}, 2, PromptError, "more tokens than"),
        ({"kv_rank": 17}, 8, OptionError, "legal are 0 to 16"),
    ],
)
def test_refused(options: dict[str, int], n: int, error: type[Exception], says: str, store: ActivationStore) -> None:
    with pytest.raises(error, match=says):
        DepthUse(**options).run(native(), [Prompt(t) for t in SEQUENCES[:n]], store=store)  # type: ignore[arg-type]
