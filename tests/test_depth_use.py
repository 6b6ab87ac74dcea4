"""Depth use as a whole: its tables, its proxies and their agreement, its figures, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from math import factorial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from tiny import PROMPTS, native

from analyses.depth_use import DepthUse
from analyses.depth_use.greedy import orders
from analyses.depth_use.proxies import agreement_table, null_correlations, proxy_tables
from analyses.results.per_prompt import PerPrompt, interval, resampled
from analyses.results.result import Result
from analyses.results.statistics import quantiles
from analyses.similarity.alignment import alignment_table
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.edits import logits, read, skip
from probes.errors import OptionError, PointError, ProbeError, PromptError
from probes.models import Model, load_model
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.prompts import Prompt
from probes.store import ActivationStore

SMALL = {
    "gradient_steps": 4,
    "windows": (1, 2),
    "greedy_steps": 1,
    "drop_blocks": 2,
    "parts": ("block", "mlp"),
}
SKIPS = {**SMALL, "erasure_prompts": 0, "gradient_prompts": 0, "greedy_steps": 0, "drop_blocks": 0}
BARE = {**SKIPS, "skip_prompts": 0}


def column(values: np.ndarray) -> PerPrompt:
    """Values [prompt, layer], one token each."""
    out = PerPrompt(*values.shape)
    for layer in range(values.shape[1]):
        out.add(layer, range(len(values)), torch.from_numpy(values[:, layer]))
    return out


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Depth use of a tiny model, maps onto itself included."""
    prompts = [*PROMPTS, *[tuple(range(3 + i, 19 + i)) for i in range(8)]]
    store = ActivationStore(tmp_path_factory.mktemp("store"))
    return DepthUse(**SMALL, target_model="self", ridge=0.0).run(native(), prompts, store=store)


CONTRACT = {
    "contributions": "layer part relative_norm cosine",
    "skip_effect": "variant skipped affected effect",
    "proxies": "layer delta_ce_block delta_ce_attn delta_ce_mlp jsd_block similarity_block lim zd lens_kl parallel_error_2 "
    "delta_ce_int8 delta_ce_int4 delta_ce_frozen_norm relative_norm_block cosine_block skip_effect_block",
    "agreement": "proxy_a proxy_b spearman ci_low ci_high",
    "effective_depth": "definition threshold layer ratio ci_low ci_high defined_share",
}


@pytest.mark.parametrize("table", CONTRACT)
def test_tables_have_the_columns_of_the_contract(table: str, result: Result) -> None:
    assert set(CONTRACT[table].split()) <= set(result.tables[table].columns)


def test_every_layer_has_every_proxy(result: Result) -> None:
    proxies = result.tables["proxies"]
    assert proxies["layer"].tolist() == [0, 1, 2]
    unknown = {name for name in proxies if proxies[name].isna().any()}
    assert unknown == {"parallel_error_2", "parallel_cosine_2", "delta_ce_parallel_2", "skip_effect_block"}
    assert (proxies["similarity_block"] - 1 - proxies["lim"]).abs().max() < 1e-5
    intervals = result.tables["proxy_intervals"].dropna()
    assert (intervals["ci_low"] <= intervals["mean"] + 1e-9).all()
    assert (intervals["mean"] <= intervals["ci_high"] + 1e-9).all()


def test_the_figures_draw_from_the_tables_alone(result: Result, tmp_path: object) -> None:
    loaded = Result.load(result.save(f"{tmp_path}/saved"))
    assert set(loaded.figures) == set(DepthUse.figures) - {
        "alignment",
        "bits_frontier",
        "alignment_points",
        "steps",
        "readouts",
        "masks",
        "kv_subspaces",
        "generation",
        "generation_answers",
    }
    for name in loaded.figures:
        assert loaded.figure(name).data


def test_a_model_predicts_its_own_streams_best_on_the_diagonal(result: Result) -> None:
    maps = result.tables["linear_maps"]
    diagonal = maps["source_layer"] == maps["target_layer"]
    assert maps.loc[diagonal, "error"].max() < 1e-6
    assert maps.loc[~diagonal, "error"].min() > 1e-2
    assert (maps["train_tokens"] > 32).all()
    # Fitted to the one part and scored on the other.
    assert maps.loc[~diagonal, "train_error"].mean() < 0.9 * maps.loc[~diagonal, "error"].mean()


