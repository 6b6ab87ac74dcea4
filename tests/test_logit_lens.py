"""The logit lens as an analysis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import PROMPTS, native

from analyses.logit_lens import LogitLens
from analyses.logit_lens.curve import chance
from analyses.voids import Voids
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import PointError
from probes.models.backends.native import NativeModel
from probes.store import ActivationStore


def test_the_last_layer_is_the_models_prediction(tiny: NativeModel, store: ActivationStore) -> None:
    tables = LogitLens(top_k=3).run(tiny, PROMPTS, store=store).tables
    last = tables["read"].query("layer == 2")
    assert last["agrees"].all()
    assert last["kl_to_final"].max() < 1e-5
    probability = capture(tiny, PROMPTS, [Need("logits")], store).packed("logits").softmax(-1)
    assert last["final_probability"].tolist() == pytest.approx(probability.amax(-1).tolist(), abs=1e-5)
    top = tables["top"].query("layer == 2 and rank == 0")
    assert top["token_id"].tolist() == probability.argmax(-1).tolist()
    assert top["probability"].tolist() == pytest.approx(probability.amax(-1).tolist(), abs=1e-5)


def test_rows_line_up_with_prompts_and_positions(
    tiny: NativeModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LogitLens(top_k=2).run(tiny, PROMPTS, store=store).tables
    monkeypatch.setattr("analyses.logit_lens.analysis.CHUNK", 1)
    parts = LogitLens(top_k=2).run(tiny, PROMPTS, store=store).tables
    order = ["layer", "prompt", "position"]
    for name, extra in (("read", []), ("top", ["rank"])):
        a, b = (t[name].sort_values(order + extra).reset_index(drop=True) for t in (whole, parts))
        assert a[[*order, "input_id"]].equals(b[[*order, "input_id"]])
        numeric = a.select_dtypes("number").to_numpy() - b.select_dtypes("number").to_numpy()
        assert abs(numeric).max() < 1e-4
    last = LogitLens(positions="last").run(tiny, PROMPTS, store=store).tables["read"].query("layer == 0")
    assert last["position"].tolist() == [len(p) - 1 for p in PROMPTS]
    assert last["input_id"].tolist() == [p[-1] for p in PROMPTS]


def test_after_voids_it_runs_no_forward(tiny: NativeModel, store: ActivationStore, count_forwards: Any) -> None:
    Voids(max_new_tokens=3).run(tiny, PROMPTS, store=store)
    seen = count_forwards(tiny)
    result = LogitLens().run(tiny, PROMPTS, store=store)
    assert (seen, result.provenance["counts"]["forwards"]) == ([], 0)


def test_the_curve_holds_means_with_intervals_over_prompts(tiny: NativeModel, store: ActivationStore) -> None:
    prompts = [*PROMPTS, (4, 5), (6, 7, 8), (30, 31)]
    tables = LogitLens().run(tiny, prompts, store=store).tables
    table = tables["curve"].set_index(["measure", "layer"])
    mean = tables["read"].groupby("layer")[["agrees", "entropy_bits", "kl_to_final", "final_logprob"]].mean()
    for name in mean:
        assert table.loc[name, "mean"].to_numpy() == pytest.approx(mean[name].to_numpy(), rel=1e-6)
    assert set(table["prompts"]) == {7}
    assert ((table["ci_low"] <= table["mean"] + 1e-9) & (table["mean"] <= table["ci_high"] + 1e-9)).all()
    few = LogitLens().run(tiny, PROMPTS, store=store).tables["curve"]
    assert few[["ci_low", "ci_high"]].isna().all(axis=None)
    assert few["mean"].notna().all()
    alone = LogitLens().run(tiny, PROMPTS[:1], store=store).tables["curve"]
    assert "chance_agrees" not in set(alone["measure"]), "one prompt has no others"


def test_chance_agreement_by_hand() -> None:
    names = ["prompt", "position", "layer", "top_token_id", "final_token_id"]
    rows = [(0, 0, 0, 7, 7), (0, 1, 0, 8, 7), (1, 0, 0, 7, 9), (1, 1, 0, 9, 7), (2, 0, 0, 9, 9)]
    by_layer = chance(pd.DataFrame(rows, columns=names))
    # Other prompts end in 9, 7, 9 | 9, 7, 9 | 7, 7, 9 | 7, 7, 9 | 7, 7, 9, 7.
    assert by_layer.tolist() == pytest.approx([1 / 3, 0, 2 / 3, 1 / 3, 1 / 4])


def test_the_figure_draws_the_intervals_of_the_prompts_chosen(tiny: NativeModel, store: ActivationStore) -> None:
    result = LogitLens().run(tiny, [*PROMPTS, (4, 5), (6, 7, 8), (30, 31)], store=store)
    some = {"read": result.tables["read"].query("prompt < 3")}
    for tables, known in ((result.tables, True), (some, False)):
        for trace in LogitLens.figures["convergence"].draw(tables).data:
            assert np.isfinite(np.asarray(trace.error_x.array, dtype=float)).all() == known


@pytest.mark.parametrize("window", [1, 2, 3, 40])
def test_a_window_reads_what_reading_all_reads_there_and_nothing_else(
    tiny: NativeModel, store: ActivationStore, window: int
) -> None:
    every = LogitLens(window=0).run(tiny, PROMPTS, store=store)
    some = LogitLens(window=window).run(tiny, PROMPTS, store=store)
    lengths = pd.Series([len(prompt) for prompt in PROMPTS])
    for name in ("top", "read"):
        table = every.tables[name]
        kept = table[table["position"] >= lengths[table["prompt"]].to_numpy() - window]
        pd.testing.assert_frame_equal(some.tables[name], kept.reset_index(drop=True), rtol=1e-5)
    assert not every.notes
    assert bool(some.notes) == (window < lengths.max())


@pytest.mark.parametrize("point", ["attn_out", "mlp_out"])
def test_parts_of_a_block_can_be_read(tiny: NativeModel, store: ActivationStore, point: Any) -> None:
    read = LogitLens(point=point).run(tiny, PROMPTS, store=store).tables["read"]
    assert read["kl_to_final"].min() > 0
    assert torch.isfinite(torch.tensor(read["entropy_bits"].to_numpy())).all()


def test_a_model_without_a_lens_is_refused(store: ActivationStore) -> None:
    with pytest.raises(PointError, match="bert"):
        LogitLens().run(native("bert"), PROMPTS, store=store)


@pytest.mark.real
def test_paris(real: Any, store: ActivationStore) -> None:
    tokens = tuple(real.tokenizer("The capital of France is")["input_ids"])
    result = LogitLens(positions="last", top_k=1).run(real, [tokens], store=store)
    last = result.tables["top"].query("layer == 29").iloc[0]
    with torch.no_grad():
        plain = real.module(torch.tensor([tokens])).logits[0, -1].softmax(-1)
    assert last["token"] == " Paris"
    assert last["probability"] == pytest.approx(plain.max().item(), abs=1e-5)
    assert round(last["probability"], 2) == 0.77
