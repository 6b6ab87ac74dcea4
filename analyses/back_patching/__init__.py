"""Back-patching: a later layer's representation put back into an earlier one, to give it the layers it came too late for.

The registry imports this method by name; no other method does.
"""

from analyses.back_patching.analysis import BackPatching

__all__ = ["BackPatching"]
