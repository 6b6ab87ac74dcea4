"""The three definitions of effective depth, on curves whose depth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.depth_use.effective_depth import (
    COSINES,
    effective_depth_note,
    effective_depths,
    first_of,
    half_area,
    last_crossing,
    persistent,
)
from analyses.results.per_prompt import PerPrompt

STEP = [-1.0, -1, -1, 1, 1, 1]
RAMP = [-0.5, -0.3, -0.1, 0.1, 0.3, 0.5]
TWICE = [-1.0, 1, -1, -1, 1, 1]
NEVER = [-1.0] * 6
ALWAYS = [1.0] * 6


@pytest.mark.parametrize(
    ("curve", "released", "lasting"),
    [(STEP, 2, 3), (RAMP, 2, 3), (TWICE, 3, 4), (NEVER, np.nan, np.nan), (ALWAYS, np.nan, 0)],
    ids=["step", "ramp", "two crossings", "none", "always"],
)
def test_the_crossing_of_planted_curves(curve: list[float], released: float, lasting: float) -> None:
    cosine = np.array(curve)
    assert np.array_equal(last_crossing(cosine), released, equal_nan=True)
    assert np.array_equal(persistent(cosine >= 0), lasting, equal_nan=True)


def test_the_first_layer_is_the_released_one_and_the_last_does_not_count() -> None:
    holds = np.array([[False, True, False, True], [False, False, False, True], [False] * 4])
    assert np.array_equal(first_of(holds), [1, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(persistent(holds), [3, 3, np.nan], equal_nan=True)


def test_half_of_the_area_is_where_the_changes_halve() -> None:
    assert half_area(np.array([8.0, 4, 4, 2, 0])) == 1  # changes 4 0 2 2: half is 4
    assert half_area(np.array([8.0, 6, 4, 2, 0])) == 2
    assert half_area(np.array([2.0, 6, 0, 0])) == 2  # a rise counts as much as a fall
    assert np.isnan(half_area(np.ones(5)))


def columns(cosine: np.ndarray, kl: np.ndarray, overlap: np.ndarray) -> dict[str, PerPrompt]:
    """Curves [prompt, layer] as they are measured."""
    measured = {}
    for name, values in {**dict.fromkeys(COSINES, cosine), "lens_kl": kl, "lens_overlap": overlap}.items():
        measured[name] = PerPrompt(*values.shape)
        for layer in range(values.shape[1]):
            measured[name].add(layer, range(len(values)), torch.from_numpy(values[:, layer]))
    return measured


def curves(n_prompts: int = 8, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    plain = (RAMP, [9.0, 8, 6, 4, 0.5, 0], [0.0, 0, 0.1, 0.25, 0.6, 1])
    cosine, kl, overlap = (np.tile(c, (n_prompts, 1)) + noise * rng.standard_normal((n_prompts, 6)) for c in plain)
    return cosine, kl, overlap


EXPECTED = {
    ("cosine", 0.0): 2, ("cosine_persistent", 0.0): 3,
    ("lens_kl", 0.1): 4, ("lens_kl", 0.5): 3, ("lens_kl_persistent", 0.1): 4, ("lens_kl_persistent", 0.5): 3,
    ("lens_overlap", 0.2): 3, ("lens_overlap", 0.3): 4, ("lens_overlap_persistent", 0.2): 3,
    ("lens_overlap_persistent", 0.3): 4, ("half_area", 0.5): 3,
}  # fmt: skip


def depths(*of: np.ndarray) -> dict[tuple[str, float], float]:
    table = effective_depths(columns(*of), 0)
    return dict(zip(zip(table["definition"], table["threshold"], strict=True), table["layer"], strict=True))


def test_every_definition_on_one_planted_set_of_curves() -> None:
    table = effective_depths(columns(*curves()), 0)
    assert depths(*curves()) == EXPECTED
    assert (table["ratio"] == (table["layer"] + 1) / 6).all()
    assert (table["ci_low"] == table["ratio"]).all()
    assert (table["ci_high"] == table["ratio"]).all()
    assert (table["defined_share"] == 1).all()


def test_scale_changes_nothing() -> None:
    cosine, kl, overlap = curves(noise=0.02)
    assert depths(7 * cosine, 7 * kl, overlap) == depths(cosine, kl, overlap)


def test_appended_identity_blocks_change_the_ratio_by_the_number_of_layers_alone() -> None:
    cosine, kl, overlap = curves()
    more = [np.concatenate([c, np.full((len(c), 4), end)], axis=1) for c, end in ((cosine, 0), (kl, 0), (overlap, 1))]
    assert depths(*more) == depths(cosine, kl, overlap)
    assert effective_depths(columns(*more), 0)["ratio"].tolist() == [(layer + 1) / 10 for layer in EXPECTED_ORDER]


EXPECTED_ORDER = [2, 4, 3, 3, 4, 3, 4, 3, 3, 4, 3]


def test_a_depth_that_some_resamples_lack_is_undefined() -> None:
    cosine, kl, overlap = curves()
    # One prompt of eight crosses, and so far that the mean does; without it nothing does.
    cosine = np.tile(NEVER, (8, 1))
    cosine[0] = np.array(STEP) * 9
    table = effective_depths(columns(cosine, kl, overlap), 0).set_index("definition")
    row = table.loc["cosine"]
    assert 0.5 < row["defined_share"] < 0.9
    assert row[["layer", "ratio", "ci_low", "ci_high"]].isna().all()
    assert "cosine undefined (in " in effective_depth_note(table.reset_index())
    assert table.loc["half_area", "ratio"] == 4 / 6


def test_layers_that_were_not_measured_are_passed_over() -> None:
    cosine, kl, overlap = curves()
    kl[:, [1, 3, 5]], overlap[:, [1, 3, 5]] = np.nan, np.nan
    known = depths(cosine, kl, overlap)
    assert known["lens_kl", 0.5] == 4
    assert known["lens_overlap", 0.2] == 4
    assert known["cosine", 0.0] == 2
