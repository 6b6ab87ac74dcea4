"""How many forwards the measurements runs with something changed, by what is changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analyses.depth_use.bits_frontier import runs
from analyses.depth_use.contributions import PARTS
from analyses.depth_use.generation import steps
from analyses.depth_use.greedy import N_ORDERS
from analyses.depth_use.settings import Settings
from analyses.depth_use.skips import positions_of
from analyses.depth_use.tokens import erased_positions
from analyses.depth_use.weights import normed_layers
from probes.blocks.rerouting import module_of
from probes.models.protocol import Model
from probes.prompts import Prompt

Forwards = dict[str, int]


def forwards(model: Model, prompts: Sequence[Prompt], settings: Settings) -> Forwards:
    """Count every sequence that restarts at a changed block, by what is changed."""
    return {
        **measured(model, len(prompts), settings),
        **skipped(model, prompts, settings),
        **removed(model, prompts, settings),
        **per_token(model, prompts, settings),
        **steps(len(prompts[: settings.generate_prompts]), settings, model.shape.n_layers),
    }


def measured(model: Model, n: int, settings: Settings) -> Forwards:
    """Count the forwards of what enters the proxies, on all `n` prompts."""
    n_layers = model.shape.n_layers
    layers = settings.swept(n_layers)
    with module_of(model) as (_, anatomy):
        norms = len(set(layers) & set(normed_layers(anatomy, n_layers)))
    everywhere = settings.skip_rule == "everywhere"  # then a removal is also the skip
    windows = sum(layer + width <= n_layers for width in settings.windows for layer in layers)
    return {
        "removals": n * len(PARTS) * len(layers),
        "skips": 0 if everywhere else n * len(settings.parts) * len(layers),
        "rounded blocks": n * len(settings.bits) * len(layers),
        "frozen norms": n * norms,
        "windows": n * windows * (1 + settings.window_pairs),
    }


def skipped(model: Model, prompts: Sequence[Prompt], settings: Settings) -> Forwards:
    """Count the forwards of future and local skips, on the prompts that can be split."""
    n_layers, chosen, parts = model.shape.n_layers, settings.split_prompts(prompts), len(settings.parts)
    layers = settings.swept(n_layers)
    splits = sum(len(positions_of(i, len(prompts[i].tokens), settings.split_positions, settings.seed)) for i in chosen)
    later = sum(n_layers - 1 - layer for layer in layers)
    return {"skips before a split": splits * parts * len(layers), "local skips": len(chosen) * parts * later}


def removed(model: Model, prompts: Sequence[Prompt], settings: Settings) -> Forwards:
    """Count the forwards of several parts removed or rounded, in the order of a proxy and greedily."""
    n_layers = model.shape.n_layers
    places, rounds = 2 * len(settings.swept(n_layers)), settings.greedy_rounds(n_layers)
    known = settings.greedy_distance == "jsd"  # then the removals have told the first round
    tried = sum(places - n for n in range(1 if known else 0, rounds))
    chosen = len(settings.first(settings.greedy_prompts, prompts))
    return {
        "removal curves": len(prompts) * N_ORDERS * settings.dropped(n_layers),
        "greedy removals": chosen * (tried + rounds),
        "widths": len(prompts) * runs(len(settings.swept(n_layers)), settings.frontier_points),
    }


def per_token(model: Model, prompts: Sequence[Prompt], settings: Settings) -> Forwards:
    """Count the forwards of erased tokens and integrated gradients."""
    layers = len(settings.swept(model.shape.n_layers))
    lengths = np.array([len(prompt.tokens) for prompt in prompts])
    erased = [len(erased_positions(int(n))) for n in lengths[settings.first(settings.erasure_prompts, prompts)]]
    along = len(settings.first(settings.gradient_prompts, prompts)) * (settings.gradient_steps + 2)
    return {"erased tokens": sum(erased) * layers, "gradients": along * len(settings.parts) * layers}
