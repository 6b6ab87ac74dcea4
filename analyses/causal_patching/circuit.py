"""Circuits of heads and MLPs: what they keep of the answer when everything else is as in the corrupted run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.causal_patching.attribution import Attributed
from analyses.causal_patching.cells import Cell
from analyses.causal_patching.graph import Sender, senders_of
from analyses.causal_patching.grid import ResumedGrid
from analyses.causal_patching.opened import Opener
from analyses.causal_patching.pairs import Pair
from analyses.causal_patching.running import Run
from analyses.circuits import (
    areas,
    at_shares,
    draw_items,
    draw_per_layer,
    interval,
    normalised,
    random_columns,
    resampled_faithfulness,
    sizes_of,
)
from analyses.results.statistics import percentiles
from probes.errors import PointError
from probes.models.protocol import Write
from probes.points import Address
from probes.progress import Progress

Array = NDArray[np.float64]
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes of circuits as shares of all items (Mueller et al. 2025, "MIB", arXiv 2504.13151)."""
ROWS = 32
"""Circuits that run together, which bounds memory."""


@dataclass(frozen=True, eq=False)
class Ablated:
    """A clean run in which nodes can be set to what they are in the corrupted run, or to zero."""

    grid: ResumedGrid
    given: Mapping[Address, Tensor]
    """z and mlp_out of every layer from the run's first position on, [pos, ...]."""
    n_layers: int
    n_heads: int

    @torch.no_grad()
    def last_rows(self, keep: Bool[Tensor, "row layer unit"]) -> Float[Tensor, "row d_model"]:
        """Return what leaves the last block with every node outside each row's circuit ablated.

        Args:
            keep: heads, and last the MLP, of every layer.
        """
        last = []
        for part in torch.split(keep, ROWS):
            writes: dict[Address, Write] = {}
            for layer in range(self.n_layers):
                writes[Address("z", layer)] = self._write(Address("z", layer), part[:, layer, : self.n_heads])
                writes[Address("mlp_out", layer)] = self._write(Address("mlp_out", layer), part[:, layer, self.n_heads])
            last.append(self.grid.base.edited(0, len(part), writes))
        return torch.cat(last)

    def _write(self, address: Address, keep: Tensor) -> Write:
        def put(tensor: Tensor) -> Tensor:
            mask = (
                keep[:, None].to(tensor.device)[..., None]
                if tensor.dim() == 4
                else keep[:, None, None].to(tensor.device)
            )
            return torch.where(mask, tensor, self.given[address].to(tensor))

        return put


def ablated(run: Run, pair: Pair, ablation: str) -> tuple[Ablated, Opener]:
    """Open a pair's clean run for circuits.

    Raises:
        PointError: a model that cannot be resumed from inside the stack.
    """
    shape = run.model.shape
    points = {Address(name, layer) for name in ("z", "mlp_out") for layer in range(shape.n_layers)}
    opener = Opener(run.model, run.metrics[:1], frozenset(points))
    opened = opener.open(pair, ("noise",), run.noises(pair)[0])[0]
    if not isinstance(opened.grid, ResumedGrid):
        raise PointError(f"{run.model.ref} cannot be resumed from inside the stack, so it has no circuits here")
    at = list(range(opened.grid.base.start, len(pair.clean)))
    clean = opener.values(pair, False, None)
    given = {}
    for address in points:
        values = clean[address].clone()
        both = [position for position in at if position in opened.sources.positions]
        values[both] = 0 if ablation == "zero" else opened.sources.given(address, both)
        given[address] = values[at]
    return Ablated(opened.grid, given, shape.n_layers, shape.n_heads), opener


def circuit_metrics(run: Run, circuits: Sequence[Sequence[Sender]], ablation: str, progress: Progress) -> Array:
    """Return the first metric [pair, circuit] with every node outside each circuit ablated."""
    shape = run.model.shape
    keep = torch.zeros(len(circuits), shape.n_layers, shape.n_heads + 1, dtype=torch.bool)
    for row, circuit in enumerate(circuits):
        for node in circuit:
            keep[row, node.layer, node.head] = True
    progress.start(len(run.pairs), "pair's circuits")
    out = []
    for pair in run.pairs:
        one, opener = ablated(run, pair, ablation)
        reader = opener.reader(pair, one.grid.unpatched)
        out.append(reader.read(one.last_rows(keep))[:, 0].numpy())
        run.tally.count(len(circuits))
        progress.advance()
    return np.stack(out)


def node_scores(run: Run, method: str, progress: Progress) -> Array:
    """Return how much each node supports the answer on each pair, [pair, node], nodes as `circuit_nodes` orders them.

    `atp` is the predicted loss on noising, `atp_star` its size, `exact` the measured loss.
    """
    cells = [Cell("mlp_out", n.layer) if n.head < 0 else Cell("z", n.layer, n.head) for n in circuit_nodes(run)]
    progress.start(len(run.pairs), f"pair's nodes by {method}")
    out = []
    for pair in run.pairs:
        if method == "exact":
            nodes = circuit_nodes(run)
            one, opener = ablated(run, pair, "counterfactual")
            keep = torch.ones(len(nodes), run.model.shape.n_layers, run.model.shape.n_heads + 1, dtype=torch.bool)
            for row, node in enumerate(nodes):
                keep[row, node.layer, node.head] = False
            reader = opener.reader(pair, one.grid.unpatched)
            values = reader.read(torch.cat([one.grid.unpatched[None], one.last_rows(keep)]))[:, 0].numpy()
            out.append(values[0] - values[1:])
            run.tally.count(len(nodes))
        else:
            attributed = Attributed(run.model, pair, "noise", run.metrics[0])
            scores = attributed.scores(cells, "atp" if method == "atp" else "atp_star").double().numpy()
            out.append(scores if method == "atp_star" else -scores)
        progress.advance()
    return np.stack(out)


