"""MLPs and stream positions compared: every method's scores beside the measured effect of mean ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analyses.contextual_decomposition.gradient_scores import GradientScores
from analyses.contextual_decomposition.node_effects import mlp_ablation, stream_ablation
from analyses.contextual_decomposition.prepared_cases import PreparedCases, same_form
from analyses.results.statistics import Array, cluster_bootstrap
from probes.progress import Progress


@dataclass(frozen=True, eq=False)
class Compared:
    """Nodes of one kind with every method's scores and controls [prompt, node]; `effects` where they were measured."""

    places: pd.DataFrame
    """A row for each node: layer, and position where nodes are at one."""
    scores: Mapping[str, Array]
    controls: Mapping[str, Array]
    effects: Array | None

    @property
    def forwards(self) -> int:
        """How many forwards measured the effects."""
        return 0 if self.effects is None else self.effects.size

    def table(self, seed: int) -> pd.DataFrame:
        """Return the places and for each method, and `ablation`, its mean over prompts, `_low` and `_high`.

        The decomposition's mean is `score`, its bounds ci_low and ci_high.
        """
        every = {**self.scores, **({} if self.effects is None else {"ablation": self.effects})}
        columns: dict[str, pd.Series | Array] = {str(name): column for name, column in self.places.items()}
        for name, values in every.items():
            interval = cluster_bootstrap(values, np.arange(len(values)), seed=seed)
            names = ("score", "ci_low", "ci_high") if name == "cdt" else (name, f"{name}_low", f"{name}_high")
            columns |= dict(zip(names, (interval.mean, interval.low, interval.high), strict=True))
        return pd.DataFrame(columns)


def compared_mlps(
    prepared: PreparedCases,
    layers: Sequence[int],
    cdt: Array,
    gradients: GradientScores,
    ablation: bool,
    progress: Progress,
) -> Compared:
    """Compare the MLPs of some layers.

    Args:
        cdt: the decomposition's scores, [prompt, layer].
        gradients: what backward passes say.
        ablation: whether their effects are measured, a forward each.
    """
    progress.start(len(prepared.cases), "prompt's MLPs compared")
    effects = []
    for one in prepared.ablations:
        if ablation:
            effects.append(mlp_ablation(one, layers).numpy())
        progress.advance()
    scores = {"cdt": cdt} | {name: gradients.of_layers(name, layers) for name in _node_methods(gradients)}
    return Compared(
        pd.DataFrame({"layer": layers}), scores, _controls(gradients, "mlps", layers, range(len(cdt)), layers),
        np.stack(effects) if effects else None,
    )  # fmt: skip


def compared_streams(
    prepared: PreparedCases, layers: Sequence[int], gradients: GradientScores, ablation: bool, progress: Progress
) -> tuple[Compared, list[int]]:
    """Compare positions of the streams that leave some blocks, on the prompts in which positions mean the same.

    Returns:
        The comparison, and those prompts by their place.
    """
    prompts = same_form(prepared)
    progress.start(len(prompts), "prompt's streams compared")
    effects = []
    for i in prompts:
        if ablation:
            effects.append(stream_ablation(prepared.ablations[i], layers).flatten().numpy())
        progress.advance()
    n = len(prepared.cases[prompts[0]].case.tokens)
    places = pd.DataFrame({"layer": np.repeat(layers, n), "position": np.tile(np.arange(n), len(layers))})
    scores = {name: gradients.of_streams(name, prompts, layers) for name in _node_methods(gradients)}
    controls = _controls(gradients, "streams", layers, prompts, places["layer"])
    return Compared(places, scores, controls, np.stack(effects) if effects else None), prompts


def _node_methods(gradients: GradientScores) -> list[str]:
    return [name for name, kinds in gradients.nodes.items() if "mlps" in kinds]


def _controls(
    gradients: GradientScores,
    kind: str,
    layers: Sequence[int],
    prompts: Sequence[int],
    depth: Sequence[int] | pd.Series,
) -> dict[str, Array]:
    """Return the controls of nodes of a kind, [prompt, node]; none where no pass was read."""
    index = np.tile(np.asarray(depth, dtype=np.float64), (len(prompts), 1))
    rows = gradients.distances.get(kind)
    if rows is None:
        return {"layer": index}
    return {"distance": np.stack([rows[i][list(layers)].flatten().numpy() for i in prompts]), "layer": index}
