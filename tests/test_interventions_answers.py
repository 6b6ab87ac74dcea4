"""Said beforehand is counted afterwards, for analyses that write and score answers, with a tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from families import make
from real_tokenizers import tokenizer_of
from small import LABELLED
from tiny import native

from analyses.back_patching import BackPatching
from analyses.base import Analysis
from analyses.concept_depth import ConceptDepth
from analyses.latent_language import LatentLanguage
from probes.models.backends.native import NativeModel
from probes.prompts import Prompt
from probes.store import ActivationStore

GIVEN = [
    Prompt((5, 6, 7), None, {"answer_tokens": [8], "positions": [0, -1]}),
    Prompt((9, 5, 6), None, {"answer_tokens": [4], "positions": [1]}),
    Prompt((9, 5, 6, 7), None, {"answer_tokens": [4]}),
]
GIVEN_RUNS = [
    BackPatching(),
    BackPatching(cells="full", include_embedding=True),
    BackPatching(controls=False, scope_step=1),
    BackPatching(layers=(0, 2), positions=("t1",)),
    BackPatching(stride=2, stages=False),
    BackPatching(n_prompts=2),
]
TEXT_RUNS = [
    BackPatching(mode="generate", max_new_tokens=3, top_cells=2),
    BackPatching(mode="generate", max_new_tokens=1, cells="full", controls=False, stages=False),
    BackPatching(task="two_hop", pool=4, window=0),
    BackPatching(task="two_hop", pool=4, n_prompts=2, mode="generate", max_new_tokens=2),
]
SWAP: dict[str, Any] = {
    "source": ("en",),
    "target": ("it",),
    "swap_to": "de",
    "n_prompts": 2,
    "n_shot": 1,
    "set_rule": "first_token",
}
WORD_RUNS = [
    LatentLanguage(
        **SWAP, on_collision="keep", extras=("swap",), extra_items=3, layers=(0.0, 0.5, 1.0), shares=(1.0, 50.0)
    ),
    LatentLanguage(**SWAP, on_collision="keep", extras=("swap",), extra_items=2, layers=(1.0,)),
    LatentLanguage(**{**SWAP, "swap_to": "it"}, on_collision="keep", extras=("swap",)),
    LatentLanguage(**SWAP, on_collision="keep"),
]
LABELLED_RUNS = [
    ConceptDepth(causal_layers=2, causal_prompts=4, splits=1, jobs=1),
    ConceptDepth(causal_layers=0, variants=("plain", "int8"), splits=1, jobs=1, stride=2),
    ConceptDepth(causal_layers=3, layers=(1,), splits=1, jobs=1, variants=("plain", "int4")),
    ConceptDepth(causal_layers=0, splits=1, jobs=1),
]


@pytest.fixture(scope="module")
def speaking() -> NativeModel:
    tokenizer = tokenizer_of("llama2")
    module = make("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    return NativeModel(module, tokenizer, ref="speaking", weights="speaking")


def check(analysis: Analysis, model: NativeModel, prompts: list[Any], store: ActivationStore) -> None:
    foretold = analysis.interventions(model, analysis.collect(model, prompts))
    counts = analysis.run(model, prompts, store=store).provenance["counts"]
    done = counts["intervention_forwards"]
    assert done == foretold.total if foretold.exact else 0 < done <= foretold.total
    assert foretold.exact or not isinstance(analysis, BackPatching) or analysis.n_prompts == 2
    assert foretold.exact or not isinstance(analysis, LatentLanguage)


@pytest.mark.parametrize("analysis", GIVEN_RUNS, ids=str)
def test_on_given_ids(analysis: Analysis, store: ActivationStore) -> None:
    check(analysis, native(), GIVEN, store)


@pytest.mark.parametrize("analysis", LABELLED_RUNS, ids=str)
def test_on_labelled_prompts(analysis: Analysis, store: ActivationStore) -> None:
    check(analysis, native(), LABELLED, store)


@pytest.mark.parametrize("analysis", WORD_RUNS, ids=str)
def test_on_words(analysis: Analysis, speaking: NativeModel, store: ActivationStore) -> None:
    check(analysis, speaking, [], store)


@pytest.mark.parametrize("analysis", TEXT_RUNS, ids=str)
def test_on_texts(analysis: Analysis, speaking: NativeModel, store: ActivationStore) -> None:
    texts = [
        Prompt(tuple(speaking.tokenizer(text)["input_ids"]), text, {"answer": answer, "entity": entity})
        for text, answer, entity in (
            ("The capital city of France is", "Paris", "France"),
            ("The capital city of Italy is", "Rome", "Italy"),
        )
    ]
    check(analysis, speaking, texts, store)
