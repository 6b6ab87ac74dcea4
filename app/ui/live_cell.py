"""What can be seen and done at one place: a cell of the lens grid, or a head."""

from __future__ import annotations

from typing import Any

import numpy as np
import streamlit as st

from analyses.results.theme import token_label
from app.live.protocol import Action
from app.ui.cell_grid import draw_grid
from app.ui.live_desk import Desk
from app.ui.live_figures import CONFIG, arcs, attention_map, block_of, columns_of, effect_map
from app.ui.theme import mode, restyled

POINTS = ("resid_post", "mlp_out", "attn_out", "resid_mid", "resid_pre")


def draw_cell(desk: Desk, data: dict[str, Any], step: int, position: int) -> None:
    """Draw the buttons for what can be done at a cell of the grid, which the grid itself tells."""
    block = block_of(data["grids"]["after"], step)
    point = st.segmented_control(
        f"At block {block}, position {position}", POINTS, default="resid_post", key="live:point"
    )
    point = point or "resid_post"
    place = f"{point}.{block} @{position}"
    zero, mean, patch = st.columns(3)
    _adds(zero, desk, "Zero", f"zero {place}", "backspace")
    _adds(mean, desk, "Mean", f"mean {place}", "functions")
    _adds(patch, desk, "Patch from other", f"patch {place} from other", "content_paste", disabled=data["other"] is None)
    skip, again, steer = st.columns(3)
    _adds(skip, desk, "Skip block", f"skip {block}", "redo")
    _adds(again, desk, "Repeat block", f"repeat {block}-{block}", "repeat")
    watched = data["watch"][0] if data["watch"] else data["comparison"]["before"]["top"][0]["token"]
    _adds(steer, desk, f"Steer to {watched.strip()[:10]}", f"add {place} token {watched!r} x20", "explore")
    desk.say_refusal("cell")


def _adds(place: Any, desk: Desk, label: str, line: str, icon: str, disabled: bool = False) -> None:
    place.button(
        label, icon=f":material/{icon}:", key=f"live:add:{label.split(' to ')[0]}:{line.split()[0]}:{line}", width="stretch", disabled=disabled,
        help=f"`{line}`", on_click=desk.act, args=(f"added: {line}", Action("add", value=line)), kwargs={"at": "cell"},
    )  # fmt: skip


def draw_attention(desk: Desk, data: dict[str, Any], step: int, position: int) -> None:
    """Draw the attention of a block from a position, as arcs and as a map, and the button that cuts an edge."""
    grid, tokens = data["grids"]["after"], data["comparison"]["tokens"]
    block = block_of(grid, min(step, len(grid["steps"]) - 1))
    position = min(position, len(tokens) - 1)
    names = ["mean of heads", *(f"head {block}.{h}" for h in range(data["heads"]))]
    head_box, key_box, cut = st.columns([2, 2, 2], vertical_alignment="bottom")
    head = head_box.selectbox(f"Attention of block {block}", names, key="live:head")
    answer = desk.look("attention", "attention", layer=block)
    if answer is None:
        desk.say_refusal("attention")
        return
    number = names.index(head) - 1
    pattern = answer["pattern"].mean(0) if number < 0 else answer["pattern"][number]
    keys = list(range(position + 1 if data["causal"] else len(tokens)))
    key = key_box.selectbox("Key", keys, index=int(pattern[position, : len(keys)].argmax()), key=f"live:key:{position}",
                            format_func=lambda i: f"{i} {token_label(tokens[i])}")  # fmt: skip
    line = f"knock-out {block}{'' if number < 0 else f'.{number}'} {position}->{key}"
    _adds(cut, desk, "Knock out edge", line, "link_off")
    st.plotly_chart(
        restyled(arcs(tokens, pattern[position], position), mode()), key="live:arcs", config=CONFIG,
        alt=f"Attention from position {position} to the tokens before it, {head}",
    )  # fmt: skip
    with st.expander("Every query", key="live:every-query"):
        draw_grid(
            attention_map(tokens, pattern, position, key, head),
            "live:pattern",
            f"Attention from every query to every key, {head}",
        )
    desk.say_refusal("cell")


