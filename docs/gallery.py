"""Makes docs/gallery/*.png from saved runs, one figure of each analysis: python docs/gallery.py runs/demo

Needs a Chrome or Chromium, and the extra `images` (kaleido), which draw a figure outside a browser.
"""

from __future__ import annotations

import sys
from pathlib import Path

import plotly.graph_objects as go
from generated import DOCS, DRAWN

from analyses.results.result import Result


def picture(figure: go.Figure) -> bytes:
    """A small light PNG of a figure, without its menus."""
    figure.update_layout(updatemenus=[], paper_bgcolor="white", width=900)
    return figure.to_image(format="png", scale=1)


def draw(runs: Path) -> None:
    """Draw the figure of every analysis that has a run in the folder."""
    for name, figure in DRAWN.items():
        if (runs / name / "result.json").is_file():
            (DOCS / "gallery" / f"{name}.png").write_bytes(picture(Result.load(runs / name).figure(figure)))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
