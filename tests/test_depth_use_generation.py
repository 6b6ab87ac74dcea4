"""What is written without a part of a block, against writing without a cache, and against planted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_tokenizer import FakeTokenizer
from families import FAMILIES, make
from tiny import native

from analyses.depth_use import DepthUse
from analyses.depth_use.answers import Judge
from analyses.depth_use.generation import Generation, Written
from analyses.depth_use.generation_tables import (
    generation_table,
    layer_table,
    median_survival,
    repetition,
    same_share,
)
from analyses.generation import Decoding, respond
from analyses.results.result import Result
from probes import edits
from probes.blocks.batch import Part
from probes.models import weights_digest
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.prompts import Prompt
from probes.store import ActivationStore

ADDING = [family for family in FAMILIES if family not in ("bert", "opt_post_norm")]
"""Causal families whose blocks add to the stream."""
END = 2


def texts_of(model: NativeModel, prompts: list[tuple[int, ...]], n: int, parts: tuple[Part, ...]) -> list[Written]:
    settings = DepthUse(generate_tokens=n, generate_parts=parts)
    plain = [tuple(model.generate(prompt, n)) for prompt in prompts]
    return Generation(model, [Prompt(p, None, {}) for p in prompts], plain, settings, lambda _: None).texts()


def uncached(model: NativeModel, prompt: tuple[int, ...], part: Part, layer: int, n: int) -> tuple[int, ...]:
    edit: edits.Edit = edits.skip(model.shape.n_layers, layer)
    if part != "block":
        edit = edits.Scale(address=Address(f"{part}_out", layer), factor=0.0, scope="every_step")
    written = edits.generate(model, prompt, n, [edit])
    return tuple(written[: written.index(END) + 1] if END in written else written)


@pytest.mark.parametrize("family", ADDING)
def test_responses_written_together_are_those_written_alone(family: str, tmp_path: Path) -> None:
    model, prompts = native(family), [(5, 6, 7, 8), (9,), (11, 3), (4, 12, 30, 7, 20, 6), (8, END)]
    responses, new = respond(model, prompts, Decoding(8), ActivationStore(tmp_path))
    assert responses == [tuple(model.generate(prompt, 8)) for prompt in prompts]
    assert sorted(new) == sorted(responses)
    assert respond(model, prompts, Decoding(8), ActivationStore(tmp_path)) == (responses, [])


@pytest.mark.parametrize("family", ADDING)
def test_cached_writing_without_a_block_is_the_skip_token_for_token(family: str) -> None:
    model, prompts, n = native(family), [(5, 6, 7, 8), (9,)], 8
    for text in texts_of(model, prompts, n, ("block",)):
        if text.removed:
            assert text.tokens == uncached(model, prompts[text.prompt], *text.removed, n), text.removed


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_so_are_parts_of_blocks_and_texts_of_very_different_lengths(family: str) -> None:
    model, prompts, n = native(family), [tuple(range(3, 59)), (5, 6, 7, 8)], 8
    texts = texts_of(model, prompts, n, ("attn", "mlp"))
    for text in texts:
        if text.removed:
            assert text.tokens == uncached(model, prompts[text.prompt], *text.removed, n), text.removed
    # Where one text ends early, the others go on, each without its own part.
    assert family != "llama" or any(text.ended for text in texts)


def test_losses_are_those_of_the_plain_model_on_what_was_written(tiny: NativeModel) -> None:
    before, prompts = weights_digest(tiny.module), [(5, 6, 7, 8), (9, 10)]
    for text in texts_of(tiny, prompts, 8, ("block", "mlp")):
        whole = torch.tensor([[*prompts[text.prompt], *text.tokens]])
        surprise = -edits.logits(tiny, whole)[0].log_softmax(-1)
        at = torch.arange(len(whole[0]) - len(text.tokens) - 1, len(whole[0]) - 1)
        assert np.allclose(surprise[at, torch.tensor(text.tokens)].numpy(), text.losses, atol=1e-4)
    assert weights_digest(tiny.module) == before
    assert tiny.generate((5, 6, 7, 8), 4) == native().generate((5, 6, 7, 8), 4)


def test_the_forced_loss_is_that_of_reading_the_plain_text_without_the_block(tiny: NativeModel) -> None:
    prompt = (5, 6, 7, 8)
    plain, *removed = texts_of(tiny, [prompt], 8, ("block",))
    whole, n = torch.tensor([[*prompt, *plain.tokens]]), len(prompt)
    for text in removed:
        assert text.removed is not None
        without = edits.logits(tiny, whole, [edits.skip(3, text.removed[1])])[0, n - 1 : -1]
        surprise = -without.log_softmax(-1)[torch.arange(len(plain.tokens)), torch.tensor(plain.tokens)]
        assert np.allclose(surprise.numpy() - plain.losses, text.delta_ce, atol=1e-4)
        assert text.agrees.tolist() == (without.argmax(-1) == torch.tensor(plain.tokens)).double().tolist()


def test_a_block_that_adds_nothing_changes_no_text() -> None:
    module = make("llama", seed=1)
    with torch.no_grad():
        for weight in (module.model.layers[1].self_attn.o_proj.weight, module.model.layers[1].mlp.down_proj.weight):
            weight.zero_()
    model = NativeModel(module, ref="zero", weights="zero-1")
    texts = texts_of(model, [(5 + i, 9) for i in range(4)], 8, ("block", "attn", "mlp"))
    table = generation_table(texts, None)
    layers = layer_table(texts, table, 0).set_index(["part", "layer"])
    for part in ("block", "attn", "mlp"):
        row = layers.loc[(part, 1)]
        assert row[["top1_agreement", "predicted_intact", "intact", "agreement", "exact"]].tolist() == [1] * 5
        assert row[["excess", "compounding"]].tolist() == [0, 0]
        assert abs(row["delta_ce_forced"]) < 1e-5
        assert np.isinf(row["median_divergence"])
        assert layers.loc[(part, 0), "agreement"] < 1


def closing_model(last: int) -> NativeModel:
    """Says token after token, and the end after token `last`, which its last block alone writes."""
    module = make("llama", tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for token in range(3, 30):
            module.model.embed_tokens.weight[token, token] = 1.0
            module.lm_head.weight[token + 1, token] = 0.5
        module.lm_head.weight[END, 31] = 0.5
        mlp = module.model.layers[2].mlp
        mlp.gate_proj.weight[0, last], mlp.up_proj.weight[0, last] = 2.0, 1 / 32**0.5
        mlp.down_proj.weight[31, 0] = 2 / 11.3
    return NativeModel(module, ref="closing", weights=f"closing-{last}")


def test_a_block_that_writes_the_closing_token_alone_costs_little_when_read_and_the_answer_when_written() -> None:
    texts = texts_of(closing_model(28), [(4 + i,) for i in range(3)], 26, ("block",))
    table = generation_table(texts, None)
    plain = table[table["part"] == "none"]
    assert plain["response"].iloc[0] == " ".join(map(str, [*range(5, 29), END]))
    assert plain["ended"].all()
    late, early = (layer_table(texts, table, 0).set_index("layer").loc[layer] for layer in (2, 0))
    assert 0 < late["delta_ce_forced"] < 0.15
    assert late["top1_agreement"] > 0.95
    assert late[["exact", "ended", "intact"]].tolist() == [0, 0, 0]
    assert early[["exact", "ended", "intact", "agreement"]].tolist() == [1, 1, 1, 1]


def planted(eps: float, n: int, steps: int, seed: int) -> list[Written]:
    """Texts whose logits are nudged towards another token at a share `eps` of the steps, each by itself."""
    rng = np.random.default_rng(seed)
    texts = []
    for prompt in range(n):
        logits = rng.standard_normal((steps, 5))
        plain = logits.argmax(1)
        logits[np.arange(steps), (plain + 1) % 5] += np.where(rng.random(steps) < eps, 100.0, 0.0)
        best = logits.argmax(1)
        agrees, whole = (best == plain).astype(float), tuple(int(token) for token in plain)
        one = Written(prompt, ("block", 0), whole, False, np.zeros(steps), np.nan, np.nan, agrees, np.zeros(steps))
        if (at := one.diverged_at) is not None:
            one.tokens = (*whole[:at], *[9] * (steps - at))
        texts += [Written(prompt, None, whole, False, np.zeros(steps), np.nan, np.nan), one]
    return texts


def test_independent_differences_leave_texts_whole_as_often_as_predicted() -> None:
    eps, n, steps = 0.05, 600, 16
    texts = planted(eps, n, steps, 0)
    (row,) = layer_table(texts, generation_table(texts, None), 0).to_dict("records")
    kept = (1 - eps) ** steps
    assert abs(row["intact"] - kept) < 4 * (kept * (1 - kept) / n) ** 0.5
    assert abs(row["predicted_intact"] - kept) < 0.05
    assert row["excess_low"] < 0 < row["excess_high"]
    # After the first difference nothing agrees here, which reading the plain text cannot show.
    assert row["compounding_low"] > 0.1
    first = np.log(0.5) / np.log(1 - eps)
    assert abs(row["median_divergence"] - first) < 2.5


def test_the_median_of_censored_times_by_hand() -> None:
    at, known = np.array([1.0, 2, 3, 4]), np.array([True, False, True, True])
    one = np.ones((1, 4))
    # 3/4 after time 1; then two are watched at 3, so 3/8.
    assert median_survival(at, known, one).tolist() == [3]
    assert median_survival(at, np.array([True, False, False, False]), one).tolist() == [np.inf]
    assert median_survival(at, known, np.array([[4.0, 0, 0, 0], [0, 0, 0, 4]])).tolist() == [1, 4]


def test_repetition_and_agreement_by_hand() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 6) == pytest.approx(2 / 3)
    assert np.isnan(repetition([1, 2, 3]))
    assert same_share([1, 9, 3], [1, 2, 3, 4]) == 0.5


@pytest.mark.parametrize(
    ("fields", "by_logits", "by_text"),
    [
        ({"answer": "Hund"}, [1, 0], [1, 0]),
        ({"answer": "Hund", "choices": ["Hund", "dog"]}, [1, 0], [1, 0]),
        ({}, [np.nan, np.nan], [np.nan, np.nan]),
    ],
)
def test_answers_are_judged_by_logits_and_by_text(
    fields: dict[str, Any], by_logits: list[float], by_text: list[float]
) -> None:
    model, tokenizer = native(), FakeTokenizer()
    model.tokenizer = tokenizer
    judge = Judge(model, 0, Prompt(tuple(tokenizer("d")["input_ids"]), "d", fields))
    hund, dog = tokenizer.id("▁Hund"), tokenizer.id("▁dog")
    logits = torch.zeros(2, len(tokenizer.pieces))
    logits[0, hund], logits[1, dog] = 1, 1
    assert np.array_equal([judge.by_logits(row) for row in logits], by_logits, equal_nan=True)
    assert np.array_equal([judge.by_text([hund, dog]), judge.by_text([dog, hund])], by_text, equal_nan=True)


FAST = {
    "parts": ("block",), "skip_prompts": 0, "erasure_prompts": 0, "gradient_prompts": 0, "greedy_steps": 0, "drop_blocks": 0,
    "bits": (8,), "windows": (2,),
}  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    analysis = DepthUse(**FAST, generate_prompts=6, generate_tokens=6, generate_stride=2)
    return analysis.run(
        native(), [(5 + i, 6, 7 + i, 8) for i in range(7)], store=ActivationStore(tmp_path_factory.mktemp("store"))
    )


def test_a_run_has_the_tables_and_figures_of_writing(result: Result) -> None:
    texts, layers = result.tables["generation"], result.tables["generation_layers"]
    assert len(texts) == 6 * 3
    assert layers["layer"].tolist() == [0, 2]
    for name in [name.removesuffix("_low") for name in layers if name.endswith("_low")]:
        known = layers.dropna(subset=[f"{name}_low", f"{name}_high"])
        assert (known[f"{name}_low"] <= known[name] + 1e-9).all(), name
        assert (known[name] <= known[f"{name}_high"] + 1e-9).all(), name
    proxies = result.tables["proxies"]
    lost = 1 - texts[texts["part"] == "block"].groupby("layer")["agreement"].mean()
    assert proxies["text_lost_block"].dropna().tolist() == pytest.approx(lost.tolist())
    assert "accuracy_drop_block" not in proxies
    assert "diverged_block" in set(result.tables["agreement"]["proxy_a"])
    assert {"generation", "effective_depth"} <= set(result.figures)
    assert "generation" in result.profiles
    for name in ("generation", "effective_depth"):
        assert result.figure(name).data


def test_writing_is_left_out_unless_it_is_asked_for(tiny: NativeModel, store: ActivationStore) -> None:
    plain = DepthUse(**FAST).run(tiny, [(5, 6, 7)], store=store)
    assert not {"generation", "generation_layers"} & set(plain.tables)
    assert isinstance(plain.tables["effective_depth"], pd.DataFrame)