@pytest.mark.parametrize("planted", [0, 1, 2])
def test_every_measure_points_at_the_one_block_that_matters(planted: int, store: ActivationStore) -> None:
    module = make("llama", seed=5)
    with torch.no_grad():
        for layer, block in enumerate(module.model.layers):
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight.mul_(4.0 if layer == planted else 0.0)
        # The model's own continuations, so that it is right until the block is taken away.
        tokens = torch.tensor([[5 + 3 * i, 9 + i] for i in range(6)])
        for _ in range(6):
            tokens = torch.cat([tokens, module(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    model = NativeModel(module, ref="planted", weights=f"planted-{planted}")
    analysis = DepthUse(**(SMALL | {"drop_blocks": 2, "greedy_steps": 4, "windows": (2,)}), skip_prompts=2)
    tables = analysis.run(model, tokens.tolist(), store=store).tables

    proxies, others = tables["proxies"].set_index("layer"), [layer for layer in range(3) if layer != planted]
    for name in ("delta_ce_block", "jsd_block", "relative_norm_block", "similarity_block", "jsd_mlp", "jsd_attn"):
        assert proxies[name].idxmax() == planted, name
        assert proxies.loc[others, name].abs().max() < 1e-5 < 1e-3 < proxies.loc[planted, name], name
    for name in ("delta_ce_int4", "delta_ce_frozen_norm"):
        assert proxies.loc[others, name].abs().max() < 1e-5 < proxies[name].abs()[planted], name
    read = proxies["lens_kl"]
    assert (read[read.index < planted] > 1e-3).all()
    assert (read[read.index >= planted] < 1e-5).all()

    for table in ("skip_effect", "output_effect"):
        effects = tables[table].query("part == 'block' and variant == 'current'").groupby("skipped")["mean"].max()
        assert effects.idxmax() == planted
        assert effects[others].max() < 1e-5 < 1e-2 < effects[planted]
    greedy = tables["greedy"]
    assert planted not in greedy["layer"].tolist()
    assert greedy["delta_ce"].abs().max() < 1e-5
    curves = tables["drop_curve"].set_index("order")
    for order in ("measured loss", "similarity (LLM-Drop)", "similarity, measured again"):
        assert curves.loc[order, "delta_ce"].abs().max() < 1e-5, order
        assert (curves.loc[order, "over_random"] < -1e-3).all(), order


def test_a_second_run_captures_nothing_and_finds_the_same(tiny: NativeModel, store: ActivationStore) -> None:
    first = DepthUse(**SMALL).run(tiny, PROMPTS, store=store)
    second = DepthUse(**SMALL).run(tiny, PROMPTS, store=store)
    assert first.provenance["counts"]["forwards"] > 0
    assert second.provenance["counts"]["forwards"] == 0
    for name, table in first.tables.items():
        assert table.equals(second.tables[name]), name


def test_no_forward_of_the_whole_model_but_the_capture(
    tiny: NativeModel, store: ActivationStore, count_forwards: Callable[[Model], list[int]]
) -> None:
    seen = count_forwards(tiny)
    DepthUse(**SMALL).run(tiny, PROMPTS, store=store)
    assert sum(seen) == len(PROMPTS)


def test_what_was_not_asked_for_is_not_there(tiny: NativeModel, store: ActivationStore) -> None:
    bare = DepthUse(
        skip_prompts=0, erasure_prompts=0, gradient_prompts=0, greedy_steps=0, drop_blocks=0, parts=("attn",)
    )
    tables = bare.run(tiny, PROMPTS, store=store).tables
    assert not {"erasure", "attribution", "greedy", "drop_curve", "linear_maps"} & set(tables)
    assert set(tables["skip_effect"]["variant"]) == {"current"}
    assert set(tables["skip_effect"]["part"]) == {"attn"}


def test_the_first_token_counts_only_when_asked(tiny: NativeModel, store: ActivationStore) -> None:
    counts = {
        flag: DepthUse(**BARE, first_token=flag).run(tiny, [(5, 6, 7), (8, 9)], store=store).tables["loss"]["tokens"][0]
        for flag in (False, True)
    }
    assert counts == {False: 1, True: 3}  # next tokens predicted at positions from 1, or from 0


def test_groups_have_depth_scores(tiny: NativeModel, store: ActivationStore) -> None:
    prompts = [
        Prompt(p, fields={"group": name}) for p, name in zip(PROMPTS, ("easy", "hard", "hard", "easy"), strict=True)
    ]
    scores = DepthUse(**SKIPS).run(tiny, prompts, store=store).tables["depth_score"]
    current = scores[(scores["variant"] == "current") & (scores["by"] == "mean") & (scores["part"] == "block")]
    # The last prompt is one token, which the released rule never leaves out.
    assert current.set_index("group")["prompts"].to_dict() == {"all": 3, "easy": 1, "hard": 2}
    assert current["score"].between(0, 2).all()


def test_groups_are_aligned_with_themselves(tiny: NativeModel, store: ActivationStore) -> None:
    one, other = (
        [(5, 6, 7, 8), (9, 10, 11), (12, 13), (14, 15, 16)],
        [(60, 61, 62), (70, 71, 72), (73, 74), (75, 76, 77)],
    )
    activations = capture(tiny, [*one, *one, *other], [Need("resid_post.*")], store)
    names = [*"aaaabbbbcccc"]
    table = alignment_table(activations, names, True, seed=0)
    twins = table[(table["group_a"] == "a") & (table["group_b"] == "b")]
    others = table[(table["group_a"] == "a") & (table["group_b"] == "c")]
    assert twins["mean_cosine"].to_numpy() == pytest.approx(1)
    assert twins["best_cosine"].to_numpy() == pytest.approx(1)
    assert others["mean_cosine"].max() < 0.9
    rows = [
        torch.cat([h for h, g in zip(activations.get("resid_post.1"), names, strict=True) if g == name])
        for name in "ac"
    ]
    plain = others[(others["layer"] == 1) & ~others["centred"]].iloc[0]
    cosine = torch.nn.functional.cosine_similarity
    assert plain["mean_cosine"] == pytest.approx(float(cosine(rows[0].mean(0), rows[1].mean(0), dim=0)), rel=1e-5)
    pairs = cosine(rows[0][:, None], rows[1][None], dim=-1)
    assert plain["pair_cosine"] == pytest.approx(float(pairs.mean()), abs=1e-5)
    assert plain["best_cosine"] == pytest.approx(float(pairs.amax(1).mean()), abs=1e-5)
    assert plain["mean_cosine_low"] <= plain["mean_cosine_high"]
    two = alignment_table(activations, [*"aaaa", *[""] * 4, *"cccc"], True, seed=0)
    assert two.loc[two["centred"], "mean_cosine"].isna().all()  # opposite by construction
    assert two.loc[~two["centred"], "mean_cosine"].notna().all()
    assert DepthUse.figures["alignment"].draw({"alignment": table}).data
    assert alignment_table(activations, ["a"] * 12, True, seed=0).empty
    few = alignment_table(activations, [*"aa", *[""] * 6, *"cc", "", ""], True, seed=0)
    assert few[["pair_cosine_low", "pair_cosine_high"]].isna().all(axis=None), "six ways of dealing four prompts"
    assert few["pair_cosine"].notna().all()


def test_labels_give_a_probe_column(tiny: NativeModel, store: ActivationStore) -> None:
    prompts = [Prompt((5, 6, 7 + i, 80 + i % 2), fields={"label": i % 2}) for i in range(24)]
    proxies = DepthUse(**BARE).run(tiny, prompts, store=store).tables["proxies"]
    assert proxies["probe_accuracy"].min() > 0.9  # the last token is the label
    with pytest.raises(ProbeError):
        DepthUse(**BARE).run(tiny, [Prompt(p.tokens, fields={"label": 1}) for p in prompts], store=store)
    assert DepthUse.prompt_fields["label"](2) is not None
    assert DepthUse.prompt_fields["label"](True) is not None
    assert DepthUse.prompt_fields["label"](0) is None


def test_tables_and_figures_say_which_skip_rule_it_is(
    result: Result, tiny: NativeModel, store: ActivationStore
) -> None:
    other = DepthUse(**SKIPS, skip_rule="everywhere").run(tiny, [*PROMPTS, (5, 6, 7)], store=store)
    for rule, words, one in (("released", "all tokens but the first", result), ("everywhere", "all tokens", other)):
        for name in ("skip_effect", "output_effect", "depth_score"):
            assert set(one.tables[name]["rule"]) == {rule}
        labels = [button.label for button in one.figure("skip_maps").layout.updatemenus[0].buttons]
        assert labels
        assert all(label.endswith(f"at {words}") for label in labels)
        assert all(trace.name.endswith(f"at {words}") for trace in one.figure("output_effect").data if trace.name)
        assert words in one.figure("depth_score").layout.xaxis.title.text


def test_removal_losses_do_not_follow_the_skip_rule(result: Result, tiny: NativeModel, store: ActivationStore) -> None:
    prompts = [(5, 6, 7), *PROMPTS[:3]]
    both = [
        DepthUse(**SKIPS, skip_rule=rule).run(tiny, prompts, store=store).tables for rule in ("released", "everywhere")
    ]
    losses = [tables["proxies"][["delta_ce_block", "jsd_mlp"]] for tables in both]
    pd.testing.assert_frame_equal(*losses)
    skips = [tables["skip_effect"]["mean"] for tables in both]
    assert (skips[0] - skips[1]).abs().max() > 1e-3


def test_refusals(tiny: NativeModel, store: ActivationStore) -> None:
    with pytest.raises(PointError, match="reads both ways"):
        DepthUse().run(native("bert"), PROMPTS, store=store)
    with pytest.raises(PromptError, match="no prompt has a second token"):
        DepthUse().run(tiny, [(5,), (6,)], store=store)
    with pytest.raises(OptionError, match=r"parts.*'blok'.*block"):
        DepthUse(parts=("blok",))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="option bits is 1"):
        DepthUse(bits=(1,))
    checks = DepthUse.prompt_fields
    assert checks["answer_from"](0) is not None
    assert checks["answer_from"](True) is not None
    assert checks["answer_from"](3) is None
    assert checks["group"](["a"]) is not None


def test_agreement_of_known_orders() -> None:
    rng = np.random.default_rng(0)
    base = np.arange(8.0)
    noise = rng.normal(size=(20, 8))
    noise -= noise.mean(0)
    up = column(base + 0.01 * noise)
    fixed = {
        "cube": base**3,
        "down": -base,
        "ties": np.array([0, 0, 1, 1, 2, 2, 3, 3.0]),
        "gap": np.where(base < 2, np.nan, base),
    }
    table = agreement_table({"up": up}, fixed, seed=0).set_index(["proxy_a", "proxy_b"])
    assert table.loc[("up", "cube"), ["spearman", "ci_low", "ci_high"]].tolist() == [1, 1, 1]
    assert table.loc[("up", "down"), "spearman"] == -1
    assert table.loc[("up", "ties"), "spearman"] == pytest.approx(0.9759, abs=1e-4)  # sqrt(40/42)
    assert table.loc[("up", "gap"), "n"] == 6
    assert table.loc[("up", "cube"), "p_value"] < 0.01
    noisy = column(base + 40 * rng.normal(size=(20, 8)))
    wide = agreement_table({"noisy": noisy}, fixed, seed=0).set_index(["proxy_a", "proxy_b"]).loc[("noisy", "cube")]
    assert wide["ci_high"] - wide["ci_low"] > 0.3
    assert wide["ci_low"] <= wide["spearman"] <= wide["ci_high"]


def test_the_null_band_is_that_of_random_orders() -> None:
    null = null_correlations(30, seed=0)
    assert np.quantile(np.abs(null), 0.95) == pytest.approx(1.96 / 29**0.5, abs=0.015)


def test_too_few_layers_have_no_correlation() -> None:
    fixed = {"a": np.array([1.0, np.nan, 2.0]), "b": np.array([1.0, 2.0, 3.0])}
    table = agreement_table({}, fixed, seed=0).set_index(["proxy_a", "proxy_b"])
    assert np.isnan(table.loc[("a", "b"), "spearman"])


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_chance_has_a_band_where_perfect_orders_are_rare(n: int) -> None:
    """Of n! orders of n layers two are perfect: from four on more than one in twenty is, so no band holds 95 %."""
    fixed = {"a": np.arange(n * 1.0), "b": np.arange(n * 1.0) ** 2}
    band = agreement_table({}, fixed, seed=0)["null_95"]
    assert band.isna().all() == (2 / factorial(n) > 0.05)
    assert not (band >= 1).any() or n == 5


def test_each_proxy_has_its_own_band_of_chance() -> None:
    """One column known for few layers once widened the band of all to the whole axis."""
    rows = [
        ("lim", "delta_ce_block", 0.4, np.nan, np.nan, 0.1, 0.36, 30),
        ("probe_accuracy", "delta_ce_block", 1.0, np.nan, np.nan, 0.3, np.nan, 3),
        ("layer_index", "delta_ce_block", -0.2, np.nan, np.nan, 0.3, 0.36, 30),
    ]
    names = ["proxy_a", "proxy_b", "spearman", "ci_low", "ci_high", "p_value", "null_95", "n"]
    figure = DepthUse.figures["foretelling"].draw({"agreement": pd.DataFrame(rows, columns=names)})
    (band,) = [trace for trace in figure.data if trace.type == "bar"]
    assert dict(zip(band.y, band.x, strict=True)) == {"LIM": 0.72, "depth alone (control)": 0.72}
    assert not figure.layout.shapes


def test_what_no_prompt_enters_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    tables = proxy_tables({"up": column(rng.normal(size=(8, 5)))}, {"zd": np.arange(5.0)}, seed=0)
    intervals = tables["proxy_intervals"].set_index("proxy")
    assert intervals.loc["zd", ["ci_low", "ci_high"]].isna().all(axis=None)
    assert intervals.loc["up", ["ci_low", "ci_high"]].notna().all(axis=None)


def test_means_weigh_tokens_and_leave_out_nan() -> None:
    values = PerPrompt(2, 1)
    values.add(0, [0, 0, 1, 1], torch.tensor([1.0, 2.0, 6.0, torch.nan]))
    assert values.mean().tolist() == [3]
    draws = resampled(values, seed=0)
    assert set(np.round(draws[:, 0], 6)) == {1.5, 3.0, 6.0}
    mean, low, high = interval(values, seed=0)
    assert mean.tolist() == [3.0]
    assert np.isnan([low, high]).all(), "two prompts support no interval"
    values = PerPrompt(6, 2)
    values.add(0, range(6), torch.arange(6.0))
    values.add(1, range(5), torch.arange(5.0))
    mean, low, high = interval(values, seed=0)
    assert 0 <= low[0] < 2.5 < high[0] <= 5
    assert np.isnan([low[1], high[1]]).all(), "a column of five prompts has none either"


def test_quantiles_are_numpys() -> None:
    draws = np.random.default_rng(0).normal(size=(101, 3))
    draws[:40, 1] = np.nan
    draws[:, 2] = np.nan
    low, high = quantiles(draws)
    expected = np.nanquantile(draws[:, :2], [0.025, 0.975], axis=0)
    assert np.allclose([low[:2], high[:2]], expected)
    assert np.isnan(low[2])


def test_orders_start_with_the_least_important() -> None:
    values = {"delta_ce_block": np.array([3.0, 1.0, 2.0]), "similarity_block": np.array([0.1, 0.2, 0.05])}
    tables = proxy_tables(
        {name: column(v[None]) for name, v in values.items()}, {"zd": np.array([0.1, 0.3, 0.2])}, seed=0
    )
    by_proxy = orders(tables["proxies"], seed=0)
    assert by_proxy["measured loss"] == [[1, 2, 0]]
    assert by_proxy["similarity (LLM-Drop)"] == [[2, 0, 1]]
    assert by_proxy["weights (ZD)"] == [[1, 2, 0]]
    assert by_proxy["deepest first"] == [[2, 1, 0]]
    assert sorted(by_proxy["random"][0]) == [0, 1, 2]


def test_the_target_model_is_loaded_as_the_source_is(llama_folder: Path, store: ActivationStore) -> None:
    model = load_model(str(llama_folder), dtype="bfloat16", attention="eager")
    result = DepthUse(**BARE, target_model=str(llama_folder)).run(model, PROMPTS, store=store)
    same = result.tables["linear_maps"].query("source_layer == target_layer")
    assert set(store.ls()["dtype"]) == {"bfloat16"}
    assert set(store.ls()["attention"]) == {"eager"}
    assert len(same) == 3


def test_similarity_measured_again_is_of_the_stream_that_is_left(tiny: NativeModel, store: ActivationStore) -> None:
    """A block that hardly turns the plain stream, and one that does so only once the first is gone."""
    prompts = [(5, 6, 7, 8), (11, 12, 13, 14, 15, 16, 17), (9, 3, 20)]
    table = DepthUse(**BARE | {"drop_blocks": 2}).run(tiny, prompts, store=store).tables
    again = table["drop_curve"].query("order == 'similarity, measured again'").set_index("removed")["delta_ce"]
    plain = table["drop_curve"].query("order == 'similarity (LLM-Drop)'").set_index("removed")["delta_ce"]
    assert again[1] == pytest.approx(plain[1], abs=1e-6)
    first = int(table["proxies"].set_index("layer")["similarity_block"].idxmin())
    tokens = [torch.tensor([list(p)]) for p in prompts]
    turns = dict.fromkeys(sorted({0, 1, 2} - {first}), 0.0)
    for row in tokens:
        for layer in turns:
            addresses = [Address("resid_pre", layer), Address("resid_post", layer)]
            before, after = read(tiny, row, addresses, [skip(3, first)]).values()
            turns[layer] += float((1 - torch.cosine_similarity(before[0, 1:], after[0, 1:], dim=-1)).sum())
    second = min(turns, key=lambda layer: turns[layer])
    lost, counted = 0.0, 0
    for row in tokens:
        changed, clean = (logits(tiny, row, edits).log_softmax(-1) for edits in ([skip(3, first, second)], []))
        own = row[0, 1:, None]
        lost += float((clean - changed)[0, :-1].gather(-1, own)[1:].sum())
        counted += len(own) - 1
    assert again[2] == pytest.approx(lost / counted, abs=1e-5)
