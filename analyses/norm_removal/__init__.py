"""Norm removal: diagnostics, training, and an exact norm-free model."""

from analyses.norm_removal.analysis import NormRemoval

__all__ = ["NormRemoval"]
