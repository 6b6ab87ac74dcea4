"""Concept depth: its statistics by hand, and the analysis end to end on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, make, shared
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from tiny import native

from analyses.cli import main
from analyses.concept_depth import ConceptDepth
from analyses.concept_depth.depth_of_curve import depth_statistics
from analyses.concept_depth.labelled_prompts import FIELDS, labelled_sets, noisy
from analyses.concept_depth.token_types import token_types
from analyses.results.result import Result
from probes.errors import OptionError, ProbeError, PromptError
from probes.models import weights_digest
from probes.models.backends.native import NativeModel
from probes.models.protocol import Model
from probes.models.rounded_weights import fake_quantised, rounded
from probes.points import Address
from probes.prompts import Prompt, read_prompts
from probes.reducers import Reducer
from probes.store import ActivationStore

D = 24
LAYER = np.arange(D)


@pytest.mark.parametrize(
    ("curve", "jump", "stable", "depth_90"),
    [
        (np.where(LAYER < 11, 0.5, 0.95), 11 / D, 11 / D, 11 / D),
        (np.full(D, 0.8), np.nan, 1 / D, 0.0),
        (0.5 + 0.45 / (1 + np.exp(-(LAYER - 12) * 0.35)), np.nan, 16 / D, 18 / D),
        (np.where(LAYER % 2, 0.9, 0.6), 1 / D, 23 / D, 1 / D),
    ],
)
def test_depth_statistics_by_hand(curve: Any, jump: float, stable: float, depth_90: float) -> None:
    statistics = {name: values[0] for name, values in depth_statistics(curve, 0.5).items()}
    np.testing.assert_equal(statistics["jump"], jump)
    assert statistics["converging_stable"] == stable
    assert statistics["depth_90"] == depth_90
    assert statistics["area"] == pytest.approx((curve.mean() - 0.5) / 0.5)
    assert statistics["peak_layer"] == curve.argmax()


def test_the_literal_converging_point_is_the_last_layer_for_all_but_a_restless_curve() -> None:
    curves = [np.where(LAYER < 11, 0.5, 0.95), np.full(D, 0.8), 0.5 + 0.4 * LAYER / D]
    assert [depth_statistics(c, 0.5)["converging_literal"][0] for c in curves] == [23 / D] * 3
    assert np.isnan(depth_statistics(np.where(LAYER % 2, 0.9, 0.6), 0.5)["converging_literal"][0])
    assert depth_statistics(curves[0], 0.5)["converging_first"][0] == 1 / D


def test_statistics_of_many_curves_are_those_of_each() -> None:
    curves = np.random.default_rng(0).uniform(0.4, 1, size=(20, D))
    together = depth_statistics(curves, 0.5)
    for i, curve in enumerate(curves):
        for name, values in depth_statistics(curve, 0.5).items():
            np.testing.assert_equal(together[name][i], values[0])


class Words:
    """Stands in for a tokenizer: one word is one token, `t17` is token 17."""

    chat_template = None
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(VOCAB)}

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"t{i}" for i in ids)


@pytest.fixture(scope="module")
def model() -> NativeModel:
    module = shared("llama")
    return NativeModel(module, Words(), ref="tiny-llama", weights=weights_digest(module))


def prompts(n: int = 80, planted: bool = True) -> list[Prompt]:
    """Random prompts whose last token is 20 to 22, not 70 to 72, exactly where the label is 0 (or, not planted, regardless of it)."""
    rng = np.random.default_rng(0)
    drawn = []
    for i in range(n):
        label = i % 2
        side = label if planted else int(rng.integers(2))
        tokens = (*rng.integers(3, 8, size=2).tolist(), int(rng.integers(20, 23) + 50 * side))
        fields = {"label": label, "group": i // 2, "dataset": "planted", "answers": ["t20", "t70"]}
        drawn.append(Prompt(tokens, " ".join(f"t{t}" for t in tokens), fields))
    return drawn


@pytest.fixture(scope="module")
def result(model: NativeModel, tmp_path_factory: pytest.TempPathFactory) -> Result:
    store = ActivationStore(tmp_path_factory.mktemp("store"))
    hidden = [replace(p, fields={**p.fields, "dataset": "hidden"}) for p in prompts(planted=False)]
    analysis = ConceptDepth(
        probes=("logistic", "nearest_centroid"), variants=("plain", "int8", "int4"), causal_layers=2, jobs=1
    )
    return analysis.run(model, prompts() + hidden, store=store)


def test_tables_hold_the_contract_and_every_control(result: Result) -> None:
    scores, depths = result.tables["scores"], result.tables["depths"]
    assert {"dataset", "layer", "accuracy", "f1", "auc", "ci_low", "ci_high", "control_accuracy", "majority"} <= set(
        scores
    )
    assert {"jump", "converging_literal", "converging_first", "converging_stable", "depth_90", "area"} <= set(depths)
    assert len(scores) == 2 * 2 * 3 * 3
    assert scores["majority"].between(0.4, 0.6).all()
    assert (scores["ci_low"] <= scores["accuracy"]).all()
    assert (scores["accuracy"] <= scores["ci_high"]).all()
    known = scores["type_control_rows"] == 3 * scores["n_test"]
    assert known.any()
    difference = scores["accuracy"] - scores["type_control_accuracy"]
    np.testing.assert_allclose(scores["selectivity"][known], difference[known])


def test_a_planted_concept_is_found_and_a_hidden_one_is_called_not_decodable(result: Result) -> None:
    scores = result.tables["scores"].query("variant == 'plain' and probe == 'logistic'")
    assert scores.query("dataset == 'planted'")["accuracy"].min() > 0.75
    assert scores.query("dataset == 'hidden'")["accuracy"].between(0.3, 0.7).all()
    decodable = (
        result.tables["depths"].query("variant == 'plain' and probe == 'logistic'").set_index("dataset")["decodable"]
    )
    assert decodable["planted"]
    assert not decodable["hidden"]
    assert any("Not shown to be decodable" in note and "hidden" in note for note in result.notes)


def test_figures_draw_from_a_saved_result(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "out")
    loaded = Result.load(tmp_path / "out")
    assert set(loaded.figures) == {"overlay", "curves", "depths", "changes", "causal"}
    panel = loaded.figure("curves")
    assert {"shuffled labels", "majority class", "one random label per token type"} <= {
        trace.name for trace in panel.data
    }


def test_a_second_run_needs_no_forward_and_gives_the_same_numbers(model: NativeModel, store: ActivationStore) -> None:
    analysis = ConceptDepth(causal_layers=2, jobs=1)
    first, second = (analysis.run(model, prompts(), store=store) for _ in range(2))
    assert first.provenance["counts"]["forwards"] == len({p.tokens for p in prompts()})
    assert second.provenance["counts"]["forwards"] == second.provenance["counts"]["forwards_causal"] == 0
    for name, table in first.tables.items():
        assert table.equals(second.tables[name]), name


def test_released_preset_keeps_the_row_order_and_the_released_split(model: NativeModel, store: ActivationStore) -> None:
    from probes.capture.run import capture

    in_order = sorted(prompts(), key=lambda p: p.fields["label"])
    analysis = ConceptDepth(preset="released", representation="mlp_in", causal_layers=0, jobs=1)
    scores = analysis.run(model, in_order, store=store).tables["scores"]
    activations = capture(model, [p.tokens for p in in_order], analysis.needs(model), store)
    labels = [p.fields["label"] for p in in_order]
    for layer in range(3):
        rows = activations.packed(f"mlp_in.{layer}", Reducer(positions="last")).numpy()
        train, test, known, test_labels = train_test_split(rows, labels, test_size=0.4, random_state=42)
        assert scores["accuracy"][layer] == LogisticRegression().fit(train, known).score(test, test_labels)


@pytest.mark.parametrize(("pooling", "position"), [("mean", -1), ("position", -2), ("position", 0)])
def test_pooling_reads_the_row_it_names(
    model: NativeModel, store: ActivationStore, pooling: Any, position: int
) -> None:
    from analyses.concept_depth.probing import layer_rows
    from probes.capture.needs import Need
    from probes.capture.run import capture

    labelled = prompts(12)
    analysis = ConceptDepth(pooling=pooling, position=position)
    sequences = [p.tokens for p in labelled]
    activations = capture(model, sequences, [*analysis.needs(model), Need("resid_post.*")], store)
    whole = activations.get(Address("resid_post", 1))
    expected = [rows.mean(0) if pooling == "mean" else rows[position] for rows in whole]
    pooled = layer_rows(activations, labelled_sets(labelled)[0], "resid_post", analysis._reducer, 1)
    np.testing.assert_allclose(pooled, torch.stack(expected).numpy(), rtol=1e-5, atol=1e-6)


def test_causal_check_is_the_projection_by_hand(model: NativeModel, store: ActivationStore) -> None:
    from analyses.concept_depth.causal import Check, causal_table
    from analyses.concept_depth.probing import layer_rows, probe_set, recipe_of
    from probes.capture.run import capture
    from probes.progress import QUIET

    data, analysis = labelled_sets(prompts())[0], ConceptDepth()
    activations = capture(model, [p.tokens for p in data.prompts], analysis.needs(model), store)
    probed = probe_set(
        activations, data, "plain", recipe_of("sound", "logistic", 1, 0), "resid_post", analysis._reducer, 1, range(3)
    )
    rows = [layer_rows(activations, data, "resid_post", analysis._reducer, layer) for layer in range(3)]
    check = Check(model, store, probed, "resid_post", "last", 10, 3, 0)
    top = len(rows) - 1
    table = causal_table(check, rows.__getitem__, QUIET).table
    effects = table.query("layer == @top and direction == 'probe'").iloc[0]
    unit = torch.from_numpy(probed.layers[top].probes[0].direction).float()
    x = torch.from_numpy(rows[top][check.chosen])
    removed = x - (x @ unit)[:, None] * unit
    un = model.unembedding()
    logits = [(un.norm(part) @ un.weight.T).detach() for part in (x, removed)]
    sign = torch.tensor([1 - 2 * data.labels[i] for i in check.chosen])
    margins = [sign * (part[:, 20] - part[:, 70]) for part in logits]
    assert effects["margin"] == pytest.approx(float(margins[0].mean()), abs=1e-4)
    assert effects["margin_change"] == pytest.approx(float((margins[1] - margins[0]).mean()), abs=1e-4)
    assert effects["answer_accuracy"] == pytest.approx(float((margins[0] > 0).float().mean()))
    assert effects["answer_accuracy_edited"] == pytest.approx(float((margins[1] > 0).float().mean()))
    logs = [part.log_softmax(-1) for part in logits]
    assert effects["kl"] == pytest.approx(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()), abs=1e-4)
    everywhere = causal_table(replace(check, positions="all"), rows.__getitem__, QUIET).table
    same = np.isclose(everywhere["kl"], table["kl"], atol=1e-6)
    # At the top only the last row matters to the last prediction; at the bottom the others do as well.
    assert same.tolist() == (table["layer"] == top).tolist()
    tested = probed.layers[0].row.tolist()
    assert set(check.chosen) <= set(tested)
    assert sum(data.labels[i] for i in check.chosen) * 2 == len(check.chosen)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_fake_quantisation_rounds_each_channel_to_its_grid_and_leaves_the_model(family: str, bits: int) -> None:
    model = native(family)
    before = weights_digest(model.module)
    copy = fake_quantised(model, bits)
    assert weights_digest(model.module) == before != copy.context.weights
    linear, original = (
        copy.component("mlp.out" if family != "mixtral" else "attn.o", 0),
        model.component("mlp.out" if family != "mixtral" else "attn.o", 0),
    )
    axis = 0 if family == "gpt2" else 1
    new, old = linear.weight.detach(), original.weight.detach()
    scale = old.abs().amax(dim=axis, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((new - old).abs() <= scale / 2 + 1e-6).all()
    torch.testing.assert_close((new / scale), (new / scale).round(), atol=1e-3, rtol=0)
    assert (new != old).any()
    torch.testing.assert_close(copy.unembedding().weight, model.unembedding().weight, rtol=0, atol=0)


def test_rounding_is_idempotent_and_symmetric() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    once = rounded(weight, 4, 0)
    torch.testing.assert_close(rounded(once, 4, 0), once)
    torch.testing.assert_close(rounded(-weight, 4, 0), -once)
    assert all(len(row.unique()) <= 15 for row in once)


def test_rows_of_a_quantised_model_have_store_keys_of_their_own(model: NativeModel) -> None:
    digests = {
        weights_digest(make("llama")),
        fake_quantised(model, 8).context.weights,
        fake_quantised(model, 4).context.weights,
    }
    assert len(digests) == 3


def test_text_noise_is_glued_in_front_of_the_example_inside_its_template(real_words: Model) -> None:
    text = Prompt((1,), "Judge: t5 t6", {"label": 0, "template": "Judge: {text}"})
    bare = Prompt((1,), "t5 t6", {"label": 1})
    changed = noisy([text, bare] * 10, real_words, 0, False)
    assert {p.text for p in changed[::2]} == {"Judge: aaat5 t6", "Judge: bbbt5 t6"}
    assert {p.text for p in changed[1::2]} == {"aaat5 t6", "bbbt5 t6"}
    assert [p.fields["label"] for p in changed] == [0, 1] * 10
    with pytest.raises(PromptError, match="prompt 0 is given as token ids"):
        noisy([Prompt((5,), None, {"label": 0})], real_words, 0, False)


@pytest.fixture
def real_words(tiny: NativeModel) -> NativeModel:
    """A tiny model whose tokenizer takes any text: one token per character."""

    class Letters(Words):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    return NativeModel(tiny.module, Letters(), ref="tiny-letters", weights=tiny.context.weights)


def test_published_sets_are_read_from_the_folder_given(real_words: NativeModel, tmp_path: Path) -> None:
    (tmp_path / "cities.csv").write_text("statement,label,city\nA is in B.,1,A\nA is in C.,0,A\n")
    analysis = ConceptDepth(sets=("paper_cities",), data=str(tmp_path), template="{text}")
    collected = analysis.collect(real_words, [])
    assert [(p.text, p.fields["label"]) for p in collected] == [("A is in B.", 0), ("A is in C.", 1)]
    with pytest.raises(PromptError, match=r"data set 'paper_stsa': no file .*stsa\.binary\.train"):
        replace(analysis, sets=("paper_stsa",)).collect(real_words, [])


def test_named_sets_join_the_labelled_prompts_and_unlabelled_ones_are_left_out(real_words: NativeModel) -> None:
    analysis = ConceptDepth(sets=("sentiment",), limit=10, template="{text}")
    given = [Prompt((5,), "x", {}), Prompt((6,), "y", {"label": 0}), Prompt((7,), "z", {"label": 1})]
    with pytest.raises(PromptError, match="context window"):
        analysis.collect(real_words, given)
    short = replace(real_words.shape, n_ctx=512)
    real_words.shape = short
    collected = analysis.collect(real_words, given)
    assert [p.fields.get("dataset") for p in collected] == [None, None, *["sentiment"] * 10]


@pytest.mark.parametrize(
    ("make_analysis", "error", "message"),
    [
        (lambda: ConceptDepth(sets=("cities",)), OptionError, "unknown data set 'cities'"),
        (lambda: ConceptDepth(template="nothing"), OptionError, "does not hold {text}"),
        (lambda: ConceptDepth(variants=("int8",)), OptionError, "need plain beside them"),
        (lambda: ConceptDepth(preset="best"), OptionError, "unknown preset 'best'"),  # type: ignore[arg-type]
    ],
)
def test_bad_options_are_refused_by_name(make_analysis: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_analysis()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, i: {**p.fields, "label": 1}, ProbeError, "data set 'planted': all 80 prompts have label 1"),
        (
            lambda p, i: {k: v for k, v in p.fields.items() if k != "label" or i != 3},
            PromptError,
            "prompt 3: field 'label' is missing",
        ),
        (
            lambda p, i: {**p.fields, "label": 2 if i == 5 else p.fields["label"]},
            PromptError,
            "prompt 5: field 'label' is 2",
        ),
        (
            lambda p, i: {**p.fields, "group": "one"},
            ProbeError,
            r"data set 'planted': the rows with label 0 lie in 1 group",
        ),
        (
            lambda p, i: {**p.fields, "dataset": "few" if i < 4 else "planted"},
            ProbeError,
            r"data set 'few': label 0 has 2 row\(s\)",
        ),
    ],
)
def test_bad_data_is_refused_by_name(
    model: NativeModel, store: ActivationStore, change: Any, error: type[Exception], message: str
) -> None:
    bad = [replace(p, fields=change(p, i)) for i, p in enumerate(prompts())]
    with pytest.raises(error, match=message):
        ConceptDepth(causal_layers=0, jobs=1).run(model, bad, store=store)


def test_a_position_outside_a_prompt_is_refused(model: NativeModel) -> None:
    with pytest.raises(PromptError, match="so no position 5"):
        ConceptDepth(pooling="position", position=5).collect(model, prompts())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": "yes"}', "bad.jsonl:1: field 'label' is 'yes': legal labels are 0 and 1"),
        ('{"text": "a", "label": true}', "field 'label' is True"),
        ('{"text": "a", "label": 1, "answers": ["x"]}', r"field 'answers' is \['x'\]: must be two texts"),
        ('{"text": "a", "label": 1, "template": "x"}', "field 'template' is 'x': must be a text that holds"),
        ('{"text": "a", "label": 1, "group": [1]}', r"field 'group' is \[1\]: must be a text or an int"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(PromptError, match=message.replace("(", r"\(")):
        read_prompts(tmp_path / "bad.jsonl", FIELDS)


def test_prompts_with_the_same_tokens_are_one_group_unless_told_otherwise() -> None:
    twice = [Prompt((5, 6), "x", {"label": 0}), Prompt((5, 6), "x", {"label": 1}), Prompt((7,), "y", {"label": 1})]
    groups = labelled_sets(twice)[0].groups
    assert groups[0] == groups[1] != groups[2]


@pytest.mark.real
def test_the_default_model_knows_which_city_statements_are_true(real: Model, store: ActivationStore) -> None:
    analysis = ConceptDepth(sets=("city_country",), limit=120, template="{text}", causal_layers=0, splits=2, jobs=1)
    result = analysis.run(real, [], store=store)
    scores = result.tables["scores"]
    assert scores["accuracy"].max() > 0.7
    assert scores["accuracy"][:6].mean() < 0.6
    assert 0.1 < result.tables["depths"]["depth_90"][0] < 0.8


def test_command_line_runs_labelled_token_prompts_and_asks_for_data_where_there_is_none(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "labelled.jsonl"
    lines = [{"tokens": list(p.tokens), "label": p.fields["label"], "group": p.fields["group"]} for p in prompts(40)]
    file.write_text("\n".join(map(json.dumps, lines)))
    base = ["run", "concept_depth", "--model", str(llama_folder), "--store", str(tmp_path / "store")]
    options = ["--causal-layers", "1", "--causal-prompts", "4", "--out", str(tmp_path / "out")]
    assert main([*base, "--prompts", str(file), "--dry-run"]) == 0
    assert "forwards" in capsys.readouterr().out
    assert main([*base, "--prompts", str(file), *options]) == 0
    table = Result.load(tmp_path / "out").tables["causal"]
    # Ids have no answers, so the effect is told by the divergence alone.
    assert table["margin_change"].isna().all()
    assert (table["kl"] >= 0).all()
    assert main([*base, *options]) == 2
    assert "give --prompts FILE.jsonl or --sets NAME" in capsys.readouterr().err
    assert main([*base, "--sets", "coinflip", *options]) == 2
    assert "Did you mean 'coin_flip'" in capsys.readouterr().err


def test_the_control_tasks_type_is_the_token_that_recurs_most_between_groups() -> None:
    template = (1, 2)
    rows = [(1, 10 + i % 6, 30 + i, 7) for i in range(24)]
    groups = [i // 2 for i in range(24)]
    recurring = token_types(rows, groups)
    assert recurring is not None
    assert (recurring.position, recurring.n) == (-3, 6)
    assert recurring.of.tolist() == [row[-3] for row in rows]
    assert token_types([(*template, 30 + i) for i in range(24)], groups) is None
    assert token_types([(*template, 10 + i % 2) for i in range(24)], groups) is None
    # A token that occurs twice in one group only does not recur.
    assert token_types([(*template, 10 + i // 2) for i in range(24)], groups) is None
    longer = [(1, 10 + i % 6, *([40] * (i % 3)), 30 + i, 7) for i in range(24)]
    ragged = token_types(longer, groups)
    assert ragged is not None
    assert ragged.position == 1


def test_without_a_recurring_token_selectivity_is_left_open(model: NativeModel, store: ActivationStore) -> None:
    alone = [replace(p, tokens=(3, 4 + i % 3, 10 + i)) for i, p in enumerate(prompts())]
    result = ConceptDepth(causal_layers=0, splits=1, jobs=1).run(model, alone, store=store)
    assert result.tables["scores"]["selectivity"].isna().all()
    assert any("no control task" in note for note in result.notes)
    assert "one random label per token type" not in {trace.name for trace in result.figure("curves").data}


def test_only_the_layers_chosen_are_probed_and_keep_their_depth(model: NativeModel, store: ActivationStore) -> None:
    whole = ConceptDepth(causal_layers=1, splits=1, jobs=1).run(model, prompts(), store=store)
    for options, layers in (({"layers": (2, 0)}, [0, 2]), ({"stride": 2}, [0, 2]), ({"layers": (1,)}, [1])):
        part = ConceptDepth(causal_layers=1, splits=1, jobs=1, **options).run(model, prompts(), store=store)
        scores, all_scores = part.tables["scores"], whole.tables["scores"]
        assert scores["layer"].tolist() == layers
        rows = all_scores[all_scores["layer"].isin(layers)].reset_index(drop=True)
        assert scores.equals(rows)
        assert set(part.tables["causal"]["layer"]) <= set(layers)
        assert part.tables["depths"]["peak_layer"].isin(layers).all()
    with pytest.raises(OptionError, match="layer 3 does not exist: legal are 0 to 2"):
        ConceptDepth(layers=(3,)).run(model, prompts(), store=store)


def test_statistics_of_a_strided_curve_are_told_in_the_models_depth() -> None:
    curve = np.where(LAYER < 11, 0.5, 0.95)
    statistics = {k: v[0] for k, v in depth_statistics(curve[::4], 0.5, list(LAYER[::4]), D).items()}
    assert (statistics["jump"], statistics["depth_90"], statistics["peak_layer"]) == (12 / D, 12 / D, 12)
    assert statistics["converging_stable"] == 12 / D


def test_few_test_groups_give_no_interval_and_no_verdict(model: NativeModel, store: ActivationStore) -> None:
    few = [replace(p, fields={**p.fields, "group": i % 10}) for i, p in enumerate(prompts())]
    result = ConceptDepth(causal_layers=0, splits=1, jobs=1).run(model, few, store=store)
    depths = result.tables["depths"].iloc[0]
    assert np.isnan(depths["peak_accuracy_low"])
    assert not depths["decodable"]
    assert any("Too few test groups" in note for note in result.notes)
    assert not any("Not shown" in note for note in result.notes)
