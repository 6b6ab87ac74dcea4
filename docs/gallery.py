"""Makes docs/gallery/*.png from saved runs, one figure of each analysis: python docs/gallery.py runs/demo [NAME …]

Needs a Chrome or Chromium, and the extra `images` (kaleido), which draw a figure outside a browser.
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import plotly.graph_objects as go
from generated import DOCS, DRAWN
from PIL import Image

from analyses.results.result import Result


def write_picture(figure: go.Figure, path: Path) -> None:
    """Write a figure, without its menus, as a PNG of 256 colours, which keeps it small."""
    figure.update_layout(updatemenus=[], paper_bgcolor="white", width=900)
    image = Image.open(BytesIO(figure.to_image(format="png", scale=1)))
    image.convert("RGB").quantize(256).save(path, optimize=True)


def draw(runs: Path, names: list[str]) -> None:
    """Draw the figure of each of these analyses, from its run in the folder."""
    for name in names:
        write_picture(Result.load(runs / name).figure(DRAWN[name]), DOCS / "gallery" / f"{name}.png")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2:] or list(DRAWN))
