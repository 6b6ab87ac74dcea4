"""Norms with frozen scales, and their removal: sites, switches, folding and the form that plain transformers loads.

Imported by `probes.models` and everything above it.
"""

from probes.norm_kinds import KINDS, Kind
from probes.norms.arithmetic import NormParts, parts_of
from probes.norms.folding import absorb, make_constant
from probes.norms.large_eps import make_large_eps, undo_large_eps
from probes.norms.scales import Rows, RunningScale, Scale
from probes.norms.sites import NoNormError, Norm, NormSite, choose, norms_of
from probes.norms.switches import Switches

__all__ = [
    "KINDS",
    "Kind",
    "NoNormError",
    "Norm",
    "NormParts",
    "NormSite",
    "Rows",
    "RunningScale",
    "Scale",
    "Switches",
    "absorb",
    "choose",
    "make_constant",
    "make_large_eps",
    "norms_of",
    "parts_of",
    "undo_large_eps",
]