def circuit_nodes(run: Run) -> list[Sender]:
    """Return every head and MLP."""
    return [sender for sender in senders_of(run.model.shape) if not sender.embed]


@dataclass(frozen=True)
class CircuitPlan:
    """Which circuits are tried."""

    methods: tuple[str, ...]
    shares: tuple[float, ...]
    ablation: str
    n_random: int
    seed: int


def circuit_tables(run: Run, plan: CircuitPlan, progress: Progress) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `faithfulness` and `circuit_area`, of circuits ordered on one half of the pairs and tried on the other.

    Rows of split `in_sample` order and try on all pairs. Random circuits have the same size (`random`) or the same size in
    every layer (`random_per_layer`, the harder control).
    """
    nodes = circuit_nodes(run)
    layer_of = {node: node.layer for node in nodes}
    n = len(run.pairs)
    halves = {"held_out": np.arange(n) % 2 == 0, "in_sample": np.ones(n, dtype=bool)} if n > 1 else {
        "in_sample": np.ones(n, dtype=bool)
    }  # fmt: skip
    sizes = sizes_of([share for share in plan.shares if round(share * len(nodes)) > 0], len(nodes))
    rng = np.random.default_rng(plan.seed)
    circuits: list[list[Sender]] = [list(nodes), []]
    kinds: list[tuple[str, str, int, str]] = [("full", "", len(nodes), ""), ("empty", "", 0, "")]
    for method in plan.methods:
        scores = node_scores(run, method, progress)
        for split, ordering in halves.items():
            order = np.argsort(-scores[ordering].mean(0), kind="stable")
            for size in sizes:
                own = [nodes[int(i)] for i in order[:size]]
                circuits.append(own)
                kinds.append((method, split, size, "own"))
                for _ in range(plan.n_random if split == "held_out" or n == 1 else 0):
                    circuits.append(draw_per_layer(rng, nodes, layer_of, own))
                    kinds.append((method, split, size, "random_per_layer"))
    for size in sizes:
        for _ in range(plan.n_random):
            circuits.append(draw_items(rng, nodes, size))
            kinds.append(("random", "", size, "random"))
    values = circuit_metrics(run, circuits, plan.ablation, progress)
    return _faithfulness(values, kinds, halves, sizes, len(nodes), plan)


def _faithfulness(
    values: Array,
    kinds: Sequence[tuple[str, str, int, str]],
    halves: Mapping[str, NDArray[np.bool_]],
    sizes: Sequence[int],
    n_nodes: int,
    plan: CircuitPlan,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    table, area = [], []
    for method in plan.methods:
        for split, ordering in halves.items():
            tried = ~ordering if split == "held_out" else ordering
            full, empty = values[tried, 0], values[tried, 1]
            columns = {size: _at(kinds, method, split, size, "own") for size in sizes}
            own = values[tried][:, [columns[size][0] for size in sizes]]
            f = normalised(own, full, empty)
            low, high = interval(own, full, empty, plan.seed)
            for i, size in enumerate(sizes):
                shuffled = _at(kinds, "random", "", size, "random")
                layered = _at(kinds, method, split, size, "random_per_layer") or _at(
                    kinds, method, "held_out", size, "random_per_layer"
                )
                random, per_layer = (normalised(values[tried][:, at], full, empty) for at in (shuffled, layered))
                table.append((
                    method, "nodes", plan.ablation, size / n_nodes, size, split, int(tried.sum()), f[i], low[i], high[i],
                    *(random_columns(f[i], random) if len(random) else (np.nan,) * 4),
                    float(per_layer.mean()) if len(per_layer) else np.nan,
                ))  # fmt: skip
            area.append(_area_row(method, split, plan, own, full, empty, np.array(sizes) / n_nodes))
    columns_f = [
        *("method", "level", "ablation", "share", "n_items", "split", "n_pairs", "f", "ci_low", "ci_high"),
        *("random_mean", "random_low", "random_high", "random_share_beaten", "random_per_layer_mean"),
    ]
    return pd.DataFrame(table, columns=columns_f), pd.DataFrame(area)


def _at(kinds: Sequence[tuple[str, str, int, str]], *kind: object) -> list[int]:
    return [i for i, other in enumerate(kinds) if other == kind]


def _area_row(
    method: str, split: str, plan: CircuitPlan, own: Array, full: Array, empty: Array, shares: Array
) -> dict[str, object]:
    f = normalised(own, full, empty)
    value = areas(list(shares), list(f))
    drawn = [areas(list(shares), list(row)) for row in resampled_faithfulness(own, full, empty, plan.seed)]
    row: dict[str, object] = {"method": method, "level": "nodes", "ablation": plan.ablation, "split": split}
    for name in ("cpr", "cmd", "cpr_log", "cmd_log"):
        low, high = percentiles([getattr(one, name) for one in drawn], len(own))
        row |= {name: getattr(value, name), f"{name}_low": float(low), f"{name}_high": float(high)}
    at = at_shares(pd.DataFrame({"share": shares, "f": f}), (0.01, 0.05, 0.2))
    return row | dict(zip(("f_01", "f_05", "f_20"), at, strict=True))
