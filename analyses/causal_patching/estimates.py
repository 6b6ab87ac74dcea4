"""What a run does beside its grid: attribution with a verification budget, named paths, and circuits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analyses.causal_patching.circuit_checks import FAITHFUL, LARGEST
from analyses.causal_patching.circuit_plan import SHUFFLED, CircuitPlan
from analyses.causal_patching.circuit_tables import circuit_tables
from analyses.causal_patching.edge_tables import edge_tables, parallel_blocks, paths_table
from analyses.causal_patching.edges import Line
from analyses.causal_patching.graph import count_edges, parse_edges
from analyses.causal_patching.levels import ABLATIONS
from analyses.causal_patching.nodes import node_tables
from analyses.causal_patching.paths import KvView, Through
from analyses.causal_patching.running import Run
from analyses.causal_patching.selection import Ends
from probes.errors import OptionError
from probes.progress import Progress

SAID = {"nodes": "heads and MLPs", "edges": "edges between heads and MLPs"}
BASELINES = {
    "counterfactual": "as in the corrupted run", "mean": "at its mean over the pair's references", "zero": "zero",
}  # fmt: skip
Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class EstimatePlan:
    """What is estimated, verified and tried beside the grid."""

    methods: tuple[str, ...]
    line: Line
    verify: int
    paths: tuple[str, ...]
    through: Through
    kv_view: KvView
    max_edges: int
    circuits: CircuitPlan | None
    seed: int

    @property
    def node_methods(self) -> list[str]:
        """Methods that score single cells."""
        return [method for method in self.methods if method in ("atp", "atp_star")]

    @property
    def edge_methods(self) -> list[str]:
        """Methods that score edges."""
        return [method for method in self.methods if method in ("eap", "eap_ig")]

    def check(self, run: Run) -> None:
        """Refuse what cannot be done before anything runs.

        Raises:
            OptionError: a path that is none, or more of them than `max_edges`; gradients under noise.
            PointError: a model that keeps its blocks to itself.
        """
        if run.noise is not None and (self.methods or self.circuits):
            raise OptionError("attribution and circuits compare two prompts: give --corruption token or reference")
        if self.paths:
            parse_edges(self.paths, run.model.shape, parallel_blocks(run.model), self.kv_view == "query")
        if len(self.paths) > self.max_edges:
            raise OptionError(
                f"{len(self.paths)} paths are more than max_edges, {self.max_edges}: score all edges by --attribution eap_ig and "
                "verify the largest with --verify"
            )

    def forwards(self, pairs: int, shape_nodes: int) -> dict[str, int]:
        """Return how many patched forwards this takes at most, by kind."""
        counts: dict[str, int] = {}
        counts["verified estimates"] = 2 * self.verify * pairs * len(self.methods)
        counts["paths"] = 2 * len(self.paths) * pairs
        if self.circuits is not None:
            each = sum(method in ABLATIONS for method in self.circuits.methods) * shape_nodes
            counts["circuits"] = (self.circuits.circuits + each) * pairs
        return counts


def estimates(run: Run, plan: EstimatePlan, ends: Ends, progress: Progress) -> tuple[Tables, list[str]]:
    """Return (tables by name, notes).

    Raises:
        PointError: a model without edges, or one that keeps its blocks to itself.
    """
    tables: Tables = {}
    rows: list[dict[str, object]] = []
    nodes, edges = [], []
    for method in plan.node_methods:
        table, row = node_tables(run, method, plan.verify, plan.seed, progress)  # type: ignore[arg-type]
        nodes.append(table)
        rows.append(row)
    for method in plan.edge_methods:
        table, row = edge_tables(run, method, plan.line, plan.verify, plan.seed, progress)
        edges.append(table)
        rows.append(row)
    if nodes:
        tables["nodes"] = pd.concat(nodes, ignore_index=True)
    if edges:
        tables["edges"] = pd.concat(edges, ignore_index=True)
    if rows:
        tables["verification"] = pd.DataFrame(rows)
    if plan.paths:
        named = parse_edges(plan.paths, run.model.shape, parallel_blocks(run.model), plan.kv_view == "query")
        gaps = np.array([ends[pair.index][0][0] - ends[pair.index][1][0] for pair in run.pairs])
        tables["paths"] = paths_table(run, named, plan.through, gaps, plan.seed, progress)
    if plan.circuits is not None:
        tables |= circuit_tables(run, plan.circuits, progress)
    return tables, _notes(run, plan, rows) + _checked(tables)


def _notes(run: Run, plan: EstimatePlan, rows: Sequence[Mapping[str, object]]) -> list[str]:
    said = []
    for row in rows:
        said.append(
            f"{row['method']}: of the estimates the {row['k']} largest and {row['n_random']} others were patched exactly; rank "
            f"correlation {row['spearman']:.2f}; with 95 % confidence at most {row['missed_bound']:.0%} of the others exceed the "
            "smallest verified effect of the largest."
        )
    if plan.methods and not plan.verify:
        said.append("No estimate was verified: `verify` was 0, and what the scores rank is not known to matter.")
    if plan.edge_methods:
        shape, parallel = run.model.shape, parallel_blocks(run.model)
        said.append(
            f"{count_edges(shape, parallel):,} edges, keys and values counted once for each key-value head "
            f"({count_edges(shape, parallel, expanded=True):,} with one for every query head)."
        )
    if plan.circuits is not None:
        said.append(
            f"Circuits are of {SAID[plan.circuits.level]} at all positions; everything else is {BASELINES[plan.circuits.ablation]}. "
            "Order was found on every second pair and tried on the others (held_out); in_sample uses all pairs for both."
        )
    return said


def _checked(tables: Tables) -> list[str]:
    if "circuit_checks" not in tables:
        return []
    said = []
    for _, row in tables["circuit_checks"].iterrows():
        own, random = (_with_interval(row, name) for name in ("incompleteness", "random_incompleteness"))
        said.append(
            f"{row['method']}: the smallest circuit tried that keeps {FAITHFUL:.0%} has {row['n_items']:,} items. With subsets of it "
            f"taken out it is {own} of the span away from the whole model without them; a random circuit with as many items in "
            f"every layer is {random} away. Of {row['n_tried']} of its items {row['share_never_needed']:.0%} were never needed."
        )
    kept = set(tables["circuit_checks"]["method"])
    missing = [m for m in tables["faithfulness"]["method"].unique() if m not in kept and not m.endswith(SHUFFLED)]
    if missing:
        said.append(
            f"No circuit of at most {LARGEST:.0%} of all items keeps {FAITHFUL:.0%} by {', '.join(missing)}: none is checked."
        )
    return said


def _with_interval(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + (f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else "")
