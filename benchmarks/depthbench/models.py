"""One training a model of the trained tier: what it learns, and what keeps it to a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from benchmarks.depthbench.enforce import freeze_attention, freeze_mlps
from probes.planted import trained_prompts as data
from probes.planted.trained import untrained

BATCH, MOST_STEPS = 128, 4000
FACTS = torch.cartesian_prod(torch.arange(data.ENTITIES), torch.arange(data.RELATIONS))


@dataclass(frozen=True)
class Trained:
    """A model after training, and how training ended."""

    module: Any
    steps: int
    losses: Mapping[str, float]


Losses = Mapping[str, Tensor]


def descend(
    module: Any,
    losses: Callable[[], Losses],
    *,
    lr: float = 2e-3,
    most_steps: int = MOST_STEPS,
    enough: float = 0.01,
    after_step: Callable[[], None] = lambda: None,
    also: tuple[nn.Parameter, ...] = (),
    weights: Mapping[str, float] | None = None,
) -> Trained:
    """Train until the running mean of every loss is below `enough`, the rate falling along a cosine."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW([*parameters, *also], lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, step / 50) * (0.55 + 0.45 * torch.tensor(torch.pi * step / most_steps).cos().item()),
    )
    means: dict[str, float] = {}
    for step in range(1, most_steps + 1):
        parts = losses()
        loss = sum((part * (weights or {}).get(name, 1.0) for name, part in parts.items()), torch.zeros(()))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        after_step()
        for name, part in parts.items():
            means[name] = 0.9 * means.get(name, 2.0) + 0.1 * part.item()
        if step % 100 == 0:
            print(step, {name: round(value, 4) for name, value in means.items()}, flush=True)
        if max(means.values()) < enough:
            break
    return Trained(module.eval().requires_grad_(False), step, means)


def induction(seed: int = 0) -> Trained:
    """T1: attention only, two layers of two heads, repeated sequences of varying period: it takes two layers."""
    module = untrained("T1", seed)
    freeze_mlps(module, keep=())
    draw = torch.Generator().manual_seed(seed)

    def losses() -> Losses:
        period = int(torch.randint(4, 11, (1,), generator=draw))
        tokens = data.repeated(64, period, draw)
        logits = module(tokens, use_cache=False).logits[:, period:-1]
        return {"answer": nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, period + 1 :].flatten())}

    return descend(module, losses, lr=1e-2, most_steps=600, enough=0.02)


def answers(table: Int[Tensor, "e r"], pairs: Int[Tensor, "batch 2"]) -> Int[Tensor, "batch"]:
    """The tokens of the values of entity and relation numbers."""
    return table[pairs[:, 0], pairs[:, 1]] + data.FIRST_ANSWER


def batch(draw: torch.Generator, rows: int = BATCH) -> Int[Tensor, "batch 2"]:
    """Facts drawn at random."""
    return FACTS[torch.randint(len(FACTS), (rows,), generator=draw)]


def last_logits(module: Any, tokens: Int[Tensor, "batch pos"]) -> Tensor:
    return module(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]


def facts(seed: int = 2) -> Trained:
    """T2: all MLPs but that of block 3 are zero, and heads of blocks above 4 rest."""
    module, table, draw = untrained("T2", seed), data.latin_square(16, 4, seed), torch.Generator().manual_seed(seed)
    freeze_mlps(module, keep=(3,))
    freeze_attention(module, keep=range(5))

    def losses() -> Losses:
        pairs = batch(draw)
        logits = last_logits(module, data.fact_prompts(pairs, draw))
        return {"answer": nn.functional.cross_entropy(logits, answers(table, pairs))}

    return descend(module, losses)


def redrawn_labels(seed: int = 8) -> Trained:
    """T8: as T2, with labels drawn anew every epoch of 256 facts, so that there is nothing to learn."""
    module, draw = untrained("T8", seed), torch.Generator().manual_seed(seed)
    freeze_mlps(module, keep=(3,))
    freeze_attention(module, keep=range(5))
    queue: list[tuple[Tensor, Tensor]] = []

    def losses() -> Losses:
        if not queue:
            labels = torch.randint(data.ANSWERS, (len(FACTS),), generator=draw) + data.FIRST_ANSWER
            order = torch.randperm(len(FACTS), generator=draw)
            queue.extend((FACTS[part], labels[part]) for part in order.split(BATCH))
        pairs, labels = queue.pop()
        logits = last_logits(module, data.fact_prompts(pairs, draw))
        return {"answer": nn.functional.cross_entropy(logits, labels)}

    return descend(module, losses, most_steps=400)
