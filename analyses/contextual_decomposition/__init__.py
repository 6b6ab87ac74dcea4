"""Contextual decomposition: what of a model's answer comes from each head, MLP or word, and the circuit that makes it.

The registry imports this method by name; no other method does.
"""

from analyses.contextual_decomposition.analysis import ContextualDecomposition

__all__ = ["ContextualDecomposition"]