def draw_heads(desk: Desk, data: dict[str, Any]) -> None:
    """Draw the map of heads, from which one is picked, and what can be done to it."""
    answer = desk.look("heads", "heads")
    if answer is None:
        desk.say_refusal("heads")
        return
    effects = answer["effects"]
    names = [f"{layer}.{head}" for layer in range(data["layers"]) for head in range(data["heads"])]
    best = int(np.abs(effects).argmax())
    if st.session_state.get("live:picked-head") not in names:
        st.session_state["live:picked-head"] = names[best]

    def picked(layer: int, head: int) -> None:
        st.session_state["live:picked-head"] = f"{layer}.{head}"

    layer, head = map(int, st.session_state["live:picked-head"].split("."))
    draw_grid(effect_map(effects, [str(h) for h in range(data["heads"])], "logits", "head", (layer, head)), "live:head-map",
              f"Direct effect of every head on the logit of {answer['token']}", picked)  # fmt: skip
    st.caption(
        f"Direct effect of each head on the logit of `{token_label(answer['token'])}` at the last position. Click a head to pick it."
    )
    box, *buttons = st.columns([2, 1, 1, 1], vertical_alignment="bottom")
    chosen = box.selectbox("Head", names, key="live:picked-head")
    for place, (label, line, icon) in zip(buttons, (("Zero", f"zero z.{chosen}", "backspace"), ("Mean", f"mean z.{chosen}", "functions"),
                                                     ("Patch", f"patch z.{chosen} from other", "content_paste")), strict=True):  # fmt: skip
        _adds(place, desk, label, line, icon, disabled=label == "Patch" and data["other"] is None)
    desk.say_refusal("cell")


def draw_everywhere(desk: Desk, data: dict[str, Any]) -> None:
    """Draw the button that repeats an edit at every place, and its map."""
    on = [step["text"] for step in data["steps"] if step["on"]]
    if not on:
        st.caption("Add an edit first: the last one that is on is repeated at every layer and position, or every head.")
        return
    metric_box, button = st.columns([2, 2], vertical_alignment="bottom")
    watched = list(data["watch"])
    metrics = ["KL", "top token", *watched, *([f"{watched[0]} - {watched[1]}"] if len(watched) > 1 else [])]
    metric = metric_box.selectbox("Effect on", metrics, key="live:metric",
                                  format_func=lambda m: m if m in ("KL", "top token") else f"log-probability of {m}")  # fmt: skip
    button.button(
        "Everywhere", icon=":material/grid_on:", key="live:everywhere", on_click=desk.look, args=("everywhere", "everywhere"),
        width="stretch", help=f"Repeats `{on[-1]}` at every layer and position (or every head), the other edits as they are.",
    )  # fmt: skip
    desk.say_refusal("everywhere")
    if (effect := desk.known("everywhere")) is None:
        return
    if metric == "KL":
        values = effect["kl"]
    elif metric == "top token":
        values = effect["top"]
    elif metric in watched:
        values = effect["watched"][:, :, watched.index(metric)]
    else:
        values = effect["watched"][:, :, 0] - effect["watched"][:, :, 1]
    tokens = data["comparison"]["tokens"]
    columns = columns_of(tokens) if effect["columns"] == "position" else [str(i) for i in range(values.shape[1])]
    draw_grid(effect_map(values, columns, "nats", effect["columns"], diverging=metric != "KL"), "live:effects",
              f"Effect of {effect['edit']} at every layer and {effect['columns']}")  # fmt: skip
    st.caption(
        f"`{effect['edit']}`, repeated at every layer and {effect['columns']}; effect on {metric}, in nats. Blank where it cannot stand."
    )
