"""A session: a model, a prompt or two, and a stack of edits, with what follows from them. Imported by analyses and front ends."""

from probes.session.comparison import Comparison, Outcome
from probes.session.everywhere import EffectMap
from probes.session.lens_grid import LensGrid
from probes.session.session import Session
from probes.session.state import State, Step

__all__ = ["Comparison", "EffectMap", "LensGrid", "Outcome", "Session", "State", "Step"]
