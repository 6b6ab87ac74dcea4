"""A page for any registered analysis: what it is, a new run, and its saved runs."""

from __future__ import annotations

import streamlit as st

from analyses.base import Analysis
from app import catalogue
from app.jobs.queue import queue
from app.saved import Run, open_run, saved_runs
from app.ui import progress
from app.ui.results import draw_result
from app.views.setup import draw_setup
from probes.errors import UserError


def draw(name: str) -> None:
    """The page of the analysis `name`."""
    if not catalogue.ready():
        with st.spinner("Importing the analyses; this takes a few seconds, once."):
            catalogue.load()
    cls = catalogue.get(name)
    st.title(cls.title, anchor=False)
    st.markdown((cls.__doc__ or "").strip().split("\n")[0])
    job = _job(name)
    runs = [run for run in saved_runs() if run.analysis == name]
    form = st.expander(
        "New run",
        expanded=not runs and job is None,
        icon=":material/play_circle:",
        key=f"keep:new:{name}",
        on_change="rerun",
    )
    if form.open:
        with form:
            draw_setup(cls, runs)
    if job is not None:
        _follow(name, job)
    _saved(cls, runs)


def _job(name: str) -> str | None:
    job = st.session_state.get(f"job:{name}")
    return job if queue().knows(job) else None


def _follow(name: str, job: str) -> None:
    status, request = queue().status(job), queue().request(job)
    if not status.ended:
        progress.watch(job)
        return
    progress.ending(status)
    if status.state == "done" and request.kind == "estimate":
        st.markdown("**What this run would cost**")
        st.code("\n".join(status.lines), language=None)
    if status.state == "done" and request.kind == "run":
        if made := st.session_state.pop(f"follow:{name}", None):
            st.session_state[f"keep:run:{name}"] = made
        counts = status.answer.get("counts", {})
        ran = int(counts.get("forwards", 0))
        words = f"{ran:,} forward passes" if ran else "no forward pass: the store held everything"
        st.success(
            f"Done in {status.answer.get('seconds', 0):.1f} s, {words}. Saved in `{request.out}`.",
            icon=":material/check_circle:",
        )


def _saved(cls: type[Analysis], runs: list[Run]) -> None:
    if not runs:
        st.info(
            "No saved run of this analysis yet. Set one up above and press **Run**.", icon=":material/arrow_upward:"
        )
        return
    by_name = {run.name: run for run in runs}
    key = f"keep:run:{cls.name}"
    asked = st.query_params.get("run")
    if st.session_state.get(key) not in by_name:
        st.session_state[key] = asked if asked in by_name else runs[0].name
    chosen = st.selectbox("Saved run", list(by_name), key=key, help="Newest first.")
    run = by_name[chosen]
    try:
        result = open_run(run)
    except UserError as error:
        st.error(str(error), icon=":material/broken_image:")
        return
    draw_result(run, result, f"{cls.name}")
