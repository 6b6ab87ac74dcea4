"""The stack of edits of the Live page: on and off, strength, order, and a line to add one."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import streamlit as st

from app.live.protocol import Action
from app.ui.live_desk import Desk

RANGES = {"keep": (0.0, 2.0, 0.05), "share": (0.0, 1.5, 0.05)}
"""Ends and step of a slider, by what the strength is."""


def draw_stack(desk: Desk, data: dict[str, Any]) -> None:
    """Draw the stack and the buttons that go back and forth."""
    row = st.container(horizontal=True)
    row.button("Undo", icon=":material/undo:", on_click=desk.go, args=(-1,), disabled=desk.at <= 0,
                key="live:undo", shortcut="Ctrl+Z", help="This is the first step." if desk.at <= 0 else None)  # fmt: skip
    row.button("Redo", icon=":material/redo:", on_click=desk.go, args=(1,), disabled=desk.at >= len(desk.history) - 1,
                key="live:redo", shortcut="Ctrl+Y", help="This is the last step." if desk.at >= len(desk.history) - 1 else None)  # fmt: skip
    for index, step in enumerate(data["steps"]):
        _draw_step(desk, index, step, len(data["steps"]))
    if data["steps"]:
        st.button("Clear the stack", icon=":material/delete_sweep:", on_click=desk.act, args=("cleared the stack", Action("clear")),
                  key="live:clear")  # fmt: skip
    else:
        st.caption("No edit: the model is as it is. Click a cell of the grid, or write a line below.")
    _draw_line(desk, data)
    desk.say_refusal("stack")


def _draw_step(desk: Desk, index: int, step: dict[str, Any], n: int) -> None:
    stamp = f"{desk.turn}:{index}"
    with st.container(border=True, key=f"live:step:{index}"):
        on, text = st.columns([1, 7], vertical_alignment="center")
        on.toggle(
            "on", value=step["on"], key=f"live:on:{stamp}", label_visibility="collapsed", on_change=desk.act_on_step,
            args=(desk.turn, f"switched {'off' if step['on'] else 'on'}: {step['text']}", Action("toggle", index)), help="Whether this edit acts.",
        )  # fmt: skip
        # Not st.code: the browser takes seconds to load what colours code, and the page waits for it.
        text.html(f"<code style='overflow-wrap:anywhere;font-size:.875rem'>{escape(step['text'])}</code>")
        slide, up, down, remove = st.columns([5, 1, 1, 1], vertical_alignment="bottom")
        if step["strength"] is not None:
            _draw_strength(slide, desk, index, step, f"live:strength:{stamp}")
        for column, icon, words, by in ((up, "arrow_upward", "earlier", -1), (down, "arrow_downward", "later", 1)):
            possible = 0 <= index + by < n
            column.button(
                f"Move {words}: edit {index}", icon=f":material/{icon}:", key=f"live:icon:{words}:{stamp}", help=f"Let it act {words}." if possible else f"No edit acts {words} than this one.", on_click=desk.act_on_step,
                args=(desk.turn, f"moved {words}: {step['text']}", Action("move", index, by)), disabled=not possible,
            )  # fmt: skip
        remove.button(
            f"Remove edit {index}", icon=":material/close:", key=f"live:icon:remove:{stamp}", help="Remove this edit.", on_click=desk.act_on_step,
            args=(desk.turn, f"removed: {step['text']}", Action("remove", index)),
        )  # fmt: skip


def _draw_strength(place: Any, desk: Desk, index: int, step: dict[str, Any], key: str) -> None:
    name, value = step["strength_name"], step["strength"]
    # A power of two, since a slider whose ends follow its value would be another slider after each step.
    around = 2.0 ** math.ceil(math.log2(max(abs(value) * 2, 1.0)))
    low, high, by = RANGES.get(name, (min(-around, 0.0), max(around, 2.0), around / 40))

    turn = desk.turn

    def moved() -> None:
        strength = float(st.session_state[key])
        desk.act_on_step(turn, f"{name} {strength:.3g}: {step['text']}", Action("strength", index, strength))

    place.slider(name, min(low, value), max(high, value), value, by, key=key, on_change=moved, format="%.3g")


def _draw_line(desk: Desk, data: dict[str, Any]) -> None:
    def added() -> None:
        if line := str(st.session_state["live:line"]).strip():
            desk.act(f"added: {line}", Action("add", value=line), empties="live:line")

    st.text_input(
        "Add an edit", key="live:line", placeholder="zero z.5.3", on_change=added,
        help="One line of the edit grammar. Enter adds it.",
    )  # fmt: skip
    with st.popover("What can I write?", icon=":material/help:", key="live:forms"):
        st.code("\n".join(data["forms"].values()), language=None, wrap_lines=True)
        st.caption("DIRECTION: token ' Paris'; token ' a' - token ' b'; difference; "
                   "probe RUN/DATASET and channel RUN/LAYER.HEAD.COMPONENT of saved runs; file 'direction.safetensors'. "
                   "POS: an index, -1, a range 2-5, last, or the token's text in quotes.")  # fmt: skip
