"""Read-outs by beam, swapped dimensions, similarity across languages and culture questions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from fake_tokenizer import FakeTokenizer
from families import make

from analyses.latent_language import LatentLanguage
from analyses.latent_language.ids import Rule
from analyses.latent_language.items import culture_items, unequal_length
from analyses.latent_language.layer_writing import beam
from analyses.latent_language.swap import Directions, swap
from analyses.reading.texts import parallel_sentences
from analyses.similarity.translations import compare
from analyses.word_lists import shipped_questions, shipped_words
from probes.lenses import logit as lens
from probes.models import Model
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.store import ActivationStore

TOKENS = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def speaking() -> NativeModel:
    tokenizer = FakeTokenizer()
    module = make("llama", vocab_size=len(tokenizer.pieces), max_position_embeddings=2048)
    return NativeModel(module, tokenizer, ref="speaking", weights="speaking")


def test_a_beam_of_one_at_the_last_layer_is_greedy_decoding(tiny: NativeModel) -> None:
    [(written, logprob)] = beam(tiny, TOKENS, 2, width=1, length=5)
    assert list(written) == tiny.generate(TOKENS, 5)
    with torch.no_grad():
        logits = tiny.module(torch.tensor([[*TOKENS, *written]])).logits[0].log_softmax(-1)
    assert logprob == pytest.approx(float(sum(logits[3 + i, t] for i, t in enumerate(written))), abs=1e-4)


def test_a_wide_beam_is_an_exhaustive_search(tiny: NativeModel) -> None:
    beams = beam(tiny, TOKENS, 1, width=tiny.shape.d_vocab, length=2)

    def read(sequences: list[tuple[int, ...]]) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        tiny.run(torch.tensor(sequences), {Address("resid_post", 1): lambda t: kept.append(t[:, -1].clone())})
        every = torch.arange(tiny.shape.d_vocab)
        return lens.read(kept[0], tiny.unembedding(), ids=every).logprobs

    first = read([TOKENS])[0]
    second = read([(*TOKENS, t) for t in range(tiny.shape.d_vocab)])
    best = (first[:, None] + second).flatten().topk(5)
    pairs = [divmod(int(i), tiny.shape.d_vocab) for i in best.indices]
    assert [tokens for tokens, _ in beams[:5]] == pairs
    np.testing.assert_allclose([score for _, score in beams[:5]], best.values, atol=1e-4)


def test_swapping_all_dimensions_gives_the_donor_and_none_the_row() -> None:
    row, donor = torch.randn(2, 12).unbind()
    every = torch.arange(12)
    assert torch.equal(swap(row, donor, every), donor)
    assert torch.equal(swap(row, donor, every[:0]), row)
    some = swap(row, donor, every[3:5])
    assert (some != row).sum() == 2


def test_the_planted_language_dimensions_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(40, 20, generator=generator)
    other = own + 0.3 * torch.randn(40, 20, generator=generator)
    other[:, [4, 17]] += torch.tensor([2.0, -3.0])
    learned = Directions.learn(own, other)
    assert set(learned.order[:2].tolist()) == {4, 17}
    torch.testing.assert_close(learned.mean, (other - own).mean(0))


def test_swapped_runs_end_where_the_donor_or_the_row_ends(speaking: NativeModel, store: ActivationStore) -> None:
    analysis = LatentLanguage(
        source=("en",), target=("it",), swap_to="de", n_prompts=4, n_shot=1, set_rule="first_token", on_collision="subtract",
        answers="first_token", extras=("swap",), extra_items=3, shares=(50.0, 100.0), layers=(0.0, 0.5),
    )  # fmt: skip
    table = analysis.run(speaking, store=store).tables["swap"]
    measures = ["switched", "meaning_kept", "meaning_moved"]
    assert sorted(set(table["layer"])) == [0, 1]
    for _, group in table.groupby("layer"):
        by = group.set_index(["variant", "percent"])[measures]
        for variant in ("top", "random"):
            np.testing.assert_allclose(by.loc[(variant, 100.0)], by.loc[("whole", 100.0)], atol=1e-6)
        assert (by.to_numpy() >= 0).all()
        assert (by.to_numpy() <= 1).all()


def test_identical_states_are_each_others_nearest() -> None:
    states = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    aligned, unaligned, retrieval = compare(states, 3 * states + 5)
    np.testing.assert_allclose(aligned, 1, atol=1e-6)
    assert (unaligned < 0.9).all()
    assert retrieval == 1
    order = torch.arange(9).roll(1)
    assert compare(states, states[order])[2] == 0


def test_parallel_sentences_say_the_word(speaking: NativeModel, store: ActivationStore) -> None:
    sentences = parallel_sentences(shipped_words())
    assert sentences[0]["en"] == "A dog is an animal that barks and guards the house."
    assert sentences[0]["ja"] == "犬は、ほえて家を守る動物です。"
    assert all("___" not in text and ":" not in text for texts in sentences for text in texts.values())
    analysis = LatentLanguage(
        source=("en",), target=("it",), n_prompts=3, n_shot=0, set_rule="first_token", on_collision="subtract",
        answers="first_token", extras=("similarity",),
    )  # fmt: skip
    table = analysis.run(speaking, store=store).tables["similarity"]
    assert len(table) == 3 * len(list(itertools.combinations(("en", "fr", "de", "zh", "ja"), 2)))
    assert (table["chance"] == 1 / 12).all()


def test_culture_items_drop_answers_of_unequal_length(speaking: NativeModel) -> None:
    rule = Rule(speaking.tokenizer, "multi_token")
    questions = shipped_questions()
    items, dropped = culture_items(questions, "plain", "ja", rule, speaking, 0, 0)
    assert len(items) + len(dropped) == len([q for q in questions if q.kind != "example"])
    assert dropped
    assert all("answers in" in reason or "share" in reason for *_, reason in dropped)
    for item in items:
        assert set(item.sets) == {f"{c}/{lang}" for c in ("japan", "us") for lang in ("ja", "en")}
        assert item.text.endswith('答え: "')


def test_culture_curves_and_tuned_lens_join_the_result(speaking: NativeModel, store: ActivationStore) -> None:
    analysis = LatentLanguage(
        source=("en",), target=("it",), n_prompts=3, n_shot=0, set_rule="first_token", on_collision="subtract",
        answers="first_token", extras=("culture", "layer_writing"), framings=("plain", "us"), lens="tuned", beam_width=2,
        beam_tokens=2, layers=(0.5,),
    )  # fmt: skip
    result = analysis.run(speaking, store=store)
    culture = result.tables["culture"]
    assert set(culture["framing"]) == {"plain", "us"}
    curves = culture.groupby(["framing", "items"])[["culture", "language"]].apply(lambda t: len(t.drop_duplicates()))
    assert (curves == 4).all()
    assert (culture["mean"] >= 0).all()
    readout = result.tables["readout"]
    assert readout.groupby(["prompt", "layer"])["logprob"].apply(lambda s: s.is_monotonic_decreasing).all()
    losses = result.tables["tuned_lens"]
    assert losses["tuned_kl"].iloc[-1] == pytest.approx(0, abs=1e-5)
    assert set(result.figures) >= {"culture", "tuned_lens"}
    for name in result.figures:
        assert result.figure(name).data


def counted(model: Model) -> tuple[int, int]:
    questions = [q for q in shipped_questions() if q.kind != "example"]
    equal = [q for q in questions if unequal_length(q, model.tokenizer) is None]
    return len(equal), len(questions)


@pytest.mark.real
def test_most_answers_have_equal_length_under_the_default_tokenizer(real: Model) -> None:
    equal, total = counted(real)
    assert total >= 40
    assert equal >= 35


@pytest.mark.download
def test_all_answers_have_equal_length_under_the_multilingual_tokenizer() -> None:
    from probes.models import fetch_model, load_model

    fetch_model("gemma3-270m", accept_license=True)
    equal, total = counted(load_model("gemma3-270m"))
    assert equal == total >= 40
