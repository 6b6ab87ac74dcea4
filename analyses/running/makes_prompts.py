"""Analyses that are given no prompts, and whether they make their own."""

from __future__ import annotations

from typing import Any

from probes.errors import OptionError

MAKING = {"sets": "--sets NAME", "task": "another --task"}
"""Options that let some analyses make their own prompts, and the flag to name."""


def check_makes_prompts(analysis: Any) -> None:
    """Refuse an analysis, or the outline of one, that is given no prompts and makes none.

    Raises:
        OptionError: it makes none.
    """
    if not analysis.makes_prompts:
        flags = next((f" or {flag}" for name, flag in MAKING.items() if hasattr(analysis, name)), "")
        raise OptionError(f"{analysis.name} needs prompts: give --prompts FILE.jsonl{flags}")
