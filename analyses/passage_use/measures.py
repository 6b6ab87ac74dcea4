"""What is measured of each prompt at each layer, at the position that predicts the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.passage_use.items import Item
from analyses.similarity.divergence import jensen_shannon
from probes import edits
from probes.blocks.cached_prompt import CachedPrompt
from probes.capture.activations import Activations
from probes.edits import KnockOut
from probes.edits.attention import BlockedRows
from probes.lenses import logit
from probes.models.protocol import Model, Write
from probes.models.unembedding import logits_of
from probes.points import Address
from probes.reducers import Reducer

LAST = Reducer(positions="last")
Tick = Callable[[int], None]
TOGETHER = 8
"""Cuts of one prompt that are run together."""
READ_ROWS = 32
"""Pairs of rows whose log-probabilities are in memory at once."""


class LastRows:
    """What was captured at the last position of every prompt that is read."""

    def __init__(self, activations: Activations) -> None:
        self.model, self._activations = activations.model, activations
        self.n_layers = self.model.shape.n_layers
        self.patterns = self.model.refusal(Address("pattern", 0)) is None

    def at(self, point: str, layer: int) -> Float[Tensor, "prompt d_model"]:
        """Return a point's rows of all prompts."""
        return torch.cat(self._activations.get(Address(point, layer), LAST)).float()

    def pattern(self, layer: int) -> list[Float[Tensor, "head key"]]:
        """Return the attention of each prompt's last position."""
        return [rows[:, 0].float() for rows in self._activations.get(Address("pattern", layer), LAST)]

    def read(self, point: str, layer: int, prompts: Sequence[int]) -> Float[Tensor, "prompt d_vocab"]:
        """Return the log-probabilities that some prompts' rows have through the final norm and unembedding."""
        return logit.all_logprobs(self.at(point, layer)[list(prompts)], self.model.unembedding()).cpu()

    def changes(self, prompts: Sequence[int]) -> Float[Tensor, "layer prompt"]:
        """Return how far each MLP moves what some prompts' rows would predict: Jensen-Shannon divergences, nats.

        Rows of all layers are read together, few at a time, since a product with few rows costs most of one with many.
        """
        before, after = (
            torch.cat([self.at(point, layer)[list(prompts)] for layer in range(self.n_layers)])
            for point in ("resid_mid", "resid_post")
        )
        unembedding = self.model.unembedding()
        parts = []
        for some in zip(torch.split(before, READ_ROWS), torch.split(after, READ_ROWS), strict=True):
            read = logit.all_logprobs(torch.cat(some), unembedding)
            parts.append(jensen_shannon(*read.chunk(2)).cpu())
        return torch.cat(parts).view(self.n_layers, len(prompts))


def layer_table(
    rows: LastRows, items: Sequence[Item], losses: Mapping[tuple[int, int], float], tick: Tick
) -> pd.DataFrame:
    """Return every measure of every prompt at every layer.

    Args:
        losses: the knock-out losses by (prompt, layer).

    Returns:
        Columns prompt, layer, sim_hidden, sim_neutral, sim_noise (cosine of what the MLP adds with the passage and without it, with
        neutral text of its length, and with noise in its place; NaN where the MLP adds nothing), mass (mean over heads of
        the attention to the passage), diff_attn (of attention rows with and without the passage's scores, nats),
        diff_attn_propagated (the same between two runs, in the second of which nothing after the passage sees it in any block),
        iks (Jensen-Shannon divergence of the read-outs before and after the MLP, nats), knock_out_loss (nats; NaN at layers
        that were not swept).
    """
    full = [item.passage for item in items]
    propagated = _propagated(rows, items, tick) if rows.patterns else {}
    changes, records = rows.changes(full), []
    for layer in range(rows.n_layers):
        mlp = rows.at("mlp_out", layer)
        pattern = rows.pattern(layer) if rows.patterns else []
        for k, item in enumerate(items):
            mass = passage_mass(pattern[item.passage], item.span) if pattern else torch.tensor([torch.nan])
            records.append(
                {
                    "prompt": item.prompt, "layer": layer, "sim_hidden": cosine(mlp[item.passage], mlp[item.without]),
                    "sim_neutral": np.nan if item.neutral is None else cosine(mlp[item.passage], mlp[item.neutral]),
                    "sim_noise": np.mean([cosine(mlp[item.passage], mlp[i]) for i in item.noise]) if item.noise else np.nan,
                    "mass": float(mass.mean()), "diff_attn": float(masked_divergence(mass).mean()),
                    "diff_attn_propagated": propagated.get((item.prompt, layer), np.nan), "iks": float(changes[layer, k]),
                    "knock_out_loss": losses.get((item.prompt, layer), np.nan),
                }
            )  # fmt: skip
    return pd.DataFrame(records)


