"""Identities that patching keeps on every causal family, and the statistics, journal and refusals around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from real_tokenizers import tokenizer_of
from scipy.stats import kstest
from test_causal_patching import CAUSAL, CLEAN, CORRUPTED, native, pair_line, run

from analyses.causal_patching import CausalPatching
from analyses.causal_patching.cells import EVERYWHERE, Cell, window_of
from analyses.causal_patching.decision import earliest_lasting, latest
from analyses.causal_patching.grid import Sources, addresses, capture_values
from analyses.causal_patching.levels import NodeLevel, circuit_metrics
from analyses.causal_patching.nulls import null_partner
from analyses.causal_patching.opened import Opener, OpenRuns
from analyses.causal_patching.pairs import pair_of, resolved
from analyses.causal_patching.resumed_grid import _joined
from analyses.causal_patching.statistics import sign_flips
from analyses.causal_patching.task_pairs import generated
from analyses.causal_patching.verification import budget, verification_row
from analyses.circuits import areas, draw_per_layer
from analyses.cli import main
from analyses.interventions import Tally
from probes.errors import OptionError, PromptError
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.progress import QUIET
from probes.prompts import Prompt
from probes.store import ActivationStore

COMPONENTS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")


def test_cells_of_near_positions_run_together_and_end_as_each_alone() -> None:
    # Two cells at 4 cost two rows each from 3, less than a batch; twenty-five at 9 would cost too many from 4.
    assert _joined({4: [0, 1], 3: [2], 9: [3] * 25}) == {3: [2, 0, 1], 9: [3] * 25}
    assert _joined({EVERYWHERE: [0], 0: [1]}) == {EVERYWHERE: [0], 0: [1]}
    model = native("llama")
    pair = pair_of(0, resolved(model, [pair_line(model)], ["a"], False)[0], False)
    positions = sorted(pair.sources("denoise"))[-3:]
    cells = [
        Cell(point, layer, position=p) for point in ("resid_post", "attn_out") for layer in (0, 1) for p in positions
    ]
    opened = Opener(model, ("logit_diff",), frozenset(addresses(cells))).open(pair, ("denoise",), None)[0]
    alone = torch.cat([opened.patched([cell]) for cell in cells])
    assert float((alone - opened.base).abs().min()) > 0
    assert torch.allclose(opened.patched(cells), alone, atol=1e-4)


def test_a_run_is_opened_once_unless_noise_makes_it_or_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream = native("llama"), Address("resid_post", 1)
    line = pair_line(model)
    line.fields["span"] = [2, 4]  # type: ignore[index]
    pair = pair_of(0, resolved(model, [line], ["a"], True)[0], True)
    opener = Opener(model, ("logit_diff",), frozenset({stream}), OpenRuns())
    drawn = [torch.full((2, model.shape.d_model), size) for size in (0.1, 0.2)]
    (first,), (second,) = (opener.open(pair, ("noise",), noise) for noise in drawn)
    assert first.grid is second.grid
    assert not torch.equal(first.sources.values[stream], second.sources.values[stream])
    assert torch.equal(first.grid.values[stream], replace(opener, kept=None).values(pair, False, None)[stream])
    monkeypatch.setattr("analyses.causal_patching.opened.KEPT_BYTES", 0)
    full = replace(opener, kept=OpenRuns())
    assert full.open(pair, ("noise",), drawn[0])[0].grid is not full.open(pair, ("noise",), drawn[0])[0].grid


@pytest.mark.parametrize("family", CAUSAL)
def test_identities_of_patching(family: str) -> None:
    model = native(family)
    pair = pair_of(0, resolved(model, [pair_line(model)], ["a"], False)[0], False)
    every = [Cell("resid_post", layer) for layer in range(3)]
    heads = [Cell("z", 1, head, 4) for head in range(4)]
    cells = [
        *every,
        Cell("resid_post", 2, position=5),
        Cell("resid_post", 2, position=3),
        Cell("attn_out", 1, position=4),
    ]
    opener = Opener(model, ("logit_diff",), frozenset(addresses([*cells, *heads])))
    denoise, noise = opener.open(pair, ("denoise", "noise"), None)
    for opened, other in ((denoise, denoise.clean), (noise, noise.corrupted)):
        values = opened.patched(cells)[:, 0]
        size = 1e-4 * max(1.0, float(opened.gap.abs()[0]))
        # The stream at all positions, or at the last one after the last block, is the other run.
        assert torch.allclose(values[:4], other.expand(4), atol=size)
        assert torch.equal(opened.grid.last_rows([cells[4]], opened.sources)[0], opened.grid.unpatched)
        # A run copied into itself is itself.
        base = opener.values(pair, opened.direction == "denoise", None)
        itself = Sources(base, {position: position for position in range(6)})
        assert torch.allclose(opened.patched(cells, itself)[:, 0], opened.base[0].expand(len(cells)), atol=size)
    if model.refusal(Address("resid_mid", 0)) is None and family not in ("opt_post_norm",):
        # All heads of a position together are what attention adds there.
        sources = capture_values(model, CLEAN, {Address("z", 1), Address("attn_out", 1)})
        writes = {Address("z", 1): lambda t: _put(t, sources[Address("z", 1)])}
        z, added = (
            capture_values(model, CORRUPTED, {Address("logits")}, w)[Address("logits")][-1]
            for w in (writes, {Address("attn_out", 1): lambda t: _put(t, sources[Address("attn_out", 1)])})
        )
        assert torch.allclose(z, added, atol=1e-4)


def _put(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    out = tensor.clone()
    out[0, 4] = source[4]
    return out


@pytest.mark.parametrize("family", CAUSAL)
def test_directions_mirror_pairs(family: str, store: ActivationStore) -> None:
    """Noising a pair is denoising the pair the other way round."""
    model = native(family)
    line = pair_line(model)
    ids = {"answer_tokens": line.fields["distractor_tokens"], "distractor_tokens": line.fields["answer_tokens"]}
    swapped = Prompt(CORRUPTED, None, {"corrupted_tokens": list(CLEAN), **ids})
    options = {"components": ("attn_out", "z"), "heads": "by_position", "layers": (1,), "roles": ("-1", "-2")}
    noise = run(model, [line], store, directions=("noise",), **options)["cells"]
    denoise = run(model, [swapped], store, directions=("denoise",), **options)["cells"]
    assert np.allclose(noise["m_patched"], -denoise["m_patched"], atol=1e-5)
    assert np.allclose(noise["recovery"], denoise["recovery"], atol=1e-5)


def test_every_metric_in_one_pass_is_each_by_itself(store: ActivationStore) -> None:
    model = native("llama")
    names = ("logit_diff", "logprob", "prob", "prob_diff", "kl")
    together = run(model, [pair_line(model)], store, metric=names, components=("mlp_out",))["cells"]
    for name in names:
        alone = run(model, [pair_line(model)], store, metric=(name,), components=("mlp_out",))["cells"]
        part = together[together["metric"] == name]
        assert np.allclose(part["m_patched"], alone["m_patched"], atol=1e-5)
        assert (part["unit"] == alone["unit"].iloc[0]).all()
    ends = together[(together["metric"] == "kl") & (together["direction"] == "noise") & (together["layer"] == 0)]
    assert (ends["recovery"].dropna() < 1.5).all()


def test_noise_is_drawn_for_the_subject_alone_and_averaged(store: ActivationStore) -> None:
    model = native("gpt2")
    line = pair_line(model)
    line.fields["span"] = [2, 4]  # type: ignore[index]
    options = {"corruption": "noise", "noise_samples": 3, "components": ("resid_post",)}
    tables = run(model, [line], store, **options)
    cells = tables["cells"]
    assert tables["pairs"]["first_difference"].tolist() == [2]
    assert cells[cells["position"] < 2]["exact_zero"].all()
    assert cells[(cells["layer"] == 2) & (cells["position"] == 5)]["recovery"].tolist() == pytest.approx(
        [1, 1], abs=1e-4
    )
    again = run(model, [line], store, **options)["cells"]
    assert again["m_patched"].tolist() == cells["m_patched"].tolist()


def test_some_layers_are_those_of_all(store: ActivationStore) -> None:
    model = native("llama")
    whole = run(model, [pair_line(model)], store, components=("attn_out", "z"))["cells"]
    for chosen, layers in (({"layers": (1,)}, {1}), ({"stride": 2}, {0, 2})):
        some = run(model, [pair_line(model)], store, components=("attn_out", "z"), **chosen)["cells"]
        same = whole[whole["layer"].isin(layers)].reset_index(drop=True)
        assert np.allclose(some["m_patched"], same["m_patched"], atol=1e-5)
        assert some["layer"].tolist() == same["layer"].tolist()
    with pytest.raises(OptionError, match="layer 3 does not exist: legal are 0 to 2"):
        run(model, [pair_line(model)], store, layers=(3,))


def test_windows_are_those_of_causal_tracing(store: ActivationStore) -> None:
    assert [window_of(layer, 3, 6) for layer in (0, 1, 5)] == [(0, 1), (0, 2), (4, 5)]
    assert (window_of(2, "prefix", 6), window_of(2, "suffix", 6)) == ((0, 2), (2, 5))
    model = native("llama")
    wide = run(model, [pair_line(model)], store, components=("attn_out",), window="prefix")
    one = run(model, [pair_line(model)], store, components=("attn_out",))["cells"]
    first = wide["cells"][(wide["cells"]["layer"] == 0) & ~wide["cells"]["exact_zero"]]
    alone = one[(one["layer"] == 0) & ~one["exact_zero"]]
    assert np.allclose(first["m_patched"], alone["m_patched"], atol=1e-5)
    assert wide["cells"]["n_patched"].max() == 3
    assert set(wide["window"]["bound"]) == {"prefix"}


def test_models_that_read_both_ways_get_whole_forwards(store: ActivationStore) -> None:
    model, options = native("bert"), {"min_gap": 0, "min_pairs": 1, "nulls": "none", "components": ("resid_post", "z")}
    analysis = CausalPatching(**options)  # type: ignore[arg-type]
    lines = [pair_line(model)]
    cells = analysis.run(model, lines, store=store).tables["cells"]
    # Eighteen cells of the stream and twelve of heads, in both directions, each three blocks of six positions.
    assert "1,080 block-rows" in analysis.interventions(model, analysis.collect(model, lines)).detail
    assert set(cells["position"]) == {-1, *range(6)}
    assert not cells["exact_zero"].any()
    assert (cells[cells["position"] == 0]["effect"].abs() > 0).any()


def test_a_stopped_run_goes_on(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model = native("llama")
    lines = [pair_line(model, (5, 6, 7 + i, 8), (5, 6, 17 + i, 8)) for i in range(3)]
    analysis = CausalPatching(min_gap=0, min_pairs=1, nulls="none", components=("resid_post", "z"))
    whole = analysis.run(model, lines, store=store)
    ticked: list[int] = []
    plain = Tally.tick

    def stopping(tally: Tally, forwards: int) -> None:
        plain(tally, forwards)
        ticked.append(forwards)
        if len(ticked) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Tally, "tick", stopping)
    with pytest.raises(KeyboardInterrupt):
        analysis.run(model, lines, store=store)
    assert len(list((store.root / "causal_patching").rglob("*.npy"))) == 3
    resumed = analysis.run(model, lines, store=store)
    pd.testing.assert_frame_equal(resumed.tables["cells"], whole.tables["cells"])
    done = [result.provenance["counts"]["intervention_forwards"] for result in (whole, resumed)]
    assert done[1] == done[0] // 2
    assert not list((store.root / "causal_patching").rglob("*.npy"))


def test_signs_give_uniform_p_without_an_effect_and_find_one_that_is_there() -> None:
    rng = np.random.default_rng(0)
    smallest = [float(sign_flips(rng.normal(size=(10, 6)), 1000 + seed, flips=200)[0].min()) for seed in range(200)]
    assert kstest(smallest, "uniform").pvalue > 0.01
    planted = rng.normal(size=(16, 40))
    planted[:, 7] += 3
    p_fwe, alone = sign_flips(planted, 0)
    assert p_fwe[7] < 0.01
    assert (np.delete(p_fwe, 7) > 0.05).all()
    assert (alone <= p_fwe + 1e-12).all()
    assert np.isnan(sign_flips(planted[:7], 0)[0]).all()
    assert sign_flips(np.zeros((9, 2)), 0)[0].tolist() == [1, 1]


def test_bounds_of_curves_by_hand() -> None:
    curves = np.array([[0.1, 0.6, 0.4, 0.9], [0.6, 0.7, 0.8, 1.0], [0.0, 0.1, 0.2, 0.3]])
    assert earliest_lasting(curves)[:2].tolist() == [3, 0]
    assert latest(curves)[:2].tolist() == [3, 3]
    assert np.isnan([earliest_lasting(curves)[2], latest(curves)[2]]).all()


def test_nulls_hold_neither_answer_or_the_same_one() -> None:
    model = native("llama")
    ids = {"answer_tokens": [1], "distractor_tokens": [2]}
    other = {"answer_tokens": [3], "distractor_tokens": [4]}
    lines = [
        Prompt((5, 6, 7), None, {"corrupted_tokens": [5, 6, 8], **ids}),
        Prompt((5, 9, 7), None, {"corrupted_tokens": [5, 9, 8], **ids}),
        Prompt((5, 6, 9), None, {"corrupted_tokens": [5, 6, 10], **other}),
        Prompt((5, 6, 9, 9), None, {"corrupted_tokens": [5, 6, 10, 9], **other}),
    ]
    prompts = resolved(model, lines, list("abcd"), False)
    pairs = [pair_of(i, prompt, False) for i, prompt in enumerate(prompts)]
    of = lambda i, null: getattr(null_partner(pairs[i], pairs, "denoise", null), "index", None)  # noqa: E731
    assert [of(i, "unrelated") for i in range(4)] == [2, 2, 0, None]
    assert [of(i, "same_class") for i in range(4)] == [1, 0, None, None]


def test_circuits_keep_everything_or_nothing(store: ActivationStore) -> None:
    model = native("gemma2")
    lines = [pair_line(model, (5, 6, 7 + i, 8), (5, 6, 17 + i, 8)) for i in range(2)]
    options = {"components": ("mlp_out",), "circuit": "nodes", "n_random": 2, "sizes": (0.2, 1.0)}
    analysis = CausalPatching(min_gap=0, min_pairs=1, nulls="none", **options)  # type: ignore[arg-type]
    table = analysis.run(model, lines, store=store).tables["faithfulness"]
    assert table[table["share"] == 1]["f"].to_numpy() == pytest.approx(1)
    pairs = [pair_of(i, prompt, False) for i, prompt in enumerate(resolved(model, lines, ["a", "b"], False))]
    one, level = analysis._run(model, pairs, Tally(QUIET), None), NodeLevel(model.shape)
    circuits = [np.arange(len(level.nodes)), np.arange(0)]
    full, empty = circuit_metrics(one, level, circuits, "counterfactual", QUIET).T
    ends = [one.ends(pair) for pair in pairs]
    assert full.tolist() == pytest.approx([end[0][0] for end in ends], abs=1e-4)
    # Without any head or MLP of its own, all that is left of the clean run is its embedding.
    assert (empty != full).all()


def test_everything_beside_the_grid_is_drawn_and_counted(store: ActivationStore) -> None:
    model = native("llama")
    lines = [pair_line(model, (5, 6, 7 + i, 8), (5, 6, 17 + i, 8)) for i in range(2)]
    analysis = CausalPatching(
        min_gap=0, min_pairs=1, components=("resid_post", "z"), attribution=("atp", "atp_star", "eap", "eap_ig"), verify=3,
        paths=("0.1>2.3.q", "m1>logits"), circuit="nodes", n_random=1, sizes=(0.2, 1.0), ig_steps=2,
    )  # fmt: skip
    foretold = analysis.interventions(model, analysis.collect(model, lines))
    result = analysis.run(model, lines, store=store)
    assert result.provenance["counts"]["intervention_forwards"] <= foretold.total
    assert set(result.tables["verification"]["method"]) == {"atp", "atp_star", "eap", "eap_ig"}
    assert result.tables["nodes"]["verified"].sum() == result.tables["edges"]["verified"].sum() == 12
    for name in ("agreement", "faithfulness", "stream_map", "head_map", "curves", "pairs"):
        figure = result.figure(name)
        assert figure.data, name
        # Every figure says on what it was made.
        directions = {"faithfulness": (), "agreement": ("noising",)}.get(name, ("denoising", "noising"))
        shown = ("logit_diff", "token corruption", "2 of 2 pairs", *directions)
        assert all(part in figure.layout.title.text for part in shown), (name, figure.layout.title.text)


def test_areas_and_controls_by_hand() -> None:
    shares = [0.1, 0.2, 1.0]
    flat = areas(shares, [1.0, 1.0, 1.0])
    assert (flat.cpr, flat.cmd, flat.cpr_log, flat.cmd_log) == pytest.approx((0.9, 0, 1, 0))
    uneven = areas([0.1, 0.2, 1.0], [0.0, 0.5, 1.0])
    assert (uneven.cpr, uneven.cmd) == pytest.approx((0.1 * 0.25 + 0.8 * 0.75, 0.1 * 0.75 + 0.8 * 0.25))
    drawn = draw_per_layer(np.random.default_rng(0), np.arange(30) // 10, np.array([1, 2, 25]))
    assert sorted(drawn // 10) == [0, 0, 2]


def test_a_budget_bounds_what_was_missed() -> None:
    scores = np.linspace(1, 0, 100)
    chosen = budget(scores, 59, 0)
    assert chosen.top == tuple(range(59))
    assert len(chosen.random) == 41
    row = verification_row(
        "atp", scores[None], scores[None, chosen.chosen], chosen, True, np.zeros(1, dtype=np.int64), 0
    )
    assert row["missed_bound"] == pytest.approx(1 - 0.05 ** (1 / 41))
    assert row["spearman"] == pytest.approx(1)
    assert row["share_of_effect"] == pytest.approx(scores[:59].sum() / scores.sum(), rel=0.05)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"corrupted_tokens": [5, 6, 7]}, "are the same"),
        ({}, 'give "corrupted" or "corrupted_tokens"'),
        ({"corrupted_tokens": [5, 6, 8], "answer_tokens": []}, "answer_tokens"),
        ({"corrupted_tokens": [5, 6, 8], "alignment": [[0, 1], [1, 0]]}, "both rising"),
        ({"corrupted_tokens": [5, 6, 8], "named_positions": {"s": 3}}, "legal are -3 to 2"),
        ({"corrupted_tokens": [5, 6, 97]}, "token id 97 is outside the vocabulary"),
    ],
)
def test_bad_pairs_are_refused_with_file_and_line(
    fields: dict[str, object], said: str, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"tokens": [5, 6, 7], "corrupted_tokens": [5, 6, 8], "answer_tokens": [1], "distractor_tokens": [2]}
    bad = {"tokens": [5, 6, 7], "answer_tokens": [1], "distractor_tokens": [2], **fields}
    file = tmp_path / "p.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    code = main(
        ["run", "causal_patching", "--model", str(llama_folder), "--prompts", str(file), "--out", str(tmp_path / "o")]
    )
    message = capsys.readouterr().err
    assert code == 2
    assert "p.jsonl:2" in message
    assert said in message


def test_tasks_make_pairs_that_differ_in_one_fact() -> None:
    tokenizer = tokenizer_of("llama2")
    model = NativeModel(make("llama", vocab_size=len(tokenizer)), tokenizer, ref="speaking", weights="speaking")
    for task, roles in (
        ("ioi", {"io", "s1", "s1+1", "s2", "end"}), ("greater_than", {"year", "end"}), ("docstring", {"name", "end"}),
        ("two_hop", {"entity", "end"}), ("facts", {"country", "end"}),
    ):  # fmt: skip
        prompts = generated(model, task, 6, "token", 0)
        for index, prompt in enumerate(prompts):
            pair = pair_of(index, prompt, False)
            assert roles <= set(pair.named)
            assert pair.named["end"] == len(pair.clean) - 1
            assert pair.clean != pair.corrupted
            if not pair.reason and task in ("ioi", "docstring"):
                assert sum(a != b for a, b in zip(pair.clean, pair.corrupted, strict=True)) == 1
        span = generated(model, task, 1, "noise", 0)[0].fields["span"]
        assert 0 <= span[0] < span[1]
    io = pair_of(0, generated(model, "ioi", 1, "token", 0)[0], False)
    assert io.first_difference == io.named["s2"]
    with pytest.raises(OptionError, match="no reference prompts"):
        generated(model, "facts", 1, "reference", 0)


def test_pairs_of_two_lengths_are_listed_and_no_gap_is_refused(store: ActivationStore) -> None:
    model = NativeModel(make("llama"), ref="llama", weights="own")
    longer = Prompt((5, 6, 7), None, {"corrupted_tokens": [5, 6, 8, 9], "answer_tokens": [1], "distractor_tokens": [2]})
    tables = run(model, [pair_line(model), longer], store, components=("resid_post",))
    listed = tables["pairs"].set_index("pair")
    assert listed["kept"].tolist() == [True, False]
    assert listed.loc[1, ["where", "reason"]].tolist() == ["prompt 1", "3 and 4 tokens without an alignment"]
    assert set(tables["cells"]["pair"]) == {0}
    with pytest.raises(PromptError, match="does not tell these prompts apart"):
        run(model, [pair_line(model)], store, min_gap=1e3)
    with pytest.raises(OptionError, match="resid_mid"):
        run(native("phi"), [pair_line(native("phi"))], store, components=("resid_mid",))
    with pytest.raises(OptionError, match="legal are a number of layers"):
        CausalPatching(window="0x")
