"""Contextual decomposition: what part of an activation comes from chosen heads, MLPs or tokens. Imported by analyses only."""

from probes.decomposition.decomposer import Decomposer, Parts, decompose, rules_of
from probes.decomposition.nodes import Baseline, Node, Source, head, mlp, token
from probes.decomposition.rules import PRESETS, Rules

__all__ = [
    "PRESETS",
    "Baseline",
    "Decomposer",
    "Node",
    "Parts",
    "Rules",
    "Source",
    "decompose",
    "head",
    "mlp",
    "rules_of",
    "token",
]
