"""A table of coloured cells, one of which can be picked: the lens grid and maps, drawn by the browser in milliseconds.

A figure of Plotly takes the browser half a second for 600 labelled cells; this is a plain HTML table whose cells change in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

COLOURS = 64
"""Colours of a scale."""
DARK_BELOW = 0.45
"""Brightness, of 1, below which text on a colour is white."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Everything that is known of each cell, [row, column, …], as it is shown: the browser tells it without asking."""

    tokens: Sequence[Sequence[Sequence[str]]]
    """Most probable first."""
    probabilities: NDArray[np.float32]
    facts: Mapping[str, Sequence[Sequence[str]]]
    watch: Sequence[str]
    watched: NDArray[np.float32]
    """Probabilities of the watched tokens."""
    ranks: NDArray[np.int64]
    """Their ranks, from 1."""

    def data(self) -> dict[str, Any]:
        """Return what the browser draws."""
        return {
            "tokens": self.tokens, "probabilities": as_texts(self.probabilities), "facts": self.facts, "watch": self.watch,
            "watched": as_texts(self.watched), "ranks": self.ranks.tolist(),
        }  # fmt: skip


def as_texts(values: NDArray[np.float32], form: str = "%.3g") -> Any:
    """Return numbers as text, in lists of lists."""
    return np.char.mod(form, values).tolist()


@dataclass(frozen=True, eq=False)
class CellGrid:
    """Cells [row, column] with row 0 at the bottom."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: NDArray[np.float32]
    """What the colours show; NaN is left blank."""
    low: float
    high: float
    """Values of the first and the last colour."""
    scale: str
    """Plotly's name of the colours."""
    label: str
    """What the values are, with their unit."""
    x: str
    y: str
    """What columns and rows are."""
    tips: Sequence[Sequence[str]] | None = None
    """What a cell says under the pointer."""
    cells: Cells | None = None
    """What is told of the chosen cell, and under the pointer instead of `tips`."""
    text: Sequence[Sequence[str]] | None = None
    """What stands in the cells."""
    outlined: NDArray[np.bool_] | None = None
    """A region whose border is drawn."""
    chosen: tuple[int, int] | None = None
    cone: bool = False
    """Whether a cell under the pointer shows what it can reach: rows above, columns to the right."""

    def data(self) -> dict[str, Any]:
        """Return what the browser draws."""
        share = (self.values - self.low) / ((self.high - self.low) or 1.0)
        indices = np.clip(np.nan_to_num(share) * (COLOURS - 1), 0, COLOURS - 1).round().astype(int)
        colours: list[list[int | None]] = indices.tolist()
        for row, column in np.argwhere(~np.isfinite(self.values)).tolist():
            colours[row][column] = None
        return {
            "rows": list(self.rows), "columns": list(self.columns), "colours": colours, "tips": self.tips, "text": self.text,
            "palette": palette(self.scale), "low": f"{self.low:.3g}", "high": f"{self.high:.3g}", "label": self.label, "x": self.x,
            "y": self.y, "chosen": self.chosen, "cone": self.cone, "cells": self.cells and self.cells.data(),
            "borders": None if self.outlined is None or not self.outlined.any() else borders(self.outlined).tolist(),
        }  # fmt: skip


def borders(region: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return which sides of each cell [row, column] bound a region, as the sum of 1 (above), 2 (right), 4 (below), 8 (left)."""
    inside = np.pad(region, 1)
    around = (inside[2:, 1:-1], inside[1:-1, 2:], inside[:-2, 1:-1], inside[1:-1, :-2])
    return sum((region & ~beside) * (1 << bit) for bit, beside in enumerate(around))  # type: ignore[return-value]


@cache
def palette(scale: str) -> list[tuple[str, str]]:
    """Return the colours of a scale, and for each the colour of text that can be read on it."""
    from plotly.colors import sample_colorscale

    colours = sample_colorscale(scale, [i / (COLOURS - 1) for i in range(COLOURS)], colortype="tuple")
    pairs = []
    for red, green, blue in colours:
        bright = 0.299 * red + 0.587 * green + 0.114 * blue
        back = "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
        pairs.append((back, "#ffffff" if bright < DARK_BELOW else "#000000"))
    return pairs


@cache
def _component() -> Any:
    here = Path(__file__)
    css, js = (here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    return st.components.v2.component("bathyscope_cell_grid", html="<div class='box'></div>", css=css, js=js)


def draw_grid(
    grid: CellGrid, key: str, alt: str, on_pick: Callable[[int, int], None] | None = None, step: int | None = None
) -> None:
    """Draw a grid.

    Args:
        grid: the cells.
        key: its name on the page.
        alt: what it is, in words.
        on_pick: called with the row and column of a cell that was picked by a click, or by arrow keys and Enter.
        step: which step of a session it shows, for those who wait for one.
    """

    def picked() -> None:
        state: Mapping[str, Any] = st.session_state[key]
        if on_pick is not None and state["picked"] is not None:
            on_pick(*map(int, state["picked"]))

    data = {**grid.data(), "alt": alt, "picks": on_pick is not None, "step": step}
    _component()(key=key, data=data, on_picked_change=picked)
