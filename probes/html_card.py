"""Cards that notebooks show for a model, a store or a result; they take the page's own colours, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_EDGE = "1px solid rgba(128,128,128,.45)"
_CELL = "text-align:left;padding:1px 14px 1px 0;vertical-align:top"
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Fold:
    """A table that is shown on demand."""

    summary: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def card(title: str, about: str, facts: Mapping[str, object], folds: Sequence[Fold] = ()) -> str:
    """Return the HTML of a titled box: a line about the thing, its facts, and tables folded away. All text is escaped."""
    lines = "".join(f"<tr><th style='{_CELL};white-space:nowrap'>{_text(k)}</th><td style='{_CELL}'>{_text(v)}</td></tr>" for k, v in facts.items())  # fmt: skip
    body = f"<div><b>{_text(title)}</b> <span style='opacity:.75'>{_text(about)}</span></div>"
    body += f"<table style='margin:4px 0'><tbody>{lines}</tbody></table>" if facts else ""
    body += "".join(_fold(fold) for fold in folds if fold.rows)
    return f"<div style='border:{_EDGE};border-radius:6px;padding:8px 12px;max-width:62em;overflow-x:auto'>{body}</div>"


def size(n_bytes: float) -> str:
    """Return a number of bytes as people read it, for instance `1.5 MiB`."""
    value, unit = float(n_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:,.{min(unit, 1)}f} {_UNITS[unit]}"


def count(n: int, noun: str, many: str = "") -> str:
    """Return a number of things as people say it: `1 prompt`, `1,200 forward passes`; `many` is an irregular plural."""
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{n:,} {noun if n == 1 else many or noun + ending}"


def aligned(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a table as lines of plain text, columns aligned; no line ends in white space."""
    lines = [list(map(str, line)) for line in (columns, *rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _fold(fold: Fold) -> str:
    head = "".join(f"<th style='{_CELL}'>{_text(name)}</th>" for name in fold.columns)
    cells = ("".join(f"<td style='{_CELL}'>{_text(cell)}</td>" for cell in row) for row in fold.rows)
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    table = f"<table style='margin:4px 0'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<details><summary>{_text(fold.summary)}</summary>{table}</details>"


def _text(value: object) -> str:
    return escape(str(value))
