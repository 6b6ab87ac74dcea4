"""One self-contained HTML page from a template; its figures are drawn when they come into view."""

from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from base64 import b64encode
from contextlib import suppress
from functools import cache
from typing import Any

import pandas as pd
import plotly.io as pio
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from analyses.results.theme import DARK, INK, LINE
from probes.cache_folder import cache_root
from probes.html_card import count
from probes.locked_files import replacing

HEIGHT = 450
"""Pixels of a figure that names no height; plotly's own default."""


def page(template: str, **values: Any) -> str:
    """Return a template of `analyses/templates` that extends `page.html`, filled with `values`, of which `title` heads it."""
    return _templates().get_template(template).render(plotlyjs=_library(), styles=_styles(), **values)


@cache
def _templates() -> Environment:
    environment = Environment(loader=PackageLoader("analyses"), autoescape=select_autoescape())
    environment.filters["inline"] = _inline
    environment.globals["count"] = count
    return environment


def figure_html(figure: str, name: str, narrowest: int | None = None) -> str:
    """Return a figure as the page's script draws it: packed data, and a place as high as the figure will be.

    Args:
        figure: as Plotly's JSON.
        name: of the file that the reader may save it to.
        narrowest: the width in pixels below which it cannot be read; that of its layout where it has one.
    """
    content = json.loads(figure)
    layout = content["layout"]
    # Light and dark templates are in the page once.
    layout.pop("template", None)
    height = layout.get("height", HEIGHT)
    width = f"--narrowest:{least}" if (least := layout.get("width", narrowest)) else ""
    data = _packed(json.dumps(content, separators=(",", ":")))
    return f'<div class="plot" data-name="{escape(name)}" data-figure="{data}" style="height:{height}px;{width}"></div>'


def table_cells(table: pd.DataFrame, form: str) -> dict[str, Any]:
    """Return a table as templates show it: columns in words, fractions in a form such as `.2f`, empty where unknown."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:{form}}"
        return str(value)

    cells = [[text(value) for value in row] for row in table.itertuples(index=False)]
    return {"columns": [str(column).replace("_", " ") for column in table.columns], "cells": cells}


def _packed(text: str) -> str:
    return b64encode(_gzip(text.encode())).decode()


def _gzip(content: bytes) -> bytes:
    # Without a time stamp: equal results give equal pages. A higher level takes longer and saves 0.2 %.
    return gzip.compress(content, compresslevel=6, mtime=0)


@cache
def _library() -> str:
    """Plotly's script, packed once a version and kept in the cache: packing it takes as long as drawing the figures."""
    script = get_plotlyjs().encode()
    # How a gzip file ends: by what it unpacks to.
    ending = struct.pack("<2I", zlib.crc32(script), len(script))
    kept = cache_root() / "pages" / f"plotly-{ending.hex()}.js.gz"
    with suppress(OSError):
        if (packed := kept.read_bytes())[-len(ending) :] == ending:
            return b64encode(packed).decode()
    packed = _gzip(script)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as draft:
            draft.write_bytes(packed)
    return b64encode(packed).decode()


@cache
def _styles() -> Markup:
    """Return what the script needs of the two themes, as JSON."""
    templates = {"light": pio.templates["plotly_white"], "dark": pio.templates["plotly_dark"]}
    styles = {
        "templates": {mode: template.to_plotly_json() for mode, template in templates.items()},
        "dark": {**DARK, INK["light"]: INK["dark"], LINE["light"]: LINE["dark"]},
        "ink": INK,
    }
    # `</` would end the script it stands in.
    return Markup(json.dumps(styles, separators=(",", ":")).replace("</", "<\\/"))


def _inline(text: str) -> Markup:
    """Plain text with `code` in backticks."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
