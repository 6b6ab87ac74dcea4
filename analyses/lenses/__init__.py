"""Lenses compared: what each reads of the same rows, and how good each is by its own yardstick, beside controls."""

from analyses.lenses.analysis import Lenses

__all__ = ["Lenses"]
