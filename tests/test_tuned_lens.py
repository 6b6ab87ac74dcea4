"""The tuned lens: planted maps are found, the last layer stays the model's own, and little data falls back on the logit lens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import native

from probes.errors import ProbeError
from probes.lenses import logit as lens
from probes.lenses import tuned as tuned_lens
from probes.lenses.logit import LogitLens
from probes.lenses.protocol import Lens
from probes.models.backends.native import NativeModel

D_MODEL = 32


def planted(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a layer, and final rows that are an affine image of them (at unit scale)."""
    generator = torch.Generator().manual_seed(seed)
    early = tuned_lens.unit_scale(torch.randn(n, D_MODEL, generator=generator))
    turn = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(9)))[0]
    return early, early @ turn


def test_a_planted_map_is_recovered(tiny: NativeModel) -> None:
    rows = planted(1500)
    fitted = tuned_lens.fit(lambda layer: rows[layer], 2, [i // 10 for i in range(1500)], tiny.unembedding())
    assert fitted.tuned_kl[0] < 1e-4 < 0.1 < fitted.logit_kl[0]
    new, image = planted(50, seed=5)
    torch.testing.assert_close(fitted.translate(new, 0), image, atol=1e-2, rtol=1e-2)
    assert fitted.n_rows == (900, tuned_lens.SCORED_ROWS)


def test_the_last_layer_is_read_as_it_is(tiny: NativeModel) -> None:
    rows = planted(200)
    fitted = tuned_lens.fit(lambda layer: rows[layer], 2, [i // 10 for i in range(200)], tiny.unembedding())
    assert fitted.translate(rows[1], 1) is rows[1]
    assert fitted.tuned_kl[1] == fitted.logit_kl[1] == pytest.approx(0, abs=1e-6)


def test_where_little_is_to_be_learned_the_logit_lens_stays(tiny: NativeModel) -> None:
    """Final rows that are the layer's own plus noise: any map but the identity only fits the noise."""
    generator = torch.Generator().manual_seed(0)
    early = torch.randn(60, D_MODEL, generator=generator)
    rows = [early, early + 0.3 * torch.randn(60, D_MODEL, generator=generator)]
    fitted = tuned_lens.fit(lambda layer: rows[layer], 2, [i // 3 for i in range(60)], tiny.unembedding())
    assert fitted.ridge[0] == max(tuned_lens.RIDGES)
    assert fitted.tuned_kl[0] < 1.25 * fitted.logit_kl[0]


def test_held_out_rows_decide_the_losses(tiny: NativeModel) -> None:
    """Pure memory must not look good: targets drawn apart from the rows cannot be predicted on new texts."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(40, D_MODEL, generator=generator) for _ in range(2)]
    fitted = tuned_lens.fit(lambda layer: rows[layer], 2, list(range(40)), tiny.unembedding())
    assert fitted.tuned_kl[0] > 0.5 * fitted.logit_kl[0]


def test_the_scale_of_rows_does_not_matter() -> None:
    unembedding = native("llama").unembedding()
    rows = planted(100)
    groups = [i // 5 for i in range(100)]
    a = tuned_lens.fit(lambda layer: rows[layer], 2, groups, unembedding)
    b = tuned_lens.fit(lambda layer: rows[layer] * 7, 2, groups, unembedding)
    np.testing.assert_allclose(a.tuned_kl, b.tuned_kl, rtol=1e-2, atol=1e-5)
    read = [lens.read(f.translate(rows[0] * k, 0), unembedding).entropy_bits for f, k in ((a, 1), (b, 7))]
    torch.testing.assert_close(read[0], read[1], rtol=1e-3, atol=1e-3)


def test_too_few_texts_are_refused(tiny: NativeModel) -> None:
    with pytest.raises(ProbeError, match="at least 5"):
        tuned_lens.fit(lambda _: torch.randn(8, D_MODEL), 2, [0, 0, 1, 1, 2, 2, 3, 3], tiny.unembedding())


def test_both_lenses_read_through_one_protocol(tiny: NativeModel) -> None:
    """The tuned lens reads its translated rows as the logit lens would."""
    rows, unembedding = planted(200), tiny.unembedding()
    tuned = tuned_lens.fit(lambda layer: rows[layer], 2, [i // 10 for i in range(200)], unembedding)
    lenses: list[Lens] = [tuned, LogitLens(unembedding)]
    for layer in range(2):
        through, plain = (lens.read(rows[layer], layer, ids=torch.tensor([3]), top_k=2) for lens in lenses)
        expected = lenses[1].read(tuned.translate(rows[layer], layer), layer, ids=torch.tensor([3]), top_k=2)
        assert torch.equal(through.logprobs, expected.logprobs)
        assert torch.equal(through.top_ids, expected.top_ids)
        assert torch.equal(through.logprobs, plain.logprobs) == (layer == 1)
