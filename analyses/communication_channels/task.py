"""The task on whose prompts channels are edited: indirect objects, and lists to recall from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch

from analyses.communication_channels import list_recall
from analyses.communication_channels.edits import (
    Names,
    beaten,
    effect_table,
    name_token,
    open_prompts,
    pair_effects,
    pair_forwards,
    spots,
    standard_changes,
)
from analyses.communication_channels.scan import PAIR, Scan, pair_circuits, ranked
from analyses.interventions import Tally
from analyses.options import option
from analyses.results.statistics import cluster_bootstrap, wilson
from analyses.tasks import ioi, laundry_list
from probes.errors import OptionError
from probes.lenses import logit
from probes.models.protocol import Model
from probes.points import Address
from probes.weights.composition import Heads

ALPHAS = (-2.0, -1.0, 0.5, 2.0, 4.0)
"""Factors of the sweep of a component's size, beside 0 and 1."""
DIALS = 3
"""Channels steered together, at most."""


@dataclass(frozen=True)
class Settings:
    """The options of `CommunicationChannels` that the task follows; it has them among its own."""

    task: Literal["ioi", "none"] = option("ioi", "ioi: also edit channels on generated prompts; none: weights only.")
    n_prompts: int = option(40, "ioi: how many prompts are generated.", low=2, aliases=("task_prompts",))
    edit_pairs: int = option(
        2, "ioi: query channels edited, half by rank, half into the head that finds the name.", low=1
    )
    random_directions: int = option(32, "ioi: control directions inside what the head can write.", low=1)
    laundry_items: tuple[int, ...] = option((2, 3, 4, 6), "Lengths of the lists to recall from.", low=2, high=20)
    laundry_prompts: int = option(4, "Lists per length and place of the answer; 0 leaves the task out.", low=0)
    steer_steps: int = option(3, "Values of each of the three steered coefficients.", low=2, high=15)
    heads: tuple[str, ...] = option(
        (), "ioi: writing heads, as layer.head, whose channels are edited; none: those of all heads are ranked."
    )
    stride: int = option(1, "ioi: every how many singular components of an edited head one is set to zero.", low=1)
    seed: int = option(0, "Seed of prompts, controls and intervals.")


def parse_heads(heads: Sequence[str]) -> list[tuple[int, int]]:
    """Read (layer, head) from texts such as 4.7.

    Raises:
        OptionError: a text that names no head.
    """
    pairs = []
    for text in heads:
        layer, dot, head = text.partition(".")
        if not (dot and layer.isdecimal() and head.isdecimal() and len(text) < 12):
            raise OptionError(f"option heads: {text[:40]!r} names no head; write layer.head, such as 4.7")
        pairs.append((int(layer), int(head)))
    return pairs


def check_heads(heads: Sequence[str], model: Model) -> None:
    """Check that each of `heads` can write to a later one.

    Raises:
        OptionError: a head that the model does not have, or one of its last layer.
    """
    layers, per_layer = model.shape.n_layers - 1, model.shape.n_heads
    for layer, head in parse_heads(heads):
        if layer >= layers or head >= per_layer:
            raise OptionError(
                f"option heads: {layer}.{head} writes to no later head; legal are 0 to {layers - 1} and 0 to {per_layer - 1}"
            )


def prompts_of(model: Model, settings: Settings) -> list[ioi.Ioi]:
    """Generate indirect-object prompts with names of one token each."""
    return ioi.sample(settings.n_prompts, settings.seed, lambda name: name_token(model, name) is not None)


def lists_of(model: Model, settings: Settings) -> dict[int, list[list_recall.Listed]]:
    """Generate, per length, lists to recall from, with items of one token each."""

    def single(item: str) -> bool:
        return name_token(model, item) is not None

    return {
        n: list_recall.listed(model, laundry_list.sample(n, settings.laundry_prompts, settings.seed, keeps=single))
        for n in dict.fromkeys(settings.laundry_items)
    }


def most_forwards(model: Model, settings: Settings) -> dict[str, int]:
    """Count the rows that are run at most, by what is done: fewer where the scan names fewer pairs."""
    n, d_head = len(spots(model, prompts_of(model, settings))), model.shape.d_head
    components = len(range(0, d_head, settings.stride)) + (settings.stride > 1)
    changes = components + settings.random_directions + len(ALPHAS)
    counts = {"prompts run": 2 * n, "edited channels": settings.edit_pairs * pair_forwards(n, changes)}
    if settings.laundry_prompts:
        dials = {"channel": DIALS, "random": DIALS}
        counts["steered lists"] = list_recall.forwards(lists_of(model, settings), dials, settings.steer_steps)
    return counts


def edit_channels(
    model: Model, heads: Heads, scans: Sequence[Scan], table: pd.DataFrame, settings: Settings, tally: Tally
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, int]:
    """Return (tables `task`, `edits`, `rank`; the pairs edited; how many tokens the prompts have)."""
    examples = prompts_of(model, settings)
    tally.start(2 * len(spots(model, examples)), "prompt")
    prompts = open_prompts(model, examples)
    mover, attention = mover_head(model, prompts)
    tally.tick(2 * len(prompts))
    chosen = _pairs(table, mover, settings)
    changes = []
    for _, pair in chosen.iterrows():
        source, _ = pair_circuits(heads, scans, pair)
        random = settings.random_directions
        changes.append(standard_changes(source, int(pair["component"]), settings.stride, random, ALPHAS, settings.seed))
    tally.start(sum(pair_forwards(len(prompts), len(each)) for each in changes), "edited channel")
    effects, ranks = [], []
    for (_, pair), each in zip(chosen.iterrows(), changes, strict=True):
        source, _ = pair_circuits(heads, scans, pair)
        component = int(pair["component"])
        measured, sizes = pair_effects(prompts, heads, pair, each, tally.tick)
        effects.append(effect_table(measured, pair, PAIR, settings.seed))
        shares = beaten(effects[-1], component)
        ranks.append(
            {
                **{name: pair[name] for name in PAIR}, "component": component, "z": pair["z"],
                "components_beaten": shares["components"], "directions_beaten": shares["directions"],
                **matched(source.svd[1], sizes, component),
            }
        )  # fmt: skip
    tables = {
        "task": task_table(prompts, mover, attention, settings.seed),
        "edits": pd.concat(effects, ignore_index=True),
        "rank": pd.DataFrame(ranks),
    }
    return tables, chosen, sum(len(names.cached.tokens) for names in prompts)


