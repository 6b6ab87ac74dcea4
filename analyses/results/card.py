"""The card of a result: its analysis's title and reference, and how its tables become figures and depth profiles."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.results.axes import whole_layers
from analyses.results.record import parse, read_profiles
from analyses.results.theme import plain_names

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class FigureSpec:
    """How a figure is drawn from tables, and what it says."""

    title: str
    caption: str
    """What is measured, on what, and how to read it; in plain sentences."""
    draw: Callable[[Tables], go.Figure]
    applies: Callable[[Tables], bool] = field(default=lambda tables: True)
    data: Literal["prompts", "weights", "own"] = "prompts"
    """Drawn from the run's prompts, from weights alone, or from other text, which the caption names."""
    live: Callable[[Tables, str], Sequence[str]] | None = None
    """From the name of a mark, the first of its custom data, to the lines of a Live session that follow the model's."""

    def drawn(self, tables: Tables) -> go.Figure:
        """The figure of these tables, as every page shows it."""
        return whole_layers(self.draw(plain_names(tables)))


@dataclass(frozen=True)
class ProfileSpec:
    """One number a layer, drawn on the depth axis that all analyses share."""

    title: str
    unit: str
    """What the number is counted in, for the axis: `share of dimensions`, `nats`."""
    caption: str
    """What is measured and how to read it, in a sentence or two."""
    read: Callable[[Tables], pd.DataFrame]
    """Columns layer and value, one row a layer, and ci_low, ci_high where there is an interval."""
    applies: Callable[[Tables], bool] = field(default=lambda tables: True)


@dataclass(frozen=True)
class Card:
    """What a page says of a result beside its tables; made by the result's own analysis."""

    title: str
    about: str
    """One sentence."""
    reference: str
    figures: Mapping[str, FigureSpec]
    profiles: Mapping[str, ProfileSpec]

    @classmethod
    def of(cls, analysis: Any) -> Card:
        """The card of an analysis, given its class or an instance."""
        about = (analysis.__doc__ or "").split("\n")[0]
        return cls(analysis.title, about, analysis.reference, analysis.figures, analysis.profiles)

    @classmethod
    def saved(cls, folder: Path, record: Mapping[str, Any]) -> Card:
        """Return the card of a saved result whose analysis is not at hand: figures and profiles as they were saved.

        Args:
            record: what `read_record` read.

        Raises:
            OSError, ValueError: the saved profiles cannot be read.
        """
        said = record.get("card", {})
        figures = {
            name: FigureSpec(
                entry["title"], entry["caption"], _drawing(folder / "figures" / f"{name}.json"), data=entry["data"]
            )
            for name, entry in said.get("figures", {}).items()
        }
        profiles = {
            name: ProfileSpec(entry["title"], entry["unit"], entry["caption"], _reading(entry["columns"]))
            for name, entry in read_profiles(folder).items()
        }
        title = said.get("title", record["analysis"])
        return cls(title, said.get("about", ""), said.get("reference", ""), figures, profiles)

    def record(self, tables: Tables) -> dict[str, Any]:
        """What `saved` needs beside the figures' and profiles' own files, as JSON."""
        figures = {
            name: {"title": spec.title, "caption": spec.caption, "data": spec.data}
            for name, spec in self.figures.items()
            if spec.applies(tables)
        }
        return {"title": self.title, "about": self.about, "reference": self.reference, "figures": figures}


def _drawing(path: Path) -> Callable[[Tables], go.Figure]:
    return lambda _: go.Figure(_decoded(parse(path)))


def _decoded(value: Any) -> Any:
    """A figure's JSON with its packed arrays as arrays, as a figure that was just drawn has them."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "bdata" not in value:
        return {key: _decoded(item) for key, item in value.items()}
    array = np.frombuffer(b64decode(value["bdata"]), value["dtype"])
    return array.reshape([int(size) for size in str(value.get("shape", array.size)).split(",")])


def _reading(columns: Mapping[str, Any]) -> Callable[[Tables], pd.DataFrame]:
    return lambda _: pd.DataFrame(columns)
