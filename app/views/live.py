"""The Live page: a prompt, every layer, a stack of edits, and what follows from them."""

from __future__ import annotations

import shlex
from functools import partial
from typing import Any

import streamlit as st

from app.live.examples import EXAMPLES
from app.live.named_model import model_line
from app.live.protocol import Action
from app.places import runs_root
from app.saved import saved_runs
from app.ui.cell_grid import draw_grid
from app.ui.live_beside import draw_both, draw_depth, draw_history, pick_cell
from app.ui.live_cell import draw_attention, draw_cell, draw_everywhere, draw_heads
from app.ui.live_desk import Desk, desk, part, redraw
from app.ui.live_figures import CHANGED, lens_grid
from app.ui.live_outcome import draw_outcome
from app.ui.live_stack import draw_stack
from app.ui.live_take import PARAMETER, draw_take, watch_text

SHOWS = {"after": "After", "before": "Before", "difference": "Difference"}
TOUR = (
    ("Read the lens", "Each cell says what the model would predict if it stopped there: a row is a block, layer 0 at the bottom."),
    ("Patch a cell", "Click a cell, then **Patch from other**: the row of the other prompt takes this one's place. The strip above says what changed."),
    ("Sweep it", "**Everywhere** repeats the last edit at each layer and position, and shows where it matters."),
    ("Keep it", "**Take along** gives the command, the Python, a notebook and a link of exactly this session."),
)  # fmt: skip


@st.fragment
def draw() -> None:
    """The page."""
    own = desk()
    head = st.container(horizontal=True, vertical_alignment="center")
    head.title("Live", anchor=False, width="content")
    if own.now is None and not own.refusal:
        first = st.query_params.get(PARAMETER) or next(iter(EXAMPLES.values()))
        if not own.recall(first):
            with st.spinner("Waiting for the model; the first time it is loaded."):
                own.look_at("opened", first)
    if own.kept is not None:
        with head:  # where nothing moves under the reader's hand when it goes
            _recalled(own)
    _examples(own)
    if own.now is None:
        own.say_refusal("prompt")
        st.button("Try again", on_click=own.open, args=(next(iter(EXAMPLES.values())), "opened"), key="live:again")
        return
    _tour()
    _prompts()
    _strip()
    wide, narrow = st.container(key="live-pair-desk").columns([7, 4])
    with wide:
        _choices(own)
        grid = st.container()
    with narrow:
        st.subheader("Edits", anchor=False)
        _stack()
    _tools()
    with grid:
        # Last, since it takes longest: all else is on the page by then.
        _grid()


@part("strip")
def _strip() -> None:
    own = desk()
    assert own.now is not None
    st.query_params[PARAMETER] = own.now.session
    draw_outcome(own, own.now.data)


@part("stack")
def _stack() -> None:
    own = desk()
    assert own.now is not None
    draw_stack(own, own.now.data)


@st.fragment(run_every=1.0)
def _recalled(own: Desk) -> None:
    """Say that what is shown was kept, until the model has answered the same."""
    if own.settle():
        st.rerun()
    if own.kept is not None:
        st.caption(
            f":material/history: Answered on {own.kept.when:%Y-%m-%d at %H:%M}. The model is being loaded; what you do now waits for it."
        )


def _examples(own: Desk) -> None:
    with st.container(horizontal=True):
        for name, session in EXAMPLES.items():
            st.button(name, key=f"live:example:{name}", on_click=own.open, args=(session, f"example: {name}"))


@st.fragment
def _tour() -> None:
    if st.session_state.get("keep:live:toured"):
        return
    with st.container(border=True, key="live:tour"):
        columns = st.columns(len(TOUR))
        for number, (column, (title, words)) in enumerate(zip(columns, TOUR, strict=True), 1):
            column.markdown(f"**{number}. {title}**  \n{words}")
        st.button("Got it", key="live:toured", on_click=partial(st.session_state.__setitem__, "keep:live:toured", True))


