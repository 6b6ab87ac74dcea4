"""Needs and their union: nothing is captured that follows from something else, or is held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import native

from probes.capture.needs import Feature, Need, as_needs, features_of, make_plan
from probes.capture.run import capture, plan_capture
from probes.errors import PointError
from probes.points import Address
from probes.reducers import ROWS, Reducer
from probes.store import ActivationStore

SEQUENCES = [(1, 2, 3), (4, 5), (1, 2, 3)]


def holding(*keys: str):
    def ask(sequences: Sequence[tuple[int, ...]], features: Sequence[Feature]) -> np.ndarray:
        return np.array([[f.key in keys for f in features] for _ in sequences])

    return ask


def test_points_as_text_stand_for_their_rows() -> None:
    norms = Need("resid_post.1", Reducer("norm"))
    assert as_needs(["resid_post.*", norms]) == [Need("resid_post.*"), norms]
    assert as_needs("resid_post.*") == [Need("resid_post.*")]
    assert as_needs(norms) == [norms]


def test_a_capture_takes_points_as_text(tmp_path: Path) -> None:
    model, store = native(), ActivationStore(tmp_path)
    assert plan_capture(model, SEQUENCES, ["resid_post.*"], store).forwards == 2
    rows = capture(model, SEQUENCES, ["resid_post.*"], store).packed("resid_post.2")
    torch.testing.assert_close(rows, capture(model, SEQUENCES, [Need("resid_post.2")], store).packed("resid_post.2"))
    assert plan_capture(model, SEQUENCES, [Need("resid_post.*")], store).forwards == 0


@pytest.mark.wrong_types
@pytest.mark.parametrize("needs", [5, [5], [("resid_post.1", "z.1")], None])
def test_needs_of_a_wrong_type_are_refused(needs: object, tmp_path: Path) -> None:
    for ask in (capture, plan_capture):
        with pytest.raises(PointError, match="such as 'resid_post"):
            ask(native(), SEQUENCES, needs, ActivationStore(tmp_path))  # type: ignore[operator]


@pytest.mark.wrong_types
@pytest.mark.parametrize("points", [5, (5,), None])
def test_points_of_a_wrong_type_are_refused(points: object) -> None:
    with pytest.raises(PointError, match="such as 'resid_post"):
        Need(points).features(3)  # type: ignore[arg-type]


def test_the_stream_between_blocks_has_one_name() -> None:
    assert Feature(Address("resid_pre", 2)).key == Feature(Address("resid_post", 1)).key
    assert Feature(Address("resid_pre", 0)).key == "resid_pre.0/rows@all"


def test_what_follows_from_rows_is_not_asked_for() -> None:
    needs = [
        Need("resid_post.*", Reducer("norm")),
        Need("resid_post.1"),
        Need("resid_pre.2", Reducer(positions="last")),
    ]
    keys = [feature.key for feature in features_of(needs, 3)]
    assert keys == ["resid_post.0/norm@all", "resid_post.2/norm@all", "resid_post.1/rows@all"]


def test_only_missing_features_are_planned_and_twins_run_once() -> None:
    plan = make_plan(SEQUENCES, [Need("resid_post.*")], 3, holding("resid_post.0/rows@all"))
    assert plan.sequences == 2
    assert plan.forwards == 2
    assert plan.tokens == 5
    assert [str(f.address) for f in plan.missing[0].features] == ["resid_post.1", "resid_post.2"]
    assert plan.rows == 10
    width = {"d_model": 8}
    assert plan.bytes(width, 2) == 10 * 8 * 2


def test_held_rows_serve_every_reduction() -> None:
    needs = [
        Need("resid_post.0", Reducer("norm")),
        Need("resid_post.0", Reducer("mean")),
        Need("resid_post.0", Reducer(positions=(0,))),
    ]
    plan = make_plan(SEQUENCES, needs, 3, holding("resid_post.0/rows@all"))
    assert plan.forwards == 0
    assert "no forward pass" in plan.summary(0)


def test_reducers_have_one_text_and_equal_by_it() -> None:
    basis = torch.eye(2, 4)
    assert str(Reducer(positions=(0, -1))) == "rows@0,-1"
    assert str(Reducer("lens_ids", ids=(3, 4))) == "lens_ids:3,4@all"
    assert Reducer("project", basis=basis) == Reducer("project", basis=basis.clone())
    assert Reducer("project", basis=basis) != Reducer("project", basis=2 * basis)
    assert Reducer.parse("int8") == Reducer("int8")
    assert Reducer.parse("last") == Reducer(positions="last")
    assert Reducer.parse("at:0,-1") == Reducer(positions=(0, -1))
    assert Reducer.parse("lens:10") == Reducer("lens_top", top_k=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norms", "Did you mean 'norm'"),
        ("at:x", "write at:0,-1"),
        ("lens:", "write at:0,-1 or lens:10"),
        ("lens:0", "at least 1"),
    ],
)
def test_illegal_reducers_are_refused(text: str, message: str) -> None:
    with pytest.raises(PointError, match=message):
        Reducer.parse(text)


def test_codes_take_a_byte_each_and_eight_a_row() -> None:
    plan = make_plan([(1, 2, 3)], [Need("resid_post.0", Reducer("int8"))], 3, holding())
    assert plan.bytes({"d_model": 32}, 4) == 3 * (32 + 8)


def test_pattern_keeps_rows_only() -> None:
    with pytest.raises(PointError, match="'pattern' keeps rows only"):
        Need("pattern.0", Reducer("norm")).features(2)
    assert Feature(Address("pattern", 0), ROWS).row_values({"head": 3}, 5) == 75