def cosine(a: Float[Tensor, " width"], b: Float[Tensor, " width"]) -> float:
    """Return the cosine of two rows; NaN where one is zero, which has no direction."""
    lengths = float(a.norm()) * float(b.norm())
    return float(a.double() @ b.double()) / lengths if lengths > 0 else float("nan")


def _propagated(rows: LastRows, items: Sequence[Item], tick: Tick) -> dict[tuple[int, int], float]:
    n_layers, divergences = rows.n_layers, {}
    plain = [rows.pattern(layer) for layer in range(n_layers)]
    for item in items:
        cut = _cut(range(n_layers), item, item.tokens)
        addresses = [Address("pattern", layer) for layer in range(n_layers)]
        blind = edits.read(rows.model, torch.tensor([item.tokens]), addresses, [cut] if cut else [])
        tick(1)
        for layer, address in enumerate(addresses):
            row = blind[address][0, :, -1].float().cpu()
            divergences[item.prompt, layer] = float(row_divergence(plain[layer][item.passage], row).mean())
    return divergences


def _cut(layers: Sequence[int], item: Item, tokens: Sequence[int]) -> KnockOut | None:
    """Return the edit under which nothing behind the passage sees it in some blocks; None for an empty passage."""
    keys = tuple(range(*item.span))
    return KnockOut(tuple(layers), queries=tuple(range(item.span[1], len(tokens))), keys=keys) if keys else None


@torch.no_grad()
def knock_out_losses(
    model: Model, item: Item, layers: Sequence[int], window: int, tick: Tick
) -> dict[tuple[int, int], float]:
    """Return how much the answer's log-probability falls where nothing behind the passage sees it in a window around each layer, nats.

    The prompt is run once; cuts resume behind the passage, several together, at the lowest block that one of them reaches.
    """
    n_layers, unembedding = model.shape.n_layers, model.unembedding()
    keys = tuple(range(*item.span))
    if not keys:
        return {(item.prompt, layer): 0.0 for layer in layers}
    prompt = CachedPrompt(model, item.tokens, item.span[1])
    tick(1)

    def answer(last: Tensor) -> Tensor:
        return logits_of(unembedding, last).float().log_softmax(-1)[:, item.answer].cpu()

    plain, losses = answer(prompt.entering[n_layers][-1:]), dict[tuple[int, int], float]()
    for first in range(0, len(layers), TOGETHER):
        part = layers[first : first + TOGETHER]
        blocks = [range(max(0, layer - window), min(n_layers, layer + window + 1)) for layer in part]
        rows: dict[Address, list[tuple[int, Write]]] = {}
        for row, own in enumerate(blocks):
            # Where only what is behind the passage runs, `all` names the queries that there are.
            for address, write in KnockOut(tuple(own), "all", keys).writes(model.shape, [len(item.tokens)]).items():
                rows.setdefault(address, []).append((row, write))
        cuts = {address: BlockedRows(tuple(placed)) for address, placed in rows.items()}
        blind = answer(prompt.edited(min(own.start for own in blocks), len(part), cuts))
        losses |= {(item.prompt, layer): float(loss) for layer, loss in zip(part, plain - blind, strict=True)}
        tick(len(part))
    return losses


def passage_mass(pattern: Float[Tensor, "head key"], span: tuple[int, int]) -> Float[Tensor, " head"]:
    """Return each head's attention to the positions of the passage."""
    return pattern[:, span[0] : span[1]].double().sum(-1).clamp(0, 1)


def masked_divergence(mass: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return the Jensen-Shannon divergence of an attention row from itself without a passage of this mass, nats.

    The row without the passage is the same row, the passage's scores at minus infinity and the rest grown to sum 1. So the
    mass alone decides: half of m log 2 + (1 - m) log(2(1 - m)/(2 - m)) + log(2/(2 - m)).
    """
    mass = mass.double()
    kept = torch.special.xlogy(1 - mass, 2 * (1 - mass) / (2 - mass))
    return ((mass * log(2) + kept + torch.log(2 / (2 - mass))) / 2).clamp(0, log(2))


def row_divergence(a: Float[Tensor, "head key"], b: Float[Tensor, "head key"]) -> Float[Tensor, " head"]:
    """Return the Jensen-Shannon divergence of two attention rows of each head, nats."""
    return jensen_shannon(a.double().log(), b.double().log())
