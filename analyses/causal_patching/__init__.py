"""Causal patching: activations of one run copied into another, to see which of them decide the answer.

The registry imports this method by name; no other method does.
"""

from analyses.causal_patching.analysis import CausalPatching

__all__ = ["CausalPatching"]
