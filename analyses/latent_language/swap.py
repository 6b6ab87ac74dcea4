"""Language against meaning: swapping a few dimensions of the stream between prompts that ask for two languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.latent_language.extra_settings import Settings
from analyses.latent_language.ids import Rule
from analyses.latent_language.items import Dropped, prompt_tokens
from analyses.latent_language.read import LAST, Reader
from analyses.latent_language.task_prompts import Query, queries
from analyses.results.statistics import row_interval
from analyses.word_lists import Word, read_words, shipped_words
from probes.blocks.cached_prompt import CachedPrompt
from probes.capture.needs import Need
from probes.lenses import logit
from probes.models.protocol import Model
from probes.points import Address

N_SHOT = 2
FIXED = ("none", "shift", "whole")
"""Variants beside those of each share."""
MEASURES = ("switched", "meaning_kept", "meaning_moved")


@dataclass(frozen=True)
class Directions:
    """What sets the two languages apart at a layer, learned from words that are not tested."""

    mean: Tensor
    """[d_model], mean of (other language - own language) over the same words."""
    order: Tensor
    """[d_model], dimensions from the most to the least consistent difference, |mean| / standard deviation."""

    @classmethod
    def learn(cls, own: Float[Tensor, "word d_model"], other: Float[Tensor, "word d_model"]) -> Directions:
        """From rows of the same words, [word, d_model] each."""
        difference = other.float() - own.float()
        mean = difference.mean(dim=0)
        spread = difference.std(dim=0, correction=0).clamp_min(1e-12)
        return cls(mean, (mean.abs() / spread).argsort(descending=True))


def swap(
    row: Float[Tensor, " d_model"], donor: Float[Tensor, " d_model"], dimensions: Int[Tensor, " n"]
) -> Float[Tensor, " d_model"]:
    """`row` [d_model] with the donor's values in `dimensions`."""
    swapped = row.clone()
    swapped[dimensions] = donor[dimensions]
    return swapped


