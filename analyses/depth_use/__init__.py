"""Depth use: what each block contributes, what later blocks and the output lose without it, and which proxy predicts that.

The registry imports this method by name; no other method does.
"""

from analyses.depth_use.analysis import DepthUse

__all__ = ["DepthUse"]
