"""How far jobs are, with a way to stop them."""

from __future__ import annotations

import streamlit as st

from app.jobs.protocol import Request, Status
from app.jobs.queue import queue

PERIOD = 0.6
"""Seconds between two looks at a running job."""


def title_of(request: Request) -> str:
    """A job in a few words."""
    if request.kind == "check":
        return f"checking {request.model['model']}"
    return f"{request.analysis} on {request.model['model']}" + (" (estimate)" if request.kind == "estimate" else "")


def watch(name: str) -> None:
    """A job's bar, its words and a cancel button, kept up to date; the page is drawn again when the job ends."""
    st.fragment(_watch, run_every=PERIOD)(name)


def _watch(name: str) -> None:
    status = queue().status(name)
    if status.ended:
        st.rerun()
    draw_progress(title_of(queue().request(name)), status)
    if st.button(
        "Cancel",
        key=f"cancel:{name}",
        icon=":material/stop_circle:",
        help="Stops at the next batch; what is captured stays.",
    ):
        queue().cancel(name)
        st.toast("Stopping at the next batch.")


def draw_progress(title: str, status: Status) -> None:
    """One job's bar."""
    if status.state == "queued":
        ahead = "Waiting for the worker: it starts in a few seconds, and does one job at a time."
        st.progress(0.0, text=f"**{title}** · {ahead}")
        return
    share = min(1.0, status.done / status.total) if status.total else 0.0
    count = f"{status.what}: {status.done:,} of {status.total:,}" if status.total else status.what
    left = status.remaining()
    st.progress(share, text=f"**{title}** · {count}" + ("" if left is None else f" · about {seconds(left)} left"))
    if status.lines:
        st.caption("  \n".join(" ".join(line.split()) for line in status.lines))
    for note in status.notes[-3:]:
        st.caption(note)


def seconds(count: float) -> str:
    """A span of time as people say it."""
    if count < 90:
        return f"{max(1, round(count))} s"
    return f"{round(count / 60)} min" if count < 5400 else f"{count / 3600:.1f} h"


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
