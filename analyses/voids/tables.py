"""Tables of the voids analysis, from a trace and from the rows that were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analyses.results.statistics import cluster_bootstrap
from analyses.tokens import token_text
from analyses.voids.early_exit import Readings
from analyses.voids.trace import Trace
from probes.models.protocol import Model


def activity(frame: pd.DataFrame, trace: Trace) -> pd.DataFrame:
    """One row per token and layer."""
    n_layers, n_tokens = trace.active.shape
    table = frame.loc[frame.index.repeat(n_layers)].reset_index(drop=True)
    table["layer"] = np.tile(np.arange(n_layers), n_tokens)
    columns = {"norm": trace.norms, "delta": trace.steps, "threshold": trace.thresholds, "active": trace.active}
    for name, values in columns.items():
        table[name] = values.T.reshape(-1).numpy()
    return table


def usage(frame: pd.DataFrame, trace: Trace, phases: Sequence[str], first_token: bool, seed: int) -> pd.DataFrame:
    """Per alpha, phase and layer: the share of tokens for which the layer is active, with a 95 % interval over prompts.

    `active_fraction_without_first` leaves out each prompt's first token, whose massive norm makes later layers void.
    """
    active = trace.active.T.numpy()
    first = (frame["token_class"] == "first").to_numpy()
    parts = []
    for (alpha, phase), group in frame.groupby(["alpha", "phase"], sort=False):
        if phase not in phases:
            continue
        rows = frame.index.get_indexer(group.index)
        counted = rows if first_token else rows[~first[rows]]
        interval = cluster_bootstrap(active[counted], frame["prompt"].to_numpy()[counted], seed=seed)
        others = active[rows[~first[rows]]]
        parts.append(
            pd.DataFrame(
                {
                    "alpha": alpha,
                    "phase": phase,
                    "layer": np.arange(active.shape[1]),
                    "active_fraction": interval.mean,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "active_fraction_without_first": others.mean(axis=0) if len(others) else np.nan,
                    "n_tokens": len(counted),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def void_rate(frame: pd.DataFrame, trace: Trace, seed: int) -> pd.DataFrame:
    """Per alpha and token class: the share of (token, layer) pairs that are void, with a 95 % interval over prompts."""
    void = 1 - trace.active.float().mean(dim=0).numpy()
    frame = frame.reset_index(drop=True)
    rows = []
    for (alpha, kind), group in frame.groupby(["alpha", "token_class"], sort=False):
        interval = cluster_bootstrap(void[group.index], group["prompt"], seed=seed)
        rows.append((alpha, kind, interval.mean[0], interval.low[0], interval.high[0], len(group)))
    return pd.DataFrame(rows, columns=["alpha", "token_class", "void_rate", "ci_low", "ci_high", "n_tokens"])


def exits_table(frame: pd.DataFrame, exits: np.ndarray, read: Readings, model: Model) -> pd.DataFrame:
    """Per scored position: what is read at the exit layer against what the full model says; KL in nats."""
    table = frame[["alpha", "prompt", "phase", "position"]].reset_index(drop=True)
    table["exit_layer"] = exits
    table["token_id"], table["token"] = read.top, [token_text(model, int(t)) for t in read.top]
    table["full_token_id"], table["full_token"] = read.full_top, [token_text(model, int(t)) for t in read.full_top]
    table["kl_to_full"], table["changed"] = read.kl, read.changed
    return table


def controls(frame: pd.DataFrame, used: np.ndarray, variants: Mapping[str, Readings], seed: int) -> pd.DataFrame:
    """Per alpha and variant: mean KL to the full model (nats) and share of changed predictions, with 95 % intervals."""
    alphas, prompts = frame["alpha"].to_numpy(), frame["prompt"].to_numpy()
    rows = []
    for variant, read in variants.items():
        for alpha in dict.fromkeys(alphas):
            chosen = alphas == alpha
            both = cluster_bootstrap(
                np.stack([read.kl[chosen], read.changed[chosen]], axis=1), prompts[chosen], seed=seed
            )
            ends = [value for triple in zip(both.mean, both.low, both.high, strict=True) for value in triple]
            rows.append((alpha, variant, used[chosen].mean(), *ends, int(chosen.sum())))
    names = ["kl_to_full", "kl_low", "kl_high", "changed", "changed_low", "changed_high", "n"]
    return pd.DataFrame(rows, columns=["alpha", "variant", "layers_used", *names])
