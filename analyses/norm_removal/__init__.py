"""Norm removal: diagnostics, training, and an exact norm-free model.

The registry imports this method by name; no other method does.
"""

from analyses.norm_removal.analysis import NormRemoval

__all__ = ["NormRemoval"]
