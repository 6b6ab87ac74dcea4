"""Passage use: identities of its measures, a planted model in which a decoy attends and writes nothing, and what is refused."""

from __future__ import annotations

from math import log

import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from small import line
from tiny import native

from analyses.passage_use import PassageUse
from analyses.passage_use.fusion import Fusing
from analyses.passage_use.items import items_of, with_variants
from analyses.passage_use.measures import cosine, masked_divergence, passage_mass, row_divergence
from analyses.passage_use.tables import chosen_table
from analyses.results.result import Result
from probes import edits
from probes.edits import KnockOut
from probes.errors import PromptError
from probes.models.backends.native import NativeModel
from probes.planted.blueprint import Blueprint
from probes.planted.hosts import BOS, Host
from probes.planted.parts import copy_head, look_alike, lookup
from probes.planted.vocabulary import words
from probes.store import ActivationStore

N_LAYERS, DECOY, COPY, STORED = 6, 1, 3, 4
NAMES = (BOS, *words(f=6, p=4, a=4, ask=0))


class TestAttention:
    def test_the_closed_form_is_the_divergence_of_a_row_from_itself_masked(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for span in ((0, 3), (2, 7), (9, 10), (4, 4)):
            rows = (3 * torch.randn(8, 10, generator=generator, dtype=torch.float64)).softmax(-1)
            masked = rows.clone()
            masked[:, span[0] : span[1]] = 0
            masked /= masked.sum(-1, keepdim=True)
            assert masked.sum(-1).numpy() == pytest.approx(1)
            direct = row_divergence(rows, masked)
            closed = masked_divergence(passage_mass(rows, span))
            torch.testing.assert_close(closed, direct, atol=1e-6, rtol=0)
            assert ((closed >= 0) & (closed <= log(2))).all()

    def test_the_ends_of_the_closed_form(self) -> None:
        assert masked_divergence(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, log(2)])


def planted() -> NativeModel:
    """A model that copies its answer from the passage in block 3 and stores another one in block 4; block 1's head only looks."""
    blueprint = Blueprint(Host(N_LAYERS, 64, NAMES, "none", d_head=16), torch.Generator().manual_seed(0))
    stream, token = blueprint.stream, blueprint.token
    for slot, size in {"bos": 1, "passage": 1, "ask": 1, "value": 4, "answer": 4}.items():
        stream.slot(slot, size)
    blueprint.embedding[token(BOS)] += stream.vector("bos")
    blueprint.embedding[token("ask")] += stream.vector("ask")
    blueprint.embedding[blueprint.tokens("p")] += stream.basis("value") + stream.vector("passage")
    blueprint.unembedding[blueprint.tokens("a")] += 6 * stream.basis("answer")
    stream.rest("junk")
    blueprint.place_head(DECOY, look_alike(blueprint, query="ask", key="passage"))
    copying = copy_head(blueprint, query="ask", key="passage", source="value", target="answer")
    blueprint.place_head(COPY, copying)
    blueprint.place_mlp(STORED, lookup(blueprint, [((stream.vector("ask"),), stream.vector("answer", 3))]))
    prompts = [prompt.tokens for prompt in PROMPTS]
    module = blueprint.assemble(prompts)
    return NativeModel(module, ref="planted", weights="planted-passage")


def _prompt(i: int) -> object:
    word = NAMES.index
    filler = [word(f"f{(i + j) % 6}") for j in range(3)]
    tokens = (0, filler[0], word(f"p{i % 3}"), filler[1], filler[2], word("ask"))
    return line(tokens, passage=[2, 3], answer_tokens=[word(f"a{i % 3}")], neutral=[word("f0")], noise=[[word(f"p{(i + 1) % 3}")]])  # fmt: skip


PROMPTS = [_prompt(i) for i in range(9)]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    store = ActivationStore(tmp_path_factory.mktemp("store"))
    return PassageUse(window=0, fuse=True).run(planted(), PROMPTS, store=store)  # type: ignore[arg-type]


def by_layer(result: Result, measure: str) -> pd.DataFrame:
    table = result.tables["means"]
    return table[table["measure"] == measure].set_index("layer")


class TestPlanted:
    def test_only_the_block_that_copies_needs_the_passage(self, result: Result) -> None:
        losses = by_layer(result, "knock_out_loss")
        assert losses["mean"].idxmax() == COPY
        assert losses["low"][COPY] > 0.5
        assert losses["mean"].drop(COPY).abs().max() < 1e-3

    def test_a_decoy_attends_as_much_and_is_not_needed(self, result: Result) -> None:
        mass = by_layer(result, "mass")["mean"]
        assert mass[DECOY] == pytest.approx(mass[COPY], rel=0.01)
        assert mass[DECOY] > 2 * mass.drop([DECOY, COPY]).max()
        assert by_layer(result, "diff_attn")["mean"][DECOY] > 0.01

    def test_the_stored_answer_changes_the_read_out(self, result: Result) -> None:
        change = by_layer(result, "iks")["mean"]
        assert change.idxmax() == STORED
        assert change.drop(STORED).max() < 1e-6

    def test_an_mlp_that_adds_nothing_has_no_direction(self, result: Result) -> None:
        layers = result.tables["layers"]
        assert layers.loc[layers["layer"] == 0, "sim_hidden"].isna().all()
        assert layers.loc[layers["layer"] == STORED, "sim_hidden"].to_numpy() == pytest.approx(1, abs=1e-4)

    def test_the_passage_is_what_gives_the_answer(self, result: Result) -> None:
        table = result.tables["prompts"]
        assert table["correct"].all()
        assert (
            table["logprob"] > table[["logprob_without", "logprob_neutral", "logprob_noise"]].max(axis=1) + 0.5
        ).all()

    def test_words_follow_intervals(self, result: Result) -> None:
        assert any(f"around block {COPY} (windows of 1)" in note for note in result.notes)
        assert any(note.startswith("Fusion (ours, after LFD)") for note in result.notes)

    def test_figures_draw_from_the_tables(self, result: Result) -> None:
        assert set(result.figures) == set(PassageUse.figures)
        for name in result.figures:
            assert result.figure(name).data

    def test_fusion_has_all_its_controls(self, result: Result) -> None:
        table = result.tables["fusion"].set_index("variant")
        assert set(table.index) == {"none", "fused", "random_layer", "fixed_layer", "temperature"}
        assert table.loc["none", "gain"] == 0


