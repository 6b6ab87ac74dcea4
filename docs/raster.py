"""Makes docs/raster.png, the picture of the README, from a run on the default model: python docs/raster.py

Needs a Chrome or Chromium, and the extra `images` (kaleido), which draw a figure outside a browser.
"""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from analyses.voids import Voids
from probes.models import load_model

TEXT = "The capital of France is Paris, and the capital of Japan is"
PICTURE = Path(__file__).with_name("raster.png")


def raster() -> go.Figure:
    """The activity raster of one prompt, with a heading in place of the menu."""
    figure = Voids(alpha=(0.8,), max_new_tokens=12).run(load_model("smollm2-135m"), [TEXT]).figure("raster")
    heading = "Active blocks of SmolLM2-135M for each token of a prompt and its continuation (voids, alpha 0.8)"
    return figure.update_layout(
        updatemenus=[], title={"text": heading, "x": 0.5, "font": {"size": 15}}, margin={"t": 60, "b": 90}
    )


if __name__ == "__main__":
    raster().write_image(PICTURE, width=1100, height=560)
