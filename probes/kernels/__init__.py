"""Reducers of captured tensors."""

from probes.kernels.eager import reduce_rows

__all__ = ["reduce_rows"]