@part("prompts")
def _prompts() -> None:
    own = desk()
    assert own.now is not None
    data, stamp = own.now.data, str(own.turn)

    def said(kind: str, key: str) -> None:
        value = st.session_state[key]
        own.act(f"{kind}: {value}", Action(kind, value=value), at="prompt")  # type: ignore[arg-type]

    model = model_line(own.now.session)
    refs = list(dict.fromkeys([model, "smollm2-135m", *(shlex.quote(run.model) for run in saved_runs())]))
    fields = (
        (300, "text", "Prompt", data["text"], "What the model reads. Enter runs it."),
        (300, "other", "Other prompt", data["other"] or "", "What edits may copy from; best token by token alike. May be empty."),
        (150, "watch", "Watch", watch_text(data["watch"]), "Tokens to follow: Paris, Rome, or quoted with their blanks."),
    )  # fmt: skip
    key = f"live:model:{stamp}"
    with st.container(horizontal=True):
        st.selectbox("Model", refs, index=0, key=key, accept_new_options=True, on_change=said, args=("model", key), width=180,
                     help="The model that is loaded stands first; another is loaded when chosen.")  # fmt: skip
        for width, kind, label, value, words in fields:
            key = f"live:{kind}:{stamp}"
            st.text_input(label, value=value, key=key, help=words, on_change=said, args=(kind, key), width=width)
    own.say_refusal("prompt")
    if data["other"] is not None and len(data["other_tokens"]) != len(data["comparison"]["tokens"]):
        st.caption(f":material/info: {len(data['comparison']['tokens'])} tokens here, {len(data['other_tokens'])} in the other prompt: "
                   "positions do not stand for the same words.")  # fmt: skip


def _choices(own: Desk) -> None:
    row = st.container(horizontal=True, vertical_alignment="bottom")
    row.segmented_control("Grid", list(SHOWS), default="after", required=True, format_func=SHOWS.get, key="live:show", width="content",
                          on_change=redraw, args=("grid",))  # fmt: skip
    lenses = ["logit", *(str(path) for path in sorted(runs_root().glob("**/*.lens")))]
    row.selectbox("Lens", lenses, key="keep:live:lens", accept_new_options=True, width=95,
                  on_change=lambda: own.act("another lens", at="prompt"))  # fmt: skip


def _cell(data: dict[str, Any]) -> tuple[int, int]:
    """Return the chosen step and position, which are inside every prompt's grid."""
    steps, positions = len(data["rows"]), len(data["comparison"]["tokens"])
    if st.session_state.get("live:step") not in range(steps):
        st.session_state["live:step"] = steps // 2
    if st.session_state.get("live:position") not in range(positions):
        st.session_state["live:position"] = positions - 1
    return int(st.session_state["live:step"]), int(st.session_state["live:position"])


@part("grid")
def _grid() -> None:
    own = desk()
    assert own.now is not None
    data, show = own.now.data, st.session_state.get("live:show") or "after"
    grids = own.grids(own.at)
    if grids is None:
        own.say_refusal("grid")
        return
    tokens, comparison = data["comparison"]["tokens"], data["comparison"]
    draw_grid(
        lens_grid(tokens, grids, show, _cell(data), data["watch"]), "live:grid",
        f"Lens grid, {SHOWS[show]}: the top token of {len(data['rows'])} blocks at {len(tokens)} positions; arrow keys and Enter choose one, which is told below.",
        partial(pick_cell, "live:step", "live:position", ("tools",)), own.at,
    )  # fmt: skip
    after = grids["after"]
    if comparison["edits"]:
        reach, moved = int(after["changed"].sum()), int((after["kl"] > CHANGED).sum())
        st.caption(
            f"The edits can reach {reach} of {after['changed'].size} cells; in {moved} the reading changed by more than {CHANGED} nats (outlined)."
        )
    st.caption(
        f"{len(tokens)} tokens, {comparison['blocks_run']} blocks run for the edits, answered in {data['took']:.2f} s."
    )


@part("tools")
def _tools() -> None:
    own = desk()
    assert own.now is not None
    data = own.now.data
    step, position = _cell(data)
    names = ["Cell", "Attention", "Heads", "Everywhere", "Both prompts", "Depth", "History", "Take along"]
    tool = st.segmented_control(
        "Tools", names, default="Cell", required=True, key="live:tool", label_visibility="collapsed"
    )
    if tool == "Cell":
        draw_cell(own, data, step, position)
    elif tool == "Attention":
        draw_attention(own, data, step, position)
    elif tool == "Heads":
        draw_heads(own, data)
    elif tool == "Everywhere":
        draw_everywhere(own, data)
    elif tool == "Both prompts":
        draw_both(own, data, step, position, st.session_state.get("keep:live:lens", "logit"))
    elif tool == "Depth":
        draw_depth(own, data, step)
    elif tool == "History":
        draw_history(own)
    else:
        draw_take(own, data)
