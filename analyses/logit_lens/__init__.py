"""The logit lens: what each layer's residual stream would predict, at chosen positions."""

from analyses.logit_lens.analysis import LogitLens

__all__ = ["LogitLens"]
