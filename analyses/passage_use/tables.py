"""The measures over all prompts, the layer that the read-out changes least at, and what the passage does for the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analyses.passage_use.items import Item
from analyses.passage_use.measures import LastRows
from analyses.results.statistics import MIN_CLUSTERS, cluster_bootstrap
from analyses.tokens import token_text

MEASURES = (
    "sim_hidden",
    "sim_neutral",
    "sim_noise",
    "mass",
    "diff_attn",
    "diff_attn_propagated",
    "iks",
    "knock_out_loss",
)


def means_table(layers: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return each measure's mean over prompts by layer: measure, layer, mean, low, high (95 % over prompts), prompts.

    `sim_drop` is sim_neutral minus sim_hidden of the same prompt: how much more what the MLP adds turns without the passage
    than with other text in its place.
    """
    layers = layers.assign(sim_drop=layers["sim_neutral"] - layers["sim_hidden"])
    records = []
    for measure in (*MEASURES, "sim_drop"):
        for layer, rows in layers.dropna(subset=[measure]).groupby("layer"):
            interval = cluster_bootstrap(rows[measure], rows["prompt"], seed=seed)
            records.append((measure, layer, interval.mean[0], interval.low[0], interval.high[0], len(rows)))
    return pd.DataFrame(records, columns=["measure", "layer", "mean", "low", "high", "prompts"])


def chosen_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the layer of the second half whose MLP changes each prompt's read-out least: prompt, layer, iks."""
    late = layers[layers["layer"] >= (layers["layer"].max() + 1) // 2]
    return late.loc[late.groupby("prompt")["iks"].idxmin(), ["prompt", "layer", "iks"]].reset_index(drop=True)


def prompt_table(rows: LastRows, items: Sequence[Item]) -> pd.DataFrame:
    """Return what the passage does for the answer.

    Returns:
        Columns prompt, answer, tokens, first, end (the passage's positions), logprob (of the answer, nats), correct (whether it is the
        most probable token), logprob_without, correct_without, logprob_neutral, logprob_noise (mean over noise passages).
    """
    final = rows.n_layers - 1
    records = []
    for item in items:
        variants = [item.passage, item.without, *([] if item.neutral is None else [item.neutral]), *item.noise]
        read = rows.read("resid_post", final, variants)
        logprobs, best = read[:, item.answer].tolist(), (read.argmax(-1) == item.answer).tolist()
        neutral = item.neutral is not None
        records.append(
            {
                "prompt": item.prompt, "answer": token_text(rows.model, item.answer), "tokens": len(item.tokens),
                "first": item.span[0], "end": item.span[1], "logprob": logprobs[0], "correct": best[0],
                "logprob_without": logprobs[1], "correct_without": best[1],
                "logprob_neutral": logprobs[2] if neutral else np.nan,
                "logprob_noise": float(np.mean(logprobs[2 + neutral :])) if item.noise else np.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(records)


def notes_of(means: pd.DataFrame, window: int) -> list[str]:
    """Return what the intervals say: where the answer needs the passage, and that mass alone is not use."""
    notes = []
    losses = means[means["measure"] == "knock_out_loss"].set_index("layer")
    if len(losses) and losses["prompts"].max() >= MIN_CLUSTERS:
        sure = losses[losses["low"] > 0]
        if sure.empty:
            notes.append(
                "No window of blocks, blind to the passage, lowers the answer's log-probability with an interval above 0."
            )
        else:
            place = int(sure["mean"].to_numpy().argmax())
            top, row = sure.index[place], sure.iloc[place]
            near = ", ".join(str(layer) for layer in sure.index[sure["high"] >= row["low"]] if layer != top)
            notes.append(
                f"Without a view of the passage around block {top} (windows of {2 * window + 1}) the answer loses most, {row['mean']:.2f} nats "
                f"[{row['low']:.2f}, {row['high']:.2f}]; {'not told from it: ' + near if near else 'no other interval reaches it'}. "
                f"Intervals lie above 0 at {len(sure)} of {len(losses)} blocks, below at {int((losses['high'] < 0).sum())}."
            )
            notes += _mass_note(means, losses)
    elif len(losses):
        notes.append(f"{losses['prompts'].max()} prompts: too few for intervals, so nothing is claimed.")
    drops = means[means["measure"] == "sim_drop"]
    if len(drops) and drops["prompts"].max() >= MIN_CLUSTERS:
        notes.append(
            f"What the MLP adds turns more without the passage than with neutral text in its place at {int((drops['low'] > 0).sum())} of "
            f"{len(drops)} blocks, less at {int((drops['high'] < 0).sum())} (intervals of the paired difference)."
        )
    return notes


def _mass_note(means: pd.DataFrame, losses: pd.DataFrame) -> list[str]:
    rows = means[means["measure"] == "mass"]
    mass, low = dict(zip(rows["layer"], rows["mean"], strict=True)), losses["low"].to_dict()
    highest = max(mass, key=mass.__getitem__, default=None)
    if highest not in low or low[highest] > 0:
        return []
    return [
        f"Attention to the passage is largest at block {highest}, where cutting it is not told from no loss: mass is not use."
    ]
