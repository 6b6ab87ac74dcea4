"""The strip that says what changed: the next token before and after the edits."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import streamlit as st

from analyses.results.theme import shorten, visible
from app.ui.live_desk import Desk

TOKENS = 20
"""Tokens written on demand."""


def draw_outcome(desk: Desk, data: dict[str, Any]) -> None:
    """Draw before and after side by side, the watched tokens, and on demand what the model writes."""
    comparison = data["comparison"]
    watched = _watched(comparison) if comparison["before"]["watched"] else ""
    kl = f"<div>KL(before ‖ after)<div style='font-size:1.6rem'>{comparison['kl']:.4g} nats</div>{watched}</div>"
    bars = (_bars(title, comparison[title.lower()]["top"]) for title in ("Before", "After"))
    st.html(f"<div style='display:flex;flex-wrap:wrap;gap:1rem 2.5rem'>{''.join(bars)}{kl}</div>")
    st.button(
        f"Write {TOKENS} tokens", icon=":material/edit_note:", key="live:write", on_click=desk.look, args=("written", "outcome"),
        kwargs={"new_tokens": TOKENS}, help="Greedy continuations, before and after.",
    )  # fmt: skip
    if written := desk.known("written", new_tokens=TOKENS):
        left, right = st.columns(2)
        left.code(written["before"], language=None, wrap_lines=True)
        right.code(written["after"], language=None, wrap_lines=True)
    desk.say_refusal("outcome")


def _bars(title: str, top: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td style='text-align:right;padding-right:8px;white-space:nowrap'><code>{escape(shorten(visible(t['token']), 14))}</code></td>"
        f"<td style='width:100%'><div style='background:#0072B2;height:.9em;border-radius:2px;min-width:1px;"
        f"width:{100 * math.exp(t['logprob']):.1f}%'></div></td>"
        f"<td style='padding-left:8px;font-variant-numeric:tabular-nums'>{math.exp(t['logprob']):.3f}</td></tr>"
        for t in top
    )
    return (
        f"<div style='flex:1 1 16rem'><b>{title}</b><table style='width:100%;border-spacing:0 2px'>{rows}</table></div>"
    )


def _watched(comparison: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td style='padding-right:10px'><code>{escape(shorten(visible(b['token']), 14))}</code></td>"
        f"<td>{math.exp(b['logprob']):.3f} → {math.exp(a['logprob']):.3f}</td>"
        f"<td style='padding-left:10px'>{a['logprob'] - b['logprob']:+.3f} nats</td></tr>"
        for b, a in zip(comparison["before"]["watched"], comparison["after"]["watched"], strict=True)
    )
    return f"<div>Watched<table style='font-variant-numeric:tabular-nums'>{rows}</table></div>"
