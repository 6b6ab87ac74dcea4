"""Figures of searches."""

from __future__ import annotations

from analyses.results.card import FigureSpec

SEARCHES: dict[str, FigureSpec] = {}
