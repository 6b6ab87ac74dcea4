"""Tables of what is written without a part of a block, and the columns that enter the proxies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analyses.depth_use.generation import Written
from analyses.results.per_prompt import PerPrompt
from analyses.results.statistics import MIN_CLUSTERS, Array, draw_counts, percentiles, wilson

GRAM = 4
"""Tokens of the runs whose repetition is counted."""
PROXIES = ("diverged", "text_lost", "accuracy_drop")
"""What enters the table of proxies per part: share of texts that change, share of tokens that do, and accuracy lost."""


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of runs of four tokens that occurred before; NaN in a shorter text."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else np.nan


def same_share(tokens: Sequence[int], plain: Sequence[int]) -> float:
    """Return the share of a plain text's tokens that another text has at the same index."""
    return sum(a == b for a, b in zip(tokens, plain, strict=False)) / len(plain)


def median_survival(at: Array, known: NDArray[np.bool_], weights: Array) -> Array:
    """Return the Kaplan-Meier median of times [text], of which some are only known to be no earlier.

    Args:
        at: when each text diverged, or until when it was watched.
        known: whether it diverged.
        weights: [draws, text], how often each text counts.

    Returns:
        [draws]; infinite where more than half do not diverge while they are watched.
    """
    surviving, median = np.ones(len(weights)), np.full(len(weights), np.inf)
    for time in np.unique(at[known]):
        events, watched = weights @ (known & (at == time)), weights @ (at >= time)
        surviving = surviving * (1 - np.divide(events, watched, out=np.zeros_like(events), where=watched > 0))
        median = np.where(np.isinf(median) & (surviving <= 0.5 + 1e-12), time, median)
    return median


def written_tables(
    texts: Sequence[Written], tokenizer: Any, columns: Mapping[str, PerPrompt], seed: int
) -> dict[str, pd.DataFrame]:
    """Return the tables `generation` and `generation_layers`, and enter into `columns` those that are proxies."""
    generation = generation_table(texts, tokenizer)
    enter_proxies(columns, generation)
    return {"generation": generation, "generation_layers": layer_table(texts, generation, seed)}


def generation_table(texts: Sequence[Written], tokenizer: Any) -> pd.DataFrame:
    """Return one row per text.

    Args:
        texts: all texts, the plain ones among them.
        tokenizer: what makes tokens readable; None leaves them numbers.

    Returns:
        Columns part (none for the plain model), layer (NaN for it), prompt, tokens, diverged_at (first token from 0 that is
        not the plain text's, NaN where all are), forced_agreement (share of the plain text's tokens that stay most probable
        when the plain text is read), delta_ce_forced (nats per token), agreement (share that is written at the same index),
        exact, repetition, ended, plain_ce (nats per token), right_logits, right_generated, response.
    """
    plain = {text.prompt: text.tokens for text in texts if text.removed is None}
    return pd.DataFrame([_row(text, plain[text.prompt], tokenizer) for text in texts])


def _row(text: Written, plain: Sequence[int], tokenizer: Any) -> dict[str, object]:
    part, layer = text.removed or ("none", np.nan)
    at, read = text.diverged_at, text.removed is not None
    return {
        "part": part,
        "layer": layer,
        "prompt": text.prompt,
        "tokens": len(text.tokens),
        "diverged_at": np.nan if at is None else at,
        "forced_agreement": float(text.agrees.mean()) if read else 1.0,
        "delta_ce_forced": float(text.delta_ce.mean()) if read else 0.0,
        "agreement": same_share(text.tokens, plain),
        "exact": text.tokens == plain,
        "repetition": repetition(text.tokens),
        "ended": text.ended,
        "plain_ce": float(text.losses.mean()),
        "right_logits": text.right_logits,
        "right_generated": text.right_generated,
        "response": " ".join(map(str, text.tokens)) if tokenizer is None else str(tokenizer.decode(list(text.tokens))),
    }


