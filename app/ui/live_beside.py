"""What stands beside the lens grid: the other prompt's grid, profiles of saved runs, and earlier steps of the session."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import streamlit as st

from analyses.results.depth_axis import Curve, Panel, depth_figure, narrowest
from analyses.results.theme import colour_of, token_label
from app import offered
from app.live.named_model import model_of
from app.live.protocol import Action
from app.saved import profiles_of, saved_runs
from app.ui.cell_grid import draw_grid
from app.ui.live_desk import Desk, redraw
from app.ui.live_figures import CONFIG, block_of, lens_grid
from app.ui.theme import at_least, mode, restyled

PANELS = 6
"""Profiles drawn beside each other."""


def pick_cell(row: str, column: str, parts: tuple[str, ...], picked_row: int, picked_column: int) -> None:
    """Keep a picked cell under two names of the page's state, and draw again the parts of the page that show it."""
    st.session_state[row], st.session_state[column] = picked_row, picked_column
    redraw(*parts)


def draw_both(desk: Desk, data: dict[str, Any], step: int, position: int, lens: str) -> None:
    """Draw this prompt's grid and the other's, a cell of each chosen, and the patch from one into the other."""
    if data["other"] is None:
        st.caption(
            "Write another prompt above, best token by token like this one: its grid then stands beside this one."
        )
        return
    answer, own = desk.look("other", "both", lens=lens), desk.grids(desk.at)
    if answer is None or own is None:
        desk.say_refusal("both")
        return
    tokens, others = data["comparison"]["tokens"], answer["tokens"]
    names = "live:other-step", "live:other-position"
    for name, value, most in zip(names, (step, position), (len(answer["grid"]["steps"]), len(others)), strict=True):
        if st.session_state.get(name) not in range(most):
            st.session_state[name] = min(value, most - 1)
    row = st.container(horizontal=True, vertical_alignment="bottom")
    source = row.selectbox("Position in the other prompt", range(len(others)), key=names[1], width=230,
                           format_func=lambda i: f"{i} {token_label(others[i])}")  # fmt: skip
    block = block_of(data["rows"], step)
    line = f"patch resid_post.{block} @{position} from other@{source}"
    row.button(
        f"Patch it into block {block}, position {position}", icon=":material/content_paste:", key="live:both:patch", help=f"`{line}`",
        on_click=desk.act, args=(f"added: {line}", Action("add", value=line)), kwargs={"at": "both"},
    )  # fmt: skip
    desk.say_refusal("both")
    cells = (step, position), (st.session_state[names[0]], source)
    here = {"before": own["before"], "after": own["before"]}
    there = {"before": answer["grid"], "after": answer["grid"]}
    kept = ("live:step", "live:position"), names
    titles = "This prompt, without edits", "The other prompt"
    for side, (column, text, grids) in enumerate(
        zip(st.container(key="live-pair-both").columns(2), (tokens, others), (here, there), strict=True)
    ):
        with column:
            st.markdown(f"**{titles[side]}**")
            draw_grid(lens_grid(text, grids, "before", cells[side], data["watch"]), f"live:both:{side}", f"Lens grid of {titles[side].lower()}",
                      partial(pick_cell, *kept[side], ("tools", "grid")))  # fmt: skip
    st.caption("Click a cell in each, or choose by the lists, and patch; the grid above shows the result.")


def draw_depth(desk: Desk, data: dict[str, Any], step: int) -> None:
    """Draw the profiles of this model's saved runs on its layers, the chosen block marked."""
    assert desk.now is not None
    ref = model_of(desk.now.session).ref
    edits = tuple(step["text"] for step in data["steps"] if step["on"])
    runs = [r for r in saved_runs() if r.model == ref and r.layers == data["layers"] and r.edits in ((), edits)]
    newest = {(run.analysis, run.edits): run for run in reversed(runs)}
    shown = [newest[key] for key in sorted(newest)]
    profiles = [
        replace(profile, title=f"{profile.title}, under the edits") if run.edits else profile
        for run in shown
        for profile in profiles_of(run)[:1]
    ][:PANELS]
    if not profiles:
        st.caption(
            f"No saved run of {ref} says anything of single layers. Open an analysis in the side bar and press Run."
        )
        return
    order = list(offered.names())
    panels = [
        Panel(p.title, p.unit, (Curve(p.run, colour_of(p.analysis, order), p.table, data["layers"]),)) for p in profiles
    ]
    block = block_of(data["rows"], step)
    st.html(at_least("live-depth", narrowest(panels)))
    with st.container(key="live-depth"):
        st.plotly_chart(
            restyled(depth_figure(panels, data["layers"], [block], mode()), mode()), key="live:depth", config=CONFIG,
            alt=f"Profiles of saved runs by layer, block {block} marked: {', '.join(p.title for p in profiles)}",
        )  # fmt: skip
    st.caption(
        "The first profile of each analysis's newest run on this model, and of its newest under the edits of this session; "
        + f"block {block} is marked. All are on the page Home."
    )


def draw_history(desk: Desk) -> None:
    """Draw every step of the session with its outcome, a button that goes back to it, and two of them side by side."""
    for index, (answer, words) in enumerate(zip(desk.history, desk.words, strict=True)):
        comparison = answer.data["comparison"]
        top = comparison["after"]["top"][0]
        row = st.container(horizontal=True, vertical_alignment="center")
        mark = ":material/arrow_right:" if index == desk.at else ""
        row.markdown(
            f"{mark} {index}\\. {words.replace('[', '(').replace(']', ')')} — KL {comparison['kl']:.3g} nats, then `{token_label(top['token'])}`"
        )
        row.button(
            "Restore", key=f"live:restore:{index}", on_click=desk.go, args=(index - desk.at,), disabled=index == desk.at
        )
    if len(desk.history) > 1:
        _draw_compared(desk)


def _draw_compared(desk: Desk) -> None:
    steps = range(len(desk.history))
    what = st.segmented_control(
        "Compare by",
        ["Final predictions", "Whole grids"],
        default="Final predictions",
        required=True,
        key="live:compare:what",
    )
    labels = ("Compare", "live:compare:a", 0), ("with", "live:compare:b", len(steps) - 1)
    for column, (label, key, first) in zip(st.container(key="live-pair-history").columns(2), labels, strict=True):
        with column:
            index = st.selectbox(label, steps, key=key, index=first, format_func=lambda i: f"{i}. {desk.words[i]}")
            data = desk.history[index].data
            if what != "Whole grids":
                rows = data["comparison"]["after"]["top"]
                st.dataframe([{"token": row["token"], "logprob": row["logprob"]} for row in rows], hide_index=True,
                             alt=f"What the model says after step {index}")  # fmt: skip
                continue
            tokens = data["comparison"]["tokens"]
            if (grids := desk.grids(index)) is not None:
                draw_grid(
                    lens_grid(tokens, grids, "after", None, data["watch"]),
                    f"{key}:grid",
                    f"Lens grid after step {index}",
                )
