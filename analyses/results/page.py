"""One self-contained HTML page from a template."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from probes.html_card import count


def page(template: str, **values: Any) -> str:
    """A template of `analyses/templates` that extends `page.html`, filled with `values`, of which `title` heads it."""
    environment = Environment(loader=PackageLoader("analyses"), autoescape=select_autoescape())
    environment.filters["inline"] = _inline
    environment.globals["count"] = count
    return environment.get_template(template).render(plotlyjs=get_plotlyjs(), **values)


def _inline(text: str) -> Markup:
    """Plain text with `code` in backticks."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
