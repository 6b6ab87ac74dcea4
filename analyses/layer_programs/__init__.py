"""Layer programs: what changes when blocks are left out, repeated, exchanged or run side by side, and which change helps.

The registry imports this method by name; no other method does.
"""

from analyses.layer_programs.analysis import LayerPrograms

__all__ = ["LayerPrograms"]
