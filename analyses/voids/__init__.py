"""Voids: which layers are unactivated for which tokens, by changes of the L2 norm along depth."""

from analyses.voids.analysis import Voids

__all__ = ["Voids"]
