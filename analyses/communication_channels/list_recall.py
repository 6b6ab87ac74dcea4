"""Recall from a list against its length: plain, with an edited weight, and steered in a three-dimensional subspace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.answers import continuation
from analyses.communication_channels.edits import head_factors, head_output
from analyses.results.statistics import wilson
from analyses.tasks.laundry_list import Laundry
from probes.blocks.cached_prompt import CachedPrompt
from probes.edits import HeadWriteEdit, altered
from probes.lenses import logit
from probes.models.protocol import Model, Write
from probes.points import Address
from probes.prompts import tokenize
from probes.weights.composition import Heads

Rate = tuple[int, str, str, int, float, float, float]
"""(items, variant, scoring, prompts, accuracy and its interval)."""


@dataclass(frozen=True, eq=False)
class Dial:
    """A direction along which what a head writes at the end of a prompt is set."""

    layer: int
    head: int
    direction: Tensor
    """v [d_model], a unit vector inside what the head can write."""


@dataclass(frozen=True, eq=False)
class Listed:
    """A laundry prompt as the model sees it."""

    prompt: Laundry
    tokens: tuple[int, ...]
    items: Tensor
    """[N], the items' tokens."""


def listed(model: Model, prompts: Sequence[Laundry]) -> list[Listed]:
    """Return the prompts whose items are one token each."""
    lists = []
    for prompt in prompts:
        ids = [continuation(model.tokenizer, prompt.text, f" {item}") for item in prompt.items]
        if all(len(i) == 1 for i in ids):
            tokens = tokenize([prompt.text], model)[0].tokens
            lists.append(Listed(prompt, tokens, torch.tensor([i[0] for i in ids])))
    return lists


