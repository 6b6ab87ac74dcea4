"""Back-patching: a later layer's representation put back into an earlier one, to give it the layers it came too late for."""

from analyses.back_patching.analysis import BackPatching

__all__ = ["BackPatching"]
