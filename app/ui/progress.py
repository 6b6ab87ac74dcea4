"""How far jobs are, with a way to stop them."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app.jobs.protocol import PHASES, Phase, Request, Status
from app.jobs.queue import queue
from probes.html_card import count

PERIOD = 0.6
"""Seconds between two looks at a running job."""


def title_of(request: Request) -> str:
    """A job in a few words."""
    if request.kind == "check":
        return f"checking {request.model.ref}"
    return f"{request.analysis} on {request.model.ref}" + (" (estimate)" if request.kind == "estimate" else "")


def jobs_of(key: str, belongs: Callable[[Request], bool]) -> list[str]:
    """The jobs that a page shows: this session's last one, and those under way, whoever started them.

    A session that started none follows the last of those under way to its end, so that a page loaded anew has its job again.
    """
    active = [name for name in queue().active() if belongs(queue().request(name))]
    if active and not queue().knows(st.session_state.get(key)):
        st.session_state[key] = active[-1]
    last = st.session_state.get(key)
    return active if last in active or not queue().knows(last) else [last, *active]


def follow(name: str, *, by_itself: bool = True) -> bool:
    """How far a job is, or how it ended; return whether it is done.

    Args:
        by_itself: keep it up to date. Else a button does: a part of a page that is drawn again by itself would begin another clock
            each time, and each beat sends what widgets held a moment ago, beside what the reader does to them.
    """
    status, request = queue().status(name), queue().request(name)
    if not status.ended:
        shown().add(name)
        if by_itself:
            st.fragment(_watch, run_every=PERIOD)(name)
        else:
            _draw(name)
            st.button("Look again", key=f"look:{name}", icon=":material/refresh:")
        return False
    ending(status)
    if status.state == "done" and request.kind == "run":
        ran = int(status.answer.get("counts", {}).get("forwards", 0))
        words = count(ran, "forward pass") if ran else "no forward pass: the store held everything"
        st.success(
            f"Done in {status.answer.get('seconds', 0):.1f} s, {words}. Saved in `{request.out}`.",
            icon=":material/check_circle:",
        )
    return status.state == "done"


def shown() -> set[str]:
    """The jobs that this page shows already; the entry empties it before the page is drawn."""
    names: set[str] = st.session_state.setdefault("jobs-shown", set())
    return names


def _watch(name: str) -> None:
    """The page is drawn again when the job ends."""
    if queue().status(name).ended:
        st.rerun()
    _draw(name)


def _draw(name: str) -> None:
    """A job's bar, its words and a cancel button."""
    left, right = st.columns([5, 1], vertical_alignment="top")
    with left:
        draw_progress(title_of(queue().request(name)), queue().status(name))
    stopping = queue().cancelling(name)
    right.button(
        "Stopping …" if stopping else "Cancel", key=f"cancel:{name}", icon=":material/stop_circle:", disabled=stopping,
        on_click=queue().cancel, args=(name,), width="stretch",
        help="Stops at the next batch, or within a long one; what is captured stays.",
    )  # fmt: skip


def draw_progress(title: str, status: Status) -> None:
    """One job's bar."""
    if status.state == "queued":
        st.markdown(f"**{title}** · Waiting for the worker: it starts in a few seconds, and does one job at a time.")
        return
    words = f"**{title}** · {steps(status.phase)}" + (f" · {counted(status)}" if status.what else "")
    if status.share is None:
        st.markdown(f":material/hourglass_top: {words}")
    else:
        st.progress(status.share, text=words)
    for note in status.notes[-3:]:
        st.caption(note)


def steps(phase: Phase) -> str:
    """Which of a job's phases it is in, in words."""
    if phase not in PHASES:
        return phase or "starting"
    return f"step {PHASES.index(phase) + 1} of {len(PHASES)}: {phase}"


def counted(status: Status) -> str:
    """What is being counted, how far, and how long it will still take."""
    left = status.remaining()
    done = f"{status.what}: {status.done:,} of {status.total:,}" if status.total else status.what
    return done + ("" if left is None else f" · about {seconds(left)} left")


def seconds(span: float) -> str:
    """A span of time as people say it."""
    if span < 90:
        return f"{max(1, round(span))} s"
    return f"{round(span / 60)} min" if span < 5400 else f"{span / 3600:.1f} h"


def ending(status: Status) -> None:
    """How a job ended, where that is worth a word."""
    if status.state == "refused":
        st.error(status.message, icon=":material/block:")
    elif status.state == "failed":
        st.error(status.message, icon=":material/error:")
        if status.notes:
            with st.expander("What happened, line by line"):
                st.code("\n".join(status.notes), language=None)
    elif status.state == "cancelled":
        st.warning(status.message, icon=":material/stop_circle:")