@torch.no_grad()
def choices(
    model: Model, last: Float[Tensor, "row d_model"], items: Int[Tensor, " item"]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (index of the likeliest item, most probable token) for rows of the last stream."""
    unembedding = model.unembedding()
    hidden = logit.normalized(last, unembedding)
    item = logit.token_logits(hidden, unembedding, items).argmax(-1)
    return item.cpu().numpy(), logit.read(last, unembedding, top_k=1).top_ids[:, 0].cpu().numpy()


def steering_grid(steps: int, reach: Sequence[float]) -> Float[Tensor, "point dial"]:
    """Return every combination of `steps` values from -reach to reach of each dial."""
    axes = [torch.linspace(-r, r, steps).tolist() for r in reach]
    return torch.tensor(list(itertools.product(*axes)))


def steered(
    prompt: CachedPrompt, heads: Heads, dials: Sequence[Dial], points: Float[Tensor, "point dial"]
) -> Float[Tensor, "point d_model"]:
    """Return what leaves the last block when each dial is set to its coordinate of each point."""
    writes: dict[Address, Write] = {}
    for layer in dict.fromkeys(dial.layer for dial in dials):
        here = [(dial, points[:, i]) for i, dial in enumerate(dials) if dial.layer == layer]
        writes[Address("z", layer)] = _set(heads, here)
    return prompt.edited(min(dial.layer for dial in dials), len(points), writes)


def _set(heads: Heads, dials: Sequence[tuple[Dial, Tensor]]) -> Write:
    def edit(z: Tensor) -> Tensor:
        out = z.clone()
        for dial, values in dials:
            read, write = head_factors(heads.w_o[dial.layer, dial.head], dial.direction[None])
            own = out[:, -1, dial.head].float()
            amount = values.to(own) - (own @ read[0].to(own))
            out[:, -1, dial.head] = (own + amount[:, None] * write[0].to(own)).to(z.dtype)
        return out

    return edit


def reach_of(prompts: Sequence[CachedPrompt], heads: Heads, dials: Sequence[Dial]) -> list[float]:
    """Return three times the 99th percentile of each dial's own size over the prompts."""
    sizes = []
    for dial in dials:
        outputs = torch.stack([head_output(prompt, dial.layer, dial.head) for prompt in prompts])
        own = outputs @ heads.w_o[dial.layer, dial.head] @ dial.direction
        sizes.append(3 * float(own.abs().quantile(0.99)))
    return sizes


def held_out_correct(chosen: NDArray[np.int64], answer: NDArray[np.int64], n_items: int) -> NDArray[np.bool_]:
    """Return, per held-out prompt, whether it is answered at the grid point chosen on the other prompts.

    The point is the one that is best for prompts whose answer has the same place in the list.

    Of the prompts of each place, pairs go in turn to either part, so that both have both wordings.

    Args:
        chosen: [prompts, points], the index of the item chosen at each point.
        answer: [prompts], the right index.
    """
    right = chosen == answer[:, None]
    correct = []
    for place in range(n_items):
        at_place = np.flatnonzero(answer == place)
        first = (np.arange(len(at_place)) // 2) % 2 == 0
        fit, test = at_place[first], at_place[~first]
        if len(fit) and len(test):
            correct.append(right[test, int(right[fit].mean(0).argmax())])
    return np.concatenate(correct) if correct else np.zeros(0, dtype=bool)


def forwards(by_length: Mapping[int, Sequence[Listed]], dials: Mapping[str, int], steps: int) -> int:
    """Count the rows that `run` runs with so many dials per name.

    Every prompt is run as it is, with the weight edit, and at every point of each grid; the prompts of the first length once
    more for each dial.
    """
    first = len(next(iter(by_length.values()), ()))
    each = 2 + sum(steps**n for n in dials.values())
    return sum(map(len, by_length.values())) * each + first * sum(dials.values())


def run(
    model: Model,
    heads: Heads,
    by_length: Mapping[int, Sequence[Listed]],
    dials: Mapping[str, Sequence[Dial]],
    steps: int,
    tick: Callable[[int], None],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (accuracy by length and variant, the choice at every grid point of the channel's dials).

    Args:
        dials: `channel` and its control `random`, three each; the first of `channel` is also removed from the weights.
    """
    rows: list[Rate] = []
    points_seen = []
    reach: dict[str, list[float]] = {}
    for n_items, prompts in by_length.items():
        cached = [CachedPrompt(model, prompt.tokens, -1) for prompt in prompts]
        tick(len(cached))
        answer = np.array([p.prompt.missing for p in prompts])
        plain = [choices(model, h.entering[-1][-1:], p.items) for h, p in zip(cached, prompts, strict=True)]
        rows += _scores(
            n_items, "plain", np.array([c[0][0] for c in plain]), np.array([c[1][0] for c in plain]), prompts
        )
        rows += _weight_edit(model, n_items, prompts, dials["channel"][0])
        tick(len(prompts))
        for name, three in dials.items():
            if name not in reach:
                reach[name] = reach_of(cached, heads, three)
                tick(len(cached) * len(three))
            grid = steering_grid(steps, reach[name])
            chosen = np.stack(
                [
                    choices(model, steered(h, heads, three, grid), p.items)[0]
                    for h, p in zip(cached, prompts, strict=True)
                ]
            )
            tick(len(cached) * len(grid))
            rows.append(_rate(n_items, f"oracle, {name}", "items", (chosen == answer[:, None]).any(1)))
            rows.append(_rate(n_items, f"held out, {name}", "items", held_out_correct(chosen, answer, n_items)))
            if name == "channel":
                places = [np.bincount(chosen[:, i], minlength=n_items) for i in range(len(grid))]
                frame = pd.DataFrame(grid.numpy(), columns=[f"beta_{i + 1}" for i in range(grid.shape[1])])
                shares = [float(p.max() / p.sum()) for p in places]
                points_seen.append(frame.assign(n_items=n_items, item=[int(p.argmax()) for p in places], share=shares))
    columns = ["n_items", "variant", "scoring", "n", "accuracy", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns), pd.concat(points_seen, ignore_index=True)


def _weight_edit(model: Model, n_items: int, prompts: Sequence[Listed], dial: Dial) -> list[Rate]:
    from probes.edits import Values, read

    edit = HeadWriteEdit(dial.layer, dial.head, Values(dial.direction[None]))
    address = Address("resid_post", model.shape.n_layers - 1)
    items, tokens = [], []
    with altered(model, [edit]):
        for prompt in prompts:
            last = read(model, torch.tensor([prompt.tokens]), [address])[address][0, -1:]
            item, token = choices(model, last, prompt.items)
            items.append(item[0])
            tokens.append(token[0])
    return _scores(n_items, "weight edit", np.array(items), np.array(tokens), prompts)


def _scores(
    n_items: int, variant: str, items: NDArray[np.int64], tokens: NDArray[np.int64], prompts: Sequence[Listed]
) -> list[Rate]:
    missing = np.array([p.prompt.missing for p in prompts])
    answers = np.array([int(p.items[p.prompt.missing]) for p in prompts])
    return [
        _rate(n_items, variant, "items", items == missing),
        _rate(n_items, variant, "vocabulary", tokens == answers),
    ]


def _rate(n_items: int, variant: str, scoring: str, right: NDArray[np.bool_]) -> Rate:
    low, high = wilson(int(right.sum()), len(right))
    return n_items, variant, scoring, len(right), float(right.mean()) if len(right) else float("nan"), low, high
