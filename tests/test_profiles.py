"""What each analysis says of a layer, on the axis all share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small import SMALL
from tiny import native

from analyses.back_patching.figures import source_gain, target_gain
from analyses.base import Analysis
from analyses.communication_channels.figures import readers, writers
from analyses.concept_depth.figures import selectivity
from analyses.logit_lens import LogitLens
from analyses.logit_lens.figures import agreement
from analyses.registry import every_analysis, get_analysis
from analyses.results.profiles import counts, mean_by_layer
from analyses.results.result import Result
from analyses.voids import Voids
from probes.errors import OptionError
from probes.store import ActivationStore


@pytest.mark.parametrize("analysis", every_analysis(), ids=lambda a: a.name)
def test_every_analysis_says_something_of_each_layer(analysis: type[Analysis]) -> None:
    assert analysis.profiles
    for spec in analysis.profiles.values():
        assert spec.title
        assert spec.unit
        assert len(spec.caption) > 60


def test_profiles_cover_the_layers_with_intervals_around_their_values(store: ActivationStore, tmp_path: Path) -> None:
    for analysis in (Voids(alpha=(0.8, 0.2)), LogitLens()):
        result = analysis.run(native(), [(5, 6, 7, 8), *((9 + i, 10, 3 + i) for i in range(6))], store=store)
        assert set(result.profiles) == set(analysis.profiles)
        for name in result.profiles:
            table = result.profile(name)
            assert table["layer"].tolist() == [0, 1, 2]
            assert (table["ci_low"] <= table["value"] + 1e-9).all()
            assert (table["value"] <= table["ci_high"] + 1e-9).all()
        result.save(tmp_path / result.analysis)
        saved = json.loads((tmp_path / result.analysis / "profiles.json").read_text())
        assert saved.keys() == result.profiles.keys()
    usage = Result.load(tmp_path / "voids").tables["usage"]
    first = usage[usage["alpha"] == 0.8]["active_fraction"].tolist()
    assert saved_values(tmp_path / "voids", "active") == first
    with pytest.raises(OptionError, match="Did you mean 'agreement'"):
        Result.load(tmp_path / "logit_lens").profile("agrement")


def saved_values(folder: Path, name: str) -> list[float]:
    return list(json.loads((folder / "profiles.json").read_text())[name]["columns"]["value"])


def test_means_are_over_rows_and_intervals_over_prompts() -> None:
    rows = [
        (prompt, position, layer, float(prompt == layer))
        for prompt in range(6)
        for position in (0, 1)
        for layer in (0, 1)
    ]
    table = pd.DataFrame(rows, columns=["prompt", "position", "layer", "agrees"])
    profile = agreement({"read": table})
    assert profile["value"].tolist() == pytest.approx([1 / 6, 1 / 6])
    assert profile["ci_low"].tolist() == [0.0, 0.0]
    few = agreement({"read": table[table["prompt"] < 5]})
    assert few[["ci_low", "ci_high"]].isna().all(axis=None)
    alike = mean_by_layer(table.assign(agrees=1.0), "agrees", ["prompt", "position"])
    assert alike[["ci_low", "value", "ci_high"]].to_numpy().tolist() == [[1.0, 1.0, 1.0]] * 2


def test_flagged_channels_are_counted_at_both_ends() -> None:
    table = pd.DataFrame(
        {"source_layer": [0, 0, 1, 2], "target_layer": [1, 3, 3, 3], "flagged": [True, True, False, True]}
    )
    assert writers({"composition": table})["value"].tolist() == [2, 0, 1, 0]
    assert readers({"composition": table})["value"].tolist() == [0, 1, 0, 2]
    assert counts(pd.Series([], dtype=int), 2)["value"].tolist() == [0, 0]


def test_gains_are_told_by_target_and_by_source() -> None:
    grid = pd.DataFrame(
        {"prompt": [0, 0, 0], "position_name": "t1", "source_layer": [2, 3, 3], "target_layer": [1, 1, 2],
         "answer_logprob": [-1.0, -2.0, -5.0], "baseline_logprob": -3.0}
    )  # fmt: skip
    assert target_gain({"grid": grid})[["layer", "value"]].to_numpy().tolist() == [[1, 1.5], [2, -2.0]]
    assert source_gain({"grid": grid})[["layer", "value"]].to_numpy().tolist() == [[2, 2.0], [3, -0.5]]


def test_independent_sets_combine_their_intervals() -> None:
    scores = pd.DataFrame(
        {"variant": "plain", "probe": "logistic", "layer": 0, "selectivity": [0.2, 0.4],
         "selectivity_low": [0.2 - 0.3, 0.4 - 0.4], "selectivity_high": [0.2 + 0.3, 0.4 + 0.4]}
    )  # fmt: skip
    profile = selectivity({"scores": scores}).iloc[0]
    assert (profile["value"], profile["ci_high"] - profile["value"]) == pytest.approx((0.3, 0.25))
    assert np.isclose(profile["value"] - profile["ci_low"], 0.25)


@pytest.mark.parametrize("name", list(SMALL))
def test_a_run_of_each_analysis_yields_its_profiles(name: str, store: ActivationStore) -> None:
    analysis, prompts = SMALL[name]
    result = analysis.run(native(), prompts, store=store)
    assert set(result.profiles) == set(get_analysis(name).profiles)
    for profile in result.profiles:
        table = result.profile(profile)
        assert set(table["layer"]) <= {0, 1, 2}
        assert len(table) >= 2
        assert table["value"].notna().all()
