"""The latent-language analysis: identities of the lens and of the two kinds of sets, planted curves, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_tokenizer import FakeTokenizer
from families import make
from tiny import PROMPTS, native

from analyses.latent_language import LatentLanguage
from analyses.latent_language import tables as tabled
from analyses.latent_language.ids import prefix_free
from analyses.latent_language.items import Item
from analyses.latent_language.measures import area, crossover, norm_gain, token_energy
from analyses.latent_language.read import Reader, Reading
from analyses.latent_language.verdicts import verdicts
from analyses.results.result import Result
from analyses.results.statistics import Ci, row_interval
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import OptionError, PromptError
from probes.lenses import logit
from probes.models import Model, fetch_model, load_model
from probes.models.backends.native import NativeModel
from probes.progress import QUIET
from probes.prompts import PromptLine
from probes.store import ActivationStore

SUMS = {"en": [11, 12, 40], "fr": [60, 61]}


def lines(*targets: dict[str, list[Any]], prompts: list[tuple[int, ...]] = PROMPTS) -> list[PromptLine]:
    return [
        PromptLine(f"line {i}", None, p, {"targets": t}) for i, (p, t) in enumerate(zip(prompts, targets, strict=False))
    ]


@pytest.fixture(scope="module")
def speaking() -> NativeModel:
    """A tiny random model with a tokenizer that can write every text."""
    tokenizer = FakeTokenizer()
    module = make("llama", vocab_size=len(tokenizer.pieces), max_position_embeddings=1024)
    return NativeModel(module, tokenizer, ref="speaking", weights="speaking")


def test_given_ids_are_summed_as_they_are(tiny: NativeModel, store: ActivationStore) -> None:
    result = LatentLanguage().run(tiny, lines(*[SUMS] * 4), store=store)
    logits = capture(tiny, PROMPTS, [Need("logits")], store)
    last = torch.stack([rows[-1] for rows in logits.get("logits")]).double().softmax(-1)
    table = result.tables["probability"].query("layer == 2")
    for language, ids in SUMS.items():
        summed = table[table["language"] == language]["probability"].to_numpy()
        np.testing.assert_allclose(summed, last[:, ids].sum(-1), atol=1e-6)
    middle = capture(tiny, PROMPTS, [Need("resid_post.1")], store).get("resid_post.1")
    read = logit.read(torch.stack([r[-1] for r in middle]), tiny.unembedding(), ids=torch.tensor(SUMS["en"]))
    middle_curve = result.tables["probability"].query("layer == 1 and language == 'en'")["probability"]
    np.testing.assert_allclose(middle_curve, read.logprobs.exp().sum(-1), atol=1e-6)


def test_disjoint_sets_that_cover_the_vocabulary_sum_to_one(tiny: NativeModel, store: ActivationStore) -> None:
    d_vocab = tiny.shape.d_vocab
    targets = {"en": list(range(30)), "fr": list(range(30, 50)), "zh": list(range(50, d_vocab))}
    table = LatentLanguage().run(tiny, lines(targets), store=store).tables["probability"]
    total = table.groupby("layer")["probability"].sum()
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (table[table["language"] != "zh"].groupby("layer")["probability"].sum() < 1).all()


def test_a_zero_latent_spreads_over_the_whole_vocabulary(tiny: NativeModel) -> None:
    read = logit.read(torch.zeros(2, tiny.shape.d_model), tiny.unembedding())
    np.testing.assert_allclose(read.entropy_bits, math.log2(tiny.shape.d_vocab), atol=1e-5)


def test_the_whole_words_probability_is_the_models_own(tiny: NativeModel, store: ActivationStore) -> None:
    words = ((5, 9, 30), (5, 9, 31), (5, 10), (7,), (8, 8, 8, 8))
    item = Item(0, "x", "p", PROMPTS[2], "", "fr", {"fr": prefix_free(words)}, controls={"fr": ((20, 21),)})
    reading = Reader(tiny, store, QUIET).read([item])
    expected = 0.0
    for word in words:
        with torch.no_grad():
            logits = tiny.module(torch.tensor([[*item.tokens, *word]])).logits[0].double().log_softmax(-1)
        start = len(item.tokens) - 1
        expected += float(sum(logits[start + i, token] for i, token in enumerate(word)).exp())  # type: ignore[union-attr]
    assert reading.own[0][-1, 0] == pytest.approx(expected, rel=1e-4)
    assert reading.own[0].shape == (3, 1)


def test_a_word_of_one_token_has_one_probability_under_every_rule(
    speaking: NativeModel, store: ActivationStore
) -> None:
    prompt = [PromptLine("line 1", 'say: "', None, {"targets": {"en": ["h"], "fr": ["ca"]}})]
    tables = [
        LatentLanguage(set_rule=rule, spaces=False, byte_tokens=True, on_collision="keep", answers="first_token")
        .run(speaking, prompt, store=store)
        .tables["probability"]
        for rule in ("first_token", "multi_token")
    ]
    np.testing.assert_allclose(tables[0]["probability"], tables[1]["probability"], rtol=1e-6)
    bare = NativeModel(speaking.module, FakeTokenizer(), ref="x", weights="speaking")
    bare.tokenizer.get_vocab = lambda: {
        k: v for k, v in FakeTokenizer().ids.items() if not k.startswith("<0x") and k != "c"
    }
    prefix = LatentLanguage(set_rule="prefix", spaces=False, on_collision="keep", answers="first_token").run(
        bare, prompt, store=store
    )
    np.testing.assert_allclose(prefix.tables["probability"]["probability"], tables[0]["probability"], rtol=1e-6)


@pytest.mark.parametrize("crossed", [1, 3, 5])
def test_a_planted_crossover_is_found_at_its_layer(crossed: int, store: ActivationStore) -> None:
    module = make("llama", num_hidden_layers=6)
    model = NativeModel(module, ref="six", weights=f"six {crossed}")
    weight = model.unembedding().weight.detach()
    gain, _ = norm_gain(model.unembedding())
    unit = torch.nn.functional.normalize(weight / gain, dim=-1)

    def plant(rows: torch.Tensor, layer: int) -> torch.Tensor:
        return unit[11 if layer < crossed else 60].expand(len(rows), -1) * 4

    items = [
        Item(i, str(i), "p", p, "", "fr", {"fr": ((60,),), "en": ((11,),)}, controls={"fr": ((1,),), "en": ((2,),)})
        for i, p in enumerate([*PROMPTS, *PROMPTS])
    ]
    reading = Reader(model, store, QUIET, translate=plant).read(items)
    curves = tabled.curve(reading, np.ones(8, dtype=bool), model, "bootstrap", 0)
    leads = tabled.lead(reading, "bootstrap", 0)
    [row] = tabled.summary(curves, leads, {"p": (8, 8)}).to_dict("records")
    assert row["crossover"] == crossed
    assert row["leads_at"] == tabled.spans(range(crossed))
    assert leads["dominance"].tolist() == [1.0] * crossed + [0.0] * (6 - crossed)


def test_crossover_and_area_by_hand() -> None:
    def curve(*values: float) -> np.ndarray:
        return np.array(values)

    assert crossover(curve(0, 1, 0, 1, 1), curve(0.5, 0.5, 0.5, 0.5, 0.5)) == 3
    assert crossover(curve(1, 1), curve(0, 0)) == 0
    assert crossover(curve(1, 0), curve(0, 0)) is None
    assert area(curve(0, 1, 0)) == pytest.approx(0.5)
    assert tabled.spans([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_token_energy_is_the_naive_one_and_stays_in_its_bounds(family: str) -> None:
    unembedding = native(family).unembedding()
    energy = token_energy(unembedding)
    gain, centred = norm_gain(unembedding)
    assert centred == (family == "gpt2")
    rows = torch.nn.functional.normalize((unembedding.weight.detach().float() * gain).double(), dim=-1)
    among = (rows @ rows.T).square().mean().sqrt()
    assert energy.scale == pytest.approx(float(among), rel=1e-5)
    d_model = rows.shape[1]
    assert energy.scale >= d_model**-0.5
    latents = torch.randn(4000, d_model, generator=torch.Generator().manual_seed(0))
    seen = latents - latents.mean(-1, keepdim=True) if centred else latents
    cosine = torch.nn.functional.normalize(seen.double(), dim=-1) @ rows.T
    energies = energy.of(latents)
    np.testing.assert_allclose(energies, cosine.square().mean(-1).sqrt() / among, rtol=1e-5)
    low, high = energy.bounds()
    assert (energies >= low - 1e-9).all()
    assert (energies <= high + 1e-9).all()
    if not centred:
        assert float(energies.square().mean().sqrt()) == pytest.approx(energy.isotropic, rel=0.03)
    vectors = torch.linalg.eigh(energy.gram).eigenvectors
    if not centred:
        assert float(energy.of(vectors[:, -1])) == pytest.approx(high, rel=1e-6)


def test_the_norms_gain_is_read_off_the_norm() -> None:
    model = native("llama")
    gain, centred = norm_gain(model.unembedding())
    np.testing.assert_allclose(gain, model.component("ln_final").weight.detach(), rtol=1e-4)
    assert not centred


def test_renaming_the_tokens_changes_nothing(store: ActivationStore) -> None:
    module = copy.deepcopy(make("llama"))
    order = torch.randperm(module.config.vocab_size, generator=torch.Generator().manual_seed(1))
    before = LatentLanguage().run(NativeModel(module, ref="a", weights="a"), lines(*[SUMS] * 4), store=store)
    renamed = copy.deepcopy(module)
    with torch.no_grad():
        for name in ("model.embed_tokens", "lm_head"):
            old, new = module.get_submodule(name).weight, renamed.get_submodule(name).weight
            new[order] = old  # type: ignore[index]
    prompts = [tuple(int(order[t]) for t in p) for p in PROMPTS]
    targets = {language: [int(order[t]) for t in ids] for language, ids in SUMS.items()}
    after = LatentLanguage().run(
        NativeModel(renamed, ref="b", weights="b"), lines(*[targets] * 4, prompts=prompts), store=store
    )
    for name, column in (("probability", "probability"), ("geometry", "entropy_bits"), ("geometry", "token_energy")):
        np.testing.assert_allclose(before.tables[name][column], after.tables[name][column], atol=1e-5)


def test_tables_keep_their_contract_and_controls_their_size(
    tiny: NativeModel, store: ActivationStore, tmp_path: Path
) -> None:
    targets = [{"en": [i, i + 30], "fr": [i + 60]} for i in range(3, 11)]
    questions = lines(*targets, prompts=[(5, 6, i) for i in range(8)])
    result = LatentLanguage(target=("fr",)).run(tiny, questions, store=store)
    tables = result.tables
    assert tables["probability"].columns[:4].tolist() == ["prompt", "layer", "language", "probability"]
    assert tables["geometry"].columns[:4].tolist() == ["prompt", "layer", "entropy_bits", "token_energy"]
    assert {"layer", "language", "mean", "ci_low", "ci_high", "n"} <= set(tables["curve"].columns)
    assert {"item", "reason"} <= set(tables["dropped"].columns)
    assert len(tables["probability"]) == 8 * 3 * 2
    assert not tables["curve"].duplicated(["layer", "language"]).any()
    curve, rows = tables["curve"], tables["probability"]
    for language in ("en", "fr"):
        mean = rows[rows["language"] == language].groupby("layer")["probability"].mean()
        np.testing.assert_allclose(curve[curve["language"] == language]["mean"], mean, rtol=1e-6)
    assert (curve["ci_low"] <= curve["mean"]).all()
    assert (curve["mean"] <= curve["ci_high"]).all()
    result.save(tmp_path / "run")
    again = Result.load(tmp_path / "run")
    assert set(again.figures) >= {"probability", "lead", "heatmap", "energy"}
    for name in again.figures:
        assert again.figure(name).data
    assert "shuffled" in json.dumps(json.loads((tmp_path / "run" / "figures" / "probability.json").read_text()))


def test_a_second_run_does_no_forward(tiny: NativeModel, store: ActivationStore, count_forwards: Any) -> None:
    questions = lines(*[SUMS] * 4)
    LatentLanguage().run(tiny, questions, store=store)
    seen = count_forwards(tiny)
    result = LatentLanguage(ci="gauss95").run(tiny, questions, store=store)
    assert (seen, result.provenance["counts"]["forwards"]) == ([], 0)
    assert result.provenance["store_keys"]


def test_a_task_is_made_from_the_word_list(speaking: NativeModel, store: ActivationStore) -> None:
    analysis = LatentLanguage(
        source=("en", "de"), target=("it",), latents=("en", "it"), set_rule="first_token", n_prompts=6, n_shot=1,
        on_collision="subtract", answers="first_token",
    )  # fmt: skip
    result = analysis.run(speaking, store=store)
    answers, dropped = result.tables["answers"], result.tables["dropped"]
    assert set(answers["pair"]) | set(dropped["pair"]) == {"en→it", "de→it"}
    assert len(answers) + len(dropped) == 12
    assert set(result.tables["probability"]["language"]) == {"it", "en"}
    assert answers["prompt"].tolist() == list(range(len(answers)))
    assert any("cannot do" in note for note in result.notes)


def test_collisions_are_listed_with_their_reason(speaking: NativeModel, store: ActivationStore) -> None:
    prompt = [
        PromptLine("line 1", "a", None, {"targets": {"en": ["dog"], "de": ["dog"]}}),
        PromptLine("line 2", "b", None, {"targets": {"en": ["dog"], "de": ["Hund"]}}),
        PromptLine("line 3", "c", None, {}),
    ]
    dropped = LatentLanguage(set_rule="multi_token").run(speaking, prompt, store=store).tables["dropped"]
    assert dropped["item"].tolist() == ["prompt 0", "prompt 2"]
    assert dropped["reason"].tolist() == ["en and de share 2 tokens", "the line has no targets"]


def test_answers_are_judged_by_the_word_written(
    speaking: NativeModel, store: ActivationStore, monkeypatch: Any
) -> None:
    said = [speaking.tokenizer.id(p) for p in ("dog", '"', "h")]
    monkeypatch.setattr(
        "analyses.latent_language.answers.respond", lambda m, s, d, *a, **k: ([tuple(said)] * len(s), [])
    )
    monkeypatch.setattr("analyses.latent_language.answers.could_start", lambda *_: True)
    targets = [{"fr": ["cane"], "en": ["Dog"]}, {"fr": ["cane"], "en": ["Hund"]}]
    prompt = [PromptLine("line", "a", None, {"targets": t}) for t in targets]
    answers = (
        LatentLanguage(target=("en",), set_rule="multi_token").run(speaking, prompt, store=store).tables["answers"]
    )
    assert answers["said"].tolist() == ["dog", "dog"]
    assert answers["correct"].tolist() == [True, False]


@pytest.mark.parametrize("read", ["attn", "mlp"])
def test_parts_of_a_block_are_read(read: Any, tiny: NativeModel, store: ActivationStore) -> None:
    table = LatentLanguage(lens=read).run(tiny, lines(*[SUMS] * 4), store=store).tables["probability"]
    [rows] = [capture(tiny, PROMPTS, [Need(f"{read}_out.1")], store).get(f"{read}_out.1")]
    seen = logit.read(torch.stack([r[-1] for r in rows]), tiny.unembedding(), ids=torch.tensor(SUMS["fr"]))
    curve = table.query("layer == 1 and language == 'fr'")["probability"]
    np.testing.assert_allclose(curve, seen.logprobs.exp().sum(-1), atol=1e-6)


def test_gaussian_and_bootstrap_intervals_agree_roughly() -> None:
    values = np.random.default_rng(0).normal(size=(400, 1))
    boot, gauss = (row_interval(values, ci, 0) for ci in ("bootstrap", "gauss95"))  # type: ignore[arg-type]
    assert boot.mean == pytest.approx(gauss.mean)
    assert gauss.low[0] == pytest.approx(boot.low[0], abs=0.02)
    assert np.isnan(row_interval(values[:1], "bootstrap", 0).low).all()


def test_what_cannot_run_is_refused(tiny: NativeModel, store: ActivationStore) -> None:
    with pytest.raises(PromptError, match="no tokenizer"):
        LatentLanguage().run(tiny, store=store)
    with pytest.raises(PromptError, match="targets are words"):
        LatentLanguage().run(tiny, lines({"en": ["dog"]}), store=store)
    with pytest.raises(PromptError, match="outside the vocabulary"):
        LatentLanguage().run(tiny, lines({"en": [97]}), store=store)
    with pytest.raises(OptionError, match="equally many"):
        LatentLanguage(source=("en", "fr", "de"), target=("zh", "ja"))
    with pytest.raises(OptionError, match="klingon"):
        LatentLanguage(source=("klingon",))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "targets", [[], {}, {"en": []}, {"en": "dog"}, {"en": [1, "dog"]}, {"en": [-1]}, {"en": [True]}]
)
def test_faulty_targets_are_named(targets: Any) -> None:
    problem = LatentLanguage.prompt_fields["targets"](targets)
    assert problem is not None
    assert "must be an object" in problem


@pytest.mark.real
def test_the_default_model_says_plainly_what_it_cannot_do(real: Model, store: ActivationStore) -> None:
    result = LatentLanguage(source=("ja",), target=("fr",), n_prompts=6, n_shot=1, set_rule="first_token").run(
        real, store=store
    )
    [row] = result.tables["summary"].to_dict("records")
    assert row["accuracy"] < 0.5
    assert "cannot do this pair" in result.notes[0]
    last = result.tables["probability"].query("layer == 29").groupby("prompt")["probability"].sum()
    assert (last <= 1).all()


@pytest.mark.download
def test_the_multilingual_model_translates(store: ActivationStore) -> None:
    fetch_model("gemma3-270m", accept_license=True)
    model = load_model("gemma3-270m")
    result = LatentLanguage(
        source=("en",), target=("fr",), form="plain", set_rule="first_token", n_shot=16, on_collision="keep"
    ).run(model, store=store)
    [row] = result.tables["summary"].to_dict("records")
    assert row["n"] == 103
    assert row["accuracy"] > 0.8
    assert isinstance(result.tables["answers"], pd.DataFrame)


def _summary(**changed: object) -> pd.DataFrame:
    row = {
        "pair": "fr→zh", "target": "zh", "latent": "en", "n": 12, "accuracy": 0.42, "accuracy_low": 0.19,
        "accuracy_high": 0.68, "peak_layer": 4, "peak": 0.3, "peak_low": 0.2, "peak_high": 0.4, "peak_control": 0.0,
        "target_at_peak": 0.1, "leads_at": "3-5", "leads_in_middle": "4",
    }  # fmt: skip
    return pd.DataFrame([row | changed])


def test_what_is_said_of_a_pair_follows_from_its_intervals() -> None:
    [open_] = verdicts(_summary())
    assert "whether this model can do this pair is open" in open_
    assert "cannot do" not in open_
    assert "cannot do this pair" in verdicts(_summary(accuracy=0.1, accuracy_low=0.0, accuracy_high=0.4))[0]
    able = verdicts(_summary(accuracy=0.9, accuracy_low=0.6, accuracy_high=1.0))[0]
    assert "cannot" not in able
    assert "open" not in able
    few = verdicts(_summary(peak_low=np.nan, peak_high=np.nan, leads_at="", leads_in_middle=""))[0]
    assert "too few items for an interval" in few
    assert "leads zh by" not in few
    assert "is not shown to lead" in verdicts(_summary(leads_at="", leads_in_middle=""))[0]


@pytest.mark.parametrize(("ahead", "leads"), [(2e-5, False), (0.2, True)])
def test_a_difference_next_to_nothing_is_no_lead(ahead: float, leads: bool) -> None:
    n = 8
    own = tuple(np.array([[0.1, 0.1 + ahead]]) for _ in range(n))
    control = tuple(np.zeros((1, 2)) for _ in range(n))
    items = tuple(Item(i, str(i), "p", (1,), "", "fr", {"fr": ((1,),), "en": ((2,),)}) for i in range(n))
    reading = Reading(
        items, (("fr", "en"),) * n, own, control, np.zeros((n, 1)), np.zeros((n, 1)), (0, 0, 0), np.zeros(n, int)
    )
    assert tabled.lead(reading, "bootstrap", 0)["leads"].tolist() == [leads]


@pytest.mark.parametrize("ci", ["bootstrap", "gauss95"])
def test_few_items_have_no_interval(ci: Ci) -> None:
    values = np.arange(10.0).reshape(5, 2)
    few, enough = row_interval(values, ci, 0), row_interval(np.tile(values, (2, 1)), ci, 0)
    assert np.isnan([few.low, few.high]).all()
    assert (enough.low < enough.mean).all()


def test_as_many_items_are_kept_as_are_asked_for(speaking: NativeModel) -> None:
    whole = LatentLanguage(source=("en",), target=("it",), n_shot=0, set_rule="first_token")
    every, dropped = whole.items(speaking)
    assert dropped, "some words cannot be measured under this tokenizer"
    for n in (1, 3, len(every)):
        some, _ = replace(whole, n_prompts=n).items(speaking)
        assert len(some) == n
        assert {item.name for item in some} <= {item.name for item in every}
        assert [item.prompt for item in some] == list(range(n))
    more = replace(whole, n_prompts=len(every) + 1)
    some, lost = more.items(speaking)
    assert (len(some), len(lost)) == (len(every), len(dropped))


def test_fewer_items_than_asked_for_are_said(speaking: NativeModel, store: ActivationStore) -> None:
    options: dict[str, Any] = {
        "source": ("en",),
        "target": ("it",),
        "n_shot": 0,
        "set_rule": "first_token",
        "answers": "first_token",
    }
    every, _ = LatentLanguage(**options).items(speaking)
    result = LatentLanguage(**options, n_prompts=len(every) + 1).run(speaking, store=store)
    assert any(f"{len(every)} items instead of {len(every) + 1}" in note for note in result.notes)
