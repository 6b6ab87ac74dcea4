"""Theorems about linear probes: what they must find, what they must not, and what they refuse."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score
from sklearn.model_selection import train_test_split

from analyses.concept_depth.depth_of_curve import depth_statistics
from probes.errors import ProbeError
from probes.linear.probing import RELEASED, SOUND, Recipe, fit_probe, probe_layers
from probes.linear.splits import check_groups, group_split, row_split, type_labels

N, D, LAYERS, ONSET = 1500, 8, 6, 3
DELTA = 2.0


def planted(seed: int = 0, n: int = N, d: int = D) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of unit noise in which the class moves by +-DELTA/2 along one direction from layer ONSET on."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    direction = rng.normal(size=d)
    direction /= np.linalg.norm(direction)
    layers = [rng.normal(size=(n, d)) for _ in range(LAYERS)]
    for layer in range(ONSET, LAYERS):
        layers[layer] += np.outer(labels - 0.5, direction) * DELTA
    return layers, labels


@pytest.mark.parametrize(
    "recipe", [SOUND, RELEASED, replace(SOUND, kind="mean_difference"), replace(SOUND, kind="nearest_centroid")]
)
def test_planted_concept_appears_exactly_at_its_layer(recipe: Recipe) -> None:
    layers, labels = planted()
    evaluations = list(probe_layers(layers, labels, recipe=recipe, jobs=2))
    expected = norm.cdf(DELTA / 2)
    for layer, evaluation in enumerate(evaluations):
        n = len(evaluation.row) / len(recipe.seeds)
        target = expected if layer >= ONSET else 0.5
        error = np.sqrt(target * (1 - target) / n)
        assert abs(evaluation.accuracy - target) <= 2 * error + 1 / n, (layer, evaluation.accuracy, target)
    statistics = depth_statistics([evaluation.accuracy for evaluation in evaluations], 0.5)
    assert statistics["jump"] == statistics["depth_90"] == ONSET / LAYERS


def test_shuffled_labels_stay_inside_the_null_band_of_the_auc() -> None:
    layers, labels = planted()
    labels = np.random.default_rng(5).permutation(labels)
    for evaluation in probe_layers(layers, labels, recipe=replace(SOUND, seeds=(3,)), jobs=1):
        ones = int(evaluation.label.sum())
        zeros = len(evaluation.label) - ones
        assert abs(evaluation.auc - 0.5) <= 1.96 * np.sqrt((zeros + ones + 1) / (12 * zeros * ones))


def test_control_labels_are_not_learned_where_rows_are_independent() -> None:
    layers, labels = planted()
    for evaluation in probe_layers(layers, labels, jobs=1):
        bound = 3 * np.sqrt(0.25 / len(evaluation.row) * len(SOUND.seeds))
        assert abs(evaluation.shuffled.mean() - 0.5) <= bound
        assert np.isnan(evaluation.typed).all()  # no row shares its type with another


def test_labels_dealt_to_groups_show_the_leak_of_a_row_split_and_say_nothing_where_no_group_recurs() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(150), 4)
    rows = rng.normal(size=(150, 200))[groups] + 0.05 * rng.normal(size=(600, 200))
    labels = np.tile([0, 1, 0, 1], 150)
    leaky, closed = (
        next(probe_layers([rows], labels, groups=groups, recipe=replace(SOUND, split=split, costs=(1.0,)), jobs=1))
        for split in ("rows", "groups")
    )
    assert np.nanmean(leaky.typed) > 0.95
    assert np.isnan(closed.typed).all()


@pytest.mark.parametrize("memorisable", [True, False])
def test_the_control_task_is_high_where_rows_name_their_type_and_at_chance_where_they_do_not(memorisable: bool) -> None:
    rng = np.random.default_rng(0)
    n, n_types = 1200, 60
    groups, types = np.repeat(np.arange(n // 2), 2), rng.integers(0, n_types, size=n)
    labels = np.tile([0, 1], n // 2)
    names = rng.normal(size=(n_types, 80))
    rows = rng.normal(size=(n, 80)) * 0.1 + (names[types] if memorisable else 0)
    rows[:, 0] += 3 * (2 * labels - 1)
    evaluation = next(probe_layers([rows], labels, groups=groups, types=types, jobs=1))
    assert evaluation.accuracy > 0.95
    assert np.isfinite(evaluation.typed).mean() > 0.95
    # Under this split no group recurs: the same labels dealt to groups are unknowable whatever the rows hold.
    assert np.isnan(next(probe_layers([rows], labels, groups=groups, jobs=1)).typed).all()
    control = np.nanmean(evaluation.typed)
    if memorisable:
        assert control > 0.95
    else:
        # Of 60 types with labels of their own, so that the types and not the rows are the trials.
        assert abs(control - 0.5) <= 3 * np.sqrt(0.25 / n_types)


def test_memorised_labels_fill_the_room_a_probe_has() -> None:
    rng = np.random.default_rng(1)
    labels = np.tile([0, 1], 60)
    recipe = replace(SOUND, costs=(1e4,))
    wide, narrow = (next(probe_layers([rng.normal(size=(120, d))], labels, recipe=recipe, jobs=1)) for d in (400, 1))
    assert wide.memorised == 1.0
    assert narrow.memorised < 0.7


def test_labels_of_types_are_dealt_evenly_over_rows() -> None:
    types = np.repeat(np.arange(7), [40, 39, 20, 20, 3, 2, 1])
    for seed in range(20):
        labels = type_labels(types, np.random.default_rng(seed))
        assert all(len(set(labels[types == one])) == 1 for one in range(7))
        assert abs(int(labels.sum()) * 2 - len(labels)) <= 1 + 0 + 1 + 1


def test_rotation_changes_nothing_and_scaling_does() -> None:
    layers, labels = planted(n=300)
    rows = layers[-1]
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    recipe = replace(SOUND, standardise=False, tolerance=1e-10)
    plain = fit_probe(rows, labels, recipe, cost=0.01).decide(rows)
    rotated = fit_probe(rows @ rotation, labels, recipe, cost=0.01).decide(rows @ rotation)
    stretch = np.geomspace(0.1, 10, D)
    scaled = fit_probe(rows * stretch, labels, recipe, cost=0.01).decide(rows * stretch)
    np.testing.assert_allclose(rotated, plain, atol=1e-6)
    assert np.abs(scaled - plain).max() > 1e-2


def test_standardising_makes_scale_irrelevant() -> None:
    layers, labels = planted(n=300)
    stretch = np.geomspace(0.1, 10, D)
    recipe = replace(SOUND, tolerance=1e-10)
    plain = fit_probe(layers[-1], labels, recipe).decide(layers[-1])
    scaled = fit_probe(layers[-1] * stretch + 3, labels, recipe).decide(layers[-1] * stretch + 3)
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


@pytest.mark.parametrize(("size", "read"), [(1e-4, True), (1e-9, False)])
def test_what_rows_cannot_resolve_is_not_scaled_up(size: float, read: bool) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(N) % 2
    rows = rng.normal(size=(N, D))
    rows[:, 0] = size * (2 * labels - 1)
    (evaluation,) = probe_layers([rows], labels, recipe=SOUND)
    assert (evaluation.accuracy > 0.95) == read


def test_swapping_the_labels_mirrors_the_probe_and_leaves_the_scores() -> None:
    layers, labels = planted(n=400)
    one, two = (next(probe_layers(layers[-1:], classes, jobs=1)) for classes in (labels, 1 - labels))
    assert one.accuracy == two.accuracy
    assert one.auc == pytest.approx(two.auc, abs=1e-12)
    for a, b in zip(one.probes, two.probes, strict=True):
        np.testing.assert_allclose(a.weight, -b.weight, atol=1e-3 * np.abs(a.weight).max())


@pytest.mark.parametrize("recipe", [SOUND, RELEASED])
def test_the_same_seed_gives_the_same_bits_whatever_the_number_of_jobs(recipe: Recipe) -> None:
    layers, labels = planted(n=200)
    one, two = (list(probe_layers(layers, labels, recipe=recipe, jobs=jobs)) for jobs in (1, 3))
    for a, b in zip(one, two, strict=True):
        assert a.decision.tobytes() == b.decision.tobytes()
        assert a.shuffled.tobytes() == b.shuffled.tobytes()


def test_rows_wider_than_they_are_many_give_the_probe_of_the_full_problem() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(40, 130)) * np.geomspace(0.2, 5, 130), np.arange(40) % 2
    probe = fit_probe(rows, labels, replace(SOUND, tolerance=1e-10), cost=0.1)
    z = (rows - rows.mean(0)) / rows.std(0)
    full = LogisticRegression(C=0.1, tol=1e-10, max_iter=5000).fit(z, labels)
    np.testing.assert_allclose(probe.decide(rows), full.decision_function(z), atol=1e-6)


def test_released_recipe_is_the_released_procedure() -> None:
    layers, labels = planted(n=500)
    order = np.argsort(labels, kind="stable")
    evaluations = probe_layers([layer[order] for layer in layers], labels[order], recipe=RELEASED, jobs=1)
    for layer, evaluation in zip(layers, evaluations, strict=True):
        rows = layer[order].astype(np.float32)
        train, test, known, known_test = train_test_split(rows, labels[order], test_size=0.4, random_state=42)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = LogisticRegression().fit(train, known)
        assert evaluation.accuracy == accuracy_score(known_test, plain.predict(test))
        assert evaluation.f1 == f1_score(known_test, plain.predict(test))
        assert evaluation.auc == pytest.approx(roc_auc_score(known_test, plain.predict_proba(test)[:, 1]), abs=1e-12)


def test_a_fit_that_stops_early_says_so_and_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    layers, labels = planted(n=300)
    stretched = layers[-1] * np.geomspace(1e-3, 1e3, D)
    assert not fit_probe(stretched, labels, replace(RELEASED, max_iter=3)).converged
    assert fit_probe(layers[-1], labels, SOUND).converged
    early = replace(RELEASED, max_iter=3)
    assert not any(e.probes[0].converged for e in probe_layers([stretched] * 6, labels, recipe=early, jobs=3))
    assert not recwarn.list


def test_c_is_the_first_minimum_of_the_validation_loss() -> None:
    layers, labels = planted(n=300)
    recipe = replace(SOUND, seeds=(0,))
    for rows, evaluation in zip(layers, probe_layers(layers, labels, recipe=recipe, jobs=1), strict=True):
        split = group_split(labels, np.arange(300), 0)
        fits = [fit_probe(rows[split.train], labels[split.train], recipe, cost) for cost in recipe.costs]
        losses = [log_loss(labels[split.validation], expit(fit.decide(rows[split.validation]))) for fit in fits]
        rises = [i for i in range(1, len(losses)) if losses[i] > losses[i - 1]]
        assert evaluation.probes[0].cost == recipe.costs[(rises or [len(losses)])[0] - 1]


def test_mean_difference_and_nearest_centroid_by_hand() -> None:
    rows = np.array([[0.0, 0.0], [2.0, 0.0], [3.0, 0.0], [11.0, 0.0]])
    labels = np.array([0, 0, 1, 1])
    recipe = replace(SOUND, standardise=False)
    centroid = fit_probe(rows, labels, replace(recipe, kind="nearest_centroid"))
    difference = fit_probe(rows, labels, replace(recipe, kind="mean_difference"))
    np.testing.assert_allclose(centroid.weight, [6, 0])
    np.testing.assert_allclose(difference.weight, [6, 0])
    # Means 1 and 7, standard deviations 1 and 4: half way is 4, and 2.2 is 1.2 deviations from both.
    assert -centroid.bias / 6 == pytest.approx(4)
    assert -difference.bias / 6 == pytest.approx(2.2)


def test_groups_are_never_divided_and_every_part_sees_both_classes() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, size=400)
    labels = np.where(groups < 10, 0, np.where(groups < 20, 1, np.arange(400) % 2))
    for seed in range(20):
        split = group_split(labels, check_groups(groups, 400), seed)
        parts = [set(groups[getattr(split, name)]) for name in ("train", "validation", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 30
        assert sorted(np.concatenate([split.train, split.validation, split.test])) == list(range(400))
        assert 0.3 < len(split.test) / 400 < 0.5


def test_row_split_is_scikit_learns() -> None:
    labels = np.arange(50) % 2
    train, test = train_test_split(np.arange(50), test_size=0.4, random_state=42)
    split = row_split(labels, 42)
    assert split.train.tolist() == train.tolist()
    assert split.test.tolist() == test.tolist()


ROWS = np.random.default_rng(0).normal(size=(12, 3))
HALF = [0, 1] * 6


@pytest.mark.parametrize(
    ("rows", "labels", "groups", "message"),
    [
        (ROWS, [1] * 12, None, "all 12 rows have label 1.*add rows with label 0"),
        (ROWS, [0, 1] * 5 + [0, 2], None, "row 11 has label 2: legal labels are 0 and 1"),
        (ROWS, [0, 1] * 5 + [0, float("nan")], None, "row 11 has label nan"),
        (ROWS, [0] * 11 + [1], None, r"label 1 has 1 row\(s\), fewer than the 3 parts"),
        (ROWS, HALF, ["a"] * 12, r"the rows with label 0 lie in 1 group\(s\)"),
        (ROWS, HALF, ["a"] * 11, "11 groups for 12 rows"),
        (np.where(np.arange(12)[:, None] == 7, np.nan, ROWS), HALF, None, "layer 0: row 7 holds NaN"),
        (ROWS[:11], HALF, None, "layer 0 has rows of shape .11, 3. for 12 labels"),
        (ROWS, [], None, "give one label"),
    ],
)
def test_bad_data_is_refused_by_name(rows: Any, labels: Any, groups: Any, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        list(probe_layers([rows], labels, groups=groups, jobs=1))


def test_too_few_rows_for_the_released_split_are_refused() -> None:
    with pytest.raises(ProbeError, match="3 rows are too few"):
        list(probe_layers([ROWS[:3]], [0, 1, 0], recipe=RELEASED, jobs=1))
    with pytest.raises(ProbeError, match="holds one class only"):
        list(probe_layers([ROWS], [0] * 11 + [1], recipe=RELEASED, jobs=1))