def _pairs(table: pd.DataFrame, mover: tuple[int, int], settings: Settings) -> pd.DataFrame:
    """Choose query channels to edit: half by rank, half into the head that finds the name.

    Where the option names writing heads, their channels alone are chosen from.
    """
    if heads := parse_heads(settings.heads):
        sources = zip(table["source_layer"], table["source_head"], strict=True)
        table = table[[source in heads for source in sources]]
    n = (settings.edit_pairs + 1) // 2
    by_rank, into_mover = ranked(table, "q").head(n), ranked(table, "q", mover).head(settings.edit_pairs - n)
    return pd.concat([by_rank, into_mover]).drop_duplicates(PAIR)


def steer_lists(
    model: Model,
    heads: Heads,
    scans: Sequence[Scan],
    table: pd.DataFrame,
    edited: pd.DataFrame,
    settings: Settings,
    tally: Tally,
) -> dict[str, pd.DataFrame]:
    """Return the tables `laundry` and `steering`: recall from lists, plain, with a weight edited, and steered."""
    mover = edited.iloc[-1]
    into = ranked(table, "q", (int(mover["target_layer"]), int(mover["target_head"]))).head(DIALS)
    channel, control = [], []
    generator = torch.Generator().manual_seed(settings.seed)
    for _, pair in into.iterrows():
        source, _ = pair_circuits(heads, scans, pair)
        layer, head = int(pair["source_layer"]), int(pair["source_head"])
        write = source.svd[2]
        channel.append(list_recall.Dial(layer, head, write[int(pair["component"])]))
        mixed = torch.randn(len(write), generator=generator) @ write
        control.append(list_recall.Dial(layer, head, mixed / mixed.norm()))
    by_length, dials = lists_of(model, settings), {"channel": channel, "random": control}
    sizes = {name: len(each) for name, each in dials.items()}
    tally.start(list_recall.forwards(by_length, sizes, settings.steer_steps), "steered list")
    accuracy, steering = list_recall.run(model, heads, by_length, dials, settings.steer_steps, tally.tick)
    return {"laundry": accuracy, "steering": steering}


def mover_head(model: Model, prompts: Sequence[Names]) -> tuple[tuple[int, int], np.ndarray]:
    """Find the head that attends most, at the end, to the indirect object rather than the subject.

    Returns:
        The head as (layer, head), and that difference for every head, [layer, head].
    """
    n_layers, n_heads = model.shape.n_layers, model.shape.n_heads
    total = np.zeros((n_layers, n_heads))
    for names in prompts:

        def keep(layer: int, names: Names = names):  # type: ignore[no-untyped-def]
            def read(pattern: torch.Tensor) -> None:
                row = pattern[0, :, -1].float().cpu().numpy()
                total[layer] += (row[:, names.io_at] - row[:, names.s_at]) / len(prompts)

            return read

        names.cached.edited(0, 1, {}, {Address("pattern", layer): keep(layer) for layer in range(n_layers)})
    later = total[1:]
    layer, head = np.unravel_index(int(later.argmax()), later.shape)
    return (int(layer) + 1, int(head)), total


def matched(singular: torch.Tensor, sizes: pd.DataFrame, component: int) -> dict[str, int]:
    """Return the other components nearest to the chosen one in singular value, and in the mean size of their coefficient."""
    s = (singular - singular[component]).abs()
    s[component] = torch.inf
    size = sizes["coefficient"].abs().groupby(sizes["component"]).mean()
    distance = (size - size[component]).abs()
    distance[component] = np.inf
    return {"matched_singular_value": int(s.argmin()), "matched_coefficient": int(distance.idxmin())}


@torch.no_grad()
def task_table(prompts: Sequence[Names], mover: tuple[int, int], attention: np.ndarray, seed: int) -> pd.DataFrame:
    """Return how well the model does the task: accuracy, logit difference, and the attention of the head that finds the name."""
    difference, solved = [], []
    for names in prompts:
        unembedding = names.cached.model.unembedding()
        hidden = logit.normalized(names.cached.entering[-1][-1:], unembedding)
        io, s = logit.token_logits(hidden, unembedding, torch.tensor([names.io, names.s]))[0].tolist()
        difference.append(io - s)
        solved.append(io > s)
    mean = cluster_bootstrap(difference, range(len(prompts)), seed=seed)
    low, high = wilson(sum(solved), len(solved))
    return pd.DataFrame(
        [
            ("accuracy", float(np.mean(solved)), low, high, len(prompts)),
            ("logit_difference", mean.mean[0], mean.low[0], mean.high[0], len(prompts)),
            (
                f"attention of {mover[0]}.{mover[1]} to the indirect object minus the subject",
                attention[mover],
                *(np.nan,) * 2,
                len(prompts),
            ),
        ],
        columns=["measure", "value", "ci_low", "ci_high", "n"],
    )
