"""Which circuits are tried, and how many forwards that takes."""

from __future__ import annotations

from dataclasses import dataclass

from analyses.causal_patching.ablation import AblationKind
from analyses.causal_patching.edges import Line
from analyses.causal_patching.levels import ABLATIONS

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes of circuits as shares of all items (Mueller et al. 2025, "MIB", arXiv 2504.13151)."""
SHUFFLED = "_shuffled"
"""Ends the names of orders that were found on shuffled pairs, a control of the pairing."""
ITEMS = 16
"""Items of a checked circuit that are tried for being needed, drawn where there are more."""
TAKEN_WITH = 2
"""Subsets with which each of them is taken out, beside being taken out alone."""


@dataclass(frozen=True)
class CircuitPlan:
    """Which circuits are tried."""

    level: str
    methods: tuple[str, ...]
    shares: tuple[float, ...]
    ablation: AblationKind
    n_random: int
    n_subsets: int
    """Subsets by which a circuit's completeness is checked; 0 leaves it out."""
    line: Line
    seed: int

    @property
    def shuffled(self) -> tuple[str, ...]:
        """Methods that also order items on pairs whose corrupted prompt is another pair's."""
        return tuple(method for method in self.methods if method not in ABLATIONS)

    @property
    def circuits(self) -> int:
        """How many circuits are tried at most on a pair."""
        each = len(self.methods) * (4 + self.n_random) + 4 * len(self.shuffled) + self.n_random
        checks = (4 * self.n_subsets + (1 + TAKEN_WITH) * (1 + ITEMS)) * len(self.methods) if self.n_subsets else 0
        return 2 + len(self.shares) * each + checks