def test_an_empty_passage_changes_nothing(store: ActivationStore) -> None:
    prompts = [line((5, 6, 7, 8 + i), passage=[2, 2], answer_tokens=[9]) for i in range(3)]
    layers = PassageUse().run(native(), prompts, store=store).tables["layers"]
    assert layers["sim_hidden"].to_numpy() == pytest.approx(1)
    assert (layers[["mass", "diff_attn", "knock_out_loss"]] == 0).all(axis=None)
    assert layers["diff_attn_propagated"].to_numpy() == pytest.approx(0, abs=1e-6)


def test_a_zeroed_mlp_changes_no_read_out(store: ActivationStore) -> None:
    module = make("llama", seed=3)
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.zero_()
    model = NativeModel(module, ref="zeroed", weights="zeroed-mlp")
    prompts = [line((5, 6, 7, 8 + i, 4), passage=[1, 3], answer_tokens=[9]) for i in range(3)]
    layers = PassageUse().run(model, prompts, store=store).tables["layers"].set_index("layer")
    assert (layers.loc[1, "iks"] == 0).all()
    assert layers.loc[1, "sim_hidden"].isna().all()
    assert (layers.loc[[0, 2], "iks"] > 0).all()
    assert layers["iks"].between(0, log(2)).all()
    assert np.isnan(cosine(torch.zeros(3), torch.ones(3)))


def test_a_knock_out_resumed_behind_the_passage_is_one_of_the_whole_prompt(store: ActivationStore) -> None:
    model, tokens = native(), (5, 6, 7, 8, 20, 31, 4)
    prompts = [line(tokens, passage=[1, 4], answer_tokens=[9])]
    layers = PassageUse(window=1).run(model, prompts, store=store).tables["layers"].set_index("layer")
    plain = edits.logits(model, torch.tensor([tokens]))[0, -1].log_softmax(-1)[9]
    for layer in range(3):
        blocks = tuple(range(max(0, layer - 1), min(3, layer + 2)))
        cut = KnockOut(blocks, queries=(4, 5, 6), keys=(1, 2, 3))
        blind = edits.logits(model, torch.tensor([tokens]), [cut])[0, -1].log_softmax(-1)[9]
        assert layers.loc[layer, "knock_out_loss"] == pytest.approx(float(plain - blind), abs=1e-5)


def test_variants_stand_where_the_passage_stood() -> None:
    prompt = line((1, 2, 3, 4, 5), passage=[1, 3], answer_tokens=[7], neutral=[9], noise=[[8], [6, 6, 6]])
    read = with_variants(native(), [prompt])
    assert [p.tokens for p in read] == [(1, 2, 3, 4, 5), (1, 4, 5), (1, 9, 9, 4, 5), (1, 8, 4, 5), (1, 6, 6, 6, 4, 5)]
    (item,) = items_of(native(), read)
    assert (item.passage, item.without, item.neutral, item.noise) == (0, 1, 2, (3, 4))


def test_fusing_rules_out_what_the_final_prediction_does() -> None:
    final, middle = torch.tensor([[0.6, 0.38, 0.02]]).log(), torch.tensor([[0.1, 0.2, 0.7]]).log()
    fused = Fusing(1.0, 0.1).fused(final, middle).exp()[0]
    assert fused.tolist() == pytest.approx([0.06 / 0.136, 0.076 / 0.136, 0])
    assert Fusing(0.0, 0.0001).fused(final, middle).exp()[0].tolist() == pytest.approx([0.6, 0.38, 0.02])


def test_the_chosen_layer_is_of_the_second_half() -> None:
    layers = pd.DataFrame(
        {"prompt": [0] * 5 + [1] * 5, "layer": [*range(5)] * 2, "iks": [0, 0, 9, 3, 1, 0, 0, 9, 2, 5]}
    )
    assert chosen_table(layers)["layer"].tolist() == [4, 3]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"answer_tokens": [9]}, 'give "passage"'),
        ({"passage": [1, 2]}, 'give "answer"'),
        ({"passage": [1, 4], "answer_tokens": [9]}, "a question must follow"),
        ({"passage": [0, 2], "answer_tokens": [9]}, "begins with its passage"),
        ({"passage": "a word", "answer_tokens": [9]}, "positions of its passage"),
        ({"passage": [2, 1], "answer_tokens": [9]}, "first, after the last"),
        ({"passage": [1, 2], "answer_tokens": [9], "noise": []}, "list of texts"),
    ],
)
def test_refused(fields: dict[str, object], says: str, store: ActivationStore) -> None:
    with pytest.raises(PromptError, match=says):
        PassageUse().run(native(), [line((5, 6, 7, 8), **fields)], store=store)