def measure(reader: Reader, settings: Settings) -> tuple[dict[str, pd.DataFrame], list[Dropped]]:
    """Table `swap`: layer, variant, percent, dimensions, and per measure its mean, ci_low, ci_high; n.

    Asked for one language, a prompt's last row gets dimensions of a row that answers another word in another language.
    `switched` is the other language's share of the probability of all tested words; `meaning_kept` and `meaning_moved`
    say that the most probable word, in either language, is the prompt's own or the donor's.
    """
    source, target = settings.pairs[0]
    other, words = settings.swap_to, _words(settings)
    if not words:
        reason = f"swap needs another language than {target} and {2 * settings.extra_items + N_SHOT} words in all three"
        return {}, [(f"{source}→{target}", "swap", reason)]
    layers = _layers(settings, reader.model.shape.n_layers)
    if not layers:
        return {}, [(f"{source}→{target}", "swap", "nothing is swapped at the last layer, which no block follows")]
    n = 2 * settings.extra_items
    drawn = {
        lang: queries(words, "translation", source, lang, N_SHOT, n, settings.seed, settings.form)
        for lang in (target, other)
    }
    shuffled = np.random.default_rng(settings.seed).permutation(n)
    test, train = shuffled[: n // 2], shuffled[n // 2 :]
    rows = {lang: _rows(reader, drawn[lang], layers) for lang in drawn}
    sets = _sets(reader.model, [drawn[target][i].word for i in test], target, other)
    parts = []
    for layer in layers:
        learned = Directions.learn(rows[target][layer][train], rows[other][layer][train])
        donors = rows[other][layer][np.roll(test, -1)]
        tested = [drawn[target][i] for i in test]
        parts.append(_layer(reader, tested, layer, donors, learned, sets, settings))
    return {"swap": pd.concat(parts, ignore_index=True)}, []


def _words(settings: Settings) -> list[Word]:
    """The words written in all three languages; none where they are too few, or two of the languages are one."""
    source, target = settings.pairs[0]
    words = read_words(settings.words) if settings.words else shipped_words()
    words = [w for w in words if all(lang in w.forms for lang in (source, target, settings.swap_to))]
    enough = len(words) >= 2 * settings.extra_items + N_SHOT
    return words if enough and settings.swap_to != target else []


def _layers(settings: Settings, n_layers: int) -> list[int]:
    return [layer for layer in settings.layers(n_layers) if layer < n_layers - 1]


def forwards(settings: Settings, n_layers: int) -> int:
    """How many edited rows are run: of each word tested, at each layer, every variant."""
    variants = len(FIXED) + 2 * len(settings.shares)
    return len(_layers(settings, n_layers)) * settings.extra_items * variants if _words(settings) else 0


def _rows(reader: Reader, drawn: Sequence[Query], layers: Sequence[int]) -> Mapping[int, Tensor]:
    """Last rows [query, d_model] by layer."""
    sequences = [prompt_tokens(reader.model, query.text) for query in drawn]
    captured = reader.capture(sequences, Need(tuple(f"resid_post.{layer}" for layer in layers), LAST))
    return {layer: torch.cat(captured.get(Address("resid_post", layer), LAST)) for layer in layers}


def _sets(model: Model, words: Sequence[Word], target: str, other: str) -> Sequence[tuple[list[int], list[int]]]:
    """Per word, its first tokens in both languages; tokens that say two things are left out."""
    rule = Rule(model.tokenizer, "first_token")
    first_tokens = [tuple({s[0] for s in rule.sequences(w.forms[lang])} for lang in (target, other)) for w in words]
    counts: dict[int, int] = {}
    for both in first_tokens:
        for ids in both:
            for token in ids:
                counts[token] = counts.get(token, 0) + 1
    kept = [[sorted(t for t in ids if counts[t] == 1) for ids in both] for both in first_tokens]
    return [(both[0], both[1]) for both in kept]


def _variants(
    row: Tensor, donor: Tensor, learned: Directions, settings: Settings
) -> list[tuple[str, float, int, Tensor]]:
    """(variant, percent, dimensions, edited row) of one prompt at one layer."""
    d_model = len(row)
    fixed = ((0.0, 0, row), (100.0, d_model, row + learned.mean), (100.0, d_model, donor))
    variants = [(name, *edit) for name, edit in zip(FIXED, fixed, strict=True)]
    drawn = torch.randperm(d_model, generator=torch.Generator().manual_seed(settings.seed))
    for percent in settings.shares:
        size = max(1, round(percent / 100 * d_model))
        variants.append(("top", percent, size, swap(row, donor, learned.order[:size])))
        variants.append(("random", percent, size, swap(row, donor, drawn[:size])))
    return variants


def _layer(
    reader: Reader, tested: Sequence[Query], layer: int, donors: Tensor, learned: Directions,
    sets: Sequence[tuple[list[int], list[int]]], settings: Settings,
) -> pd.DataFrame:  # fmt: skip
    scores, names, model = [], [], reader.model
    for own, query in enumerate(tested):
        prompt = CachedPrompt(model, prompt_tokens(model, query.text), -1)
        row = prompt.entering[layer + 1][-1]
        variants = _variants(row, donors[own].to(row), learned, settings)
        hidden = torch.stack([edited.to(row) for *_, edited in variants])[:, None]
        last = prompt.resume([layer + 1] * len(variants), hidden).last
        reader.patched += len(variants)
        scores.append(_scores(model, last, sets, own, (own + 1) % len(tested)))
        names = [(variant, percent, size) for variant, percent, size, _ in variants]
    values = np.stack(scores)
    table = pd.DataFrame(names, columns=["variant", "percent", "dimensions"])
    for column, measured in enumerate(MEASURES):
        interval = row_interval(values[:, :, column], settings.ci, settings.seed)
        table[measured], table[f"{measured}_low"], table[f"{measured}_high"] = (
            interval.mean,
            interval.low,
            interval.high,
        )
    table.insert(0, "layer", layer)
    table["n"] = len(tested)
    return table


def _scores(
    model: Model, last: Tensor, sets: Sequence[tuple[list[int], list[int]]], own: int, donor: int
) -> np.ndarray:
    """[variant, measure] of one prompt, from what leaves the last block [variant, d_model]."""
    ids = sorted({token for both in sets for side in both for token in side})
    read = logit.read(last, model.unembedding(), ids=torch.tensor(ids))
    probability = dict(zip(ids, read.logprobs.double().exp().T.cpu().numpy(), strict=True))
    zero = np.zeros(len(last))
    mass = np.array([[sum((probability[t] for t in side), zero) for side in both] for both in sets])
    by_language, by_word = mass.sum(axis=0), mass.sum(axis=1)
    best = by_word.argmax(axis=0)
    return np.stack([by_language[1] / by_language.sum(axis=0), best == own, best == donor], axis=1)