def layer_table(texts: Sequence[Written], generation: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return one row per removed part, with intervals over prompts.

    Returns:
        Columns part, layer, prompts, and, each with `_low` and `_high`: delta_ce_forced (nats per token of the plain text),
        top1_agreement (1 - eps), predicted_intact (mean over texts of (1 - eps)^tokens), intact (share of texts that never
        diverge; Wilson), excess (intact - predicted_intact), median_divergence (Kaplan-Meier, tokens; infinite where more
        than half never diverge), agreement (when writing freely), compounding (top1_agreement - agreement), exact,
        repetition, ended, tokens, plain_ce, accuracy_logits and accuracy_generated (Wilson); then by item
        right_both, logits_only, generated_only, right_neither (numbers of prompts).
    """
    rows = []
    numbered = list(zip(texts, generation.to_dict("records"), strict=True))
    removed = sorted(
        ((t, row) for t, row in numbered if t.removed), key=lambda one: (str(one[1]["part"]), one[1]["layer"])
    )
    for place, members in groupby(removed, key=lambda one: one[0].removed):
        group = list(members)
        assert place is not None
        table = pd.DataFrame([row for _, row in group])
        numbers = {**_forced([text for text, _ in group], table, seed), **_means(table, seed), **_accuracies(table)}
        columns = {"part": place[0], "layer": place[1], "prompts": len(group)}
        for name, (value, low, high) in numbers.items():
            columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(columns | _by_item(table))
    return pd.DataFrame(rows)


Bounds = tuple[float, float, float]


def _forced(texts: Sequence[Written], table: pd.DataFrame, seed: int) -> dict[str, Bounds]:
    """Return what follows from reading the plain texts, and how writing freely compares."""
    n = len(texts)
    weights = np.concatenate([np.ones((1, n)), draw_counts(n, seed)])
    tokens = np.array([len(text.agrees) for text in texts], dtype=np.float64)
    agreed = np.array([text.agrees.sum() for text in texts])
    lost = np.array([text.delta_ce.sum() for text in texts])
    intact = np.array([text.diverged_at is None for text in texts])
    same = table["agreement"].to_numpy() * tokens
    read = weights @ tokens
    top1, free = weights @ agreed / read, weights @ same / read
    predicted = (weights * top1[:, None] ** tokens).sum(1) / n
    whole = weights @ intact / n
    at = np.where(intact, tokens, np.array([t.diverged_at or 0 for t in texts], dtype=np.float64))
    draws = {
        "delta_ce_forced": weights @ lost / read,
        "top1_agreement": top1,
        "predicted_intact": predicted,
        "intact": whole,
        "excess": whole - predicted,
        "median_divergence": median_survival(at, ~intact, weights),
        "agreement": free,
        "compounding": top1 - free,
    }
    bounds = {name: _bounds(values, n) for name, values in draws.items()}
    bounds["intact"] = (float(intact.mean()), *wilson(int(intact.sum()), n))
    return bounds


def _bounds(draws: Array, prompts: int) -> Bounds:
    """Return the first of the draws, which takes every prompt once, with the bounds of the others; these may be infinite."""
    if prompts < MIN_CLUSTERS:
        return float(draws[0]), np.nan, np.nan
    if np.isfinite(draws).all():
        low, high = percentiles(draws[1:], prompts)
    else:
        low, high = np.quantile(draws[1:], (0.025, 0.975), method="closest_observation")
    return float(draws[0]), float(low), float(high)


def _means(table: pd.DataFrame, seed: int) -> dict[str, Bounds]:
    bounds = {}
    for name in ("exact", "repetition", "ended", "tokens", "plain_ce"):
        values = table[name].to_numpy(dtype=np.float64)
        values = values[np.isfinite(values)]
        n = len(values)
        weights = np.concatenate([np.ones((1, n)), draw_counts(n, seed)]) if n else np.full((1, 0), np.nan)
        bounds[name] = _bounds(weights @ values / n, n) if n else (np.nan, np.nan, np.nan)
    bounds["exact"] = (bounds["exact"][0], *wilson(int(table["exact"].sum()), len(table)))
    return bounds


def _accuracies(table: pd.DataFrame) -> dict[str, Bounds]:
    bounds = {}
    for by in ("logits", "generated"):
        right = table[f"right_{by}"].dropna()
        bounds[f"accuracy_{by}"] = (float(right.mean()), *wilson(int(right.sum()), len(right)))
    return bounds


def _by_item(table: pd.DataFrame) -> dict[str, int]:
    known = table.dropna(subset=["right_logits", "right_generated"])
    logits, written = known["right_logits"] == 1, known["right_generated"] == 1
    return {
        "right_both": int((logits & written).sum()),
        "logits_only": int((logits & ~written).sum()),
        "generated_only": int((~logits & written).sum()),
        "right_neither": int((~logits & ~written).sum()),
    }


def enter_proxies(columns: Mapping[str, PerPrompt], generation: pd.DataFrame) -> None:
    """Enter what each removal costs in writing into the columns named `PROXIES` with the part behind them."""
    plain = generation[generation["part"] == "none"].set_index("prompt")["right_generated"]
    removed = generation[generation["part"] != "none"].astype({"layer": int})
    lost = {
        "diverged": removed["diverged_at"].notna().astype(float),
        "text_lost": 1 - removed["agreement"],
        "accuracy_drop": removed["prompt"].map(plain) - removed["right_generated"],
    }
    for name, column in columns.items():
        kind, _, part = name.rpartition("_")
        for layer in removed["layer"].unique() if kind in PROXIES else ():
            rows = (removed["part"] == part) & (removed["layer"] == layer)
            column.add(layer, removed["prompt"][rows].tolist(), torch.tensor(lost[kind][rows].to_numpy()))
