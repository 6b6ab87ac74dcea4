"""A page for any registered analysis: what it is, a new run, and its saved runs."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from analyses.base import Analysis
from app import offered
from app.jobs.protocol import Request
from app.jobs.queue import queue
from app.saved import Run, saved_runs
from app.ui import progress
from app.ui.results import draw_chosen
from app.views.setup import draw_setup, draw_start
from probes.errors import UserError


def draw(name: str) -> None:
    """The page of the analysis `name`."""
    try:
        with offered.shown_while_importing():
            cls = offered.get_analysis(name)
    except UserError as error:
        st.error(str(error), icon=":material/extension_off:")
        return
    st.title(cls.title, anchor=False)
    st.markdown((cls.__doc__ or "").strip().split("\n")[0])
    runs = _runs_of(name)
    jobs = progress.jobs_of(f"job:{name}", lambda request: request.analysis == name)
    key = f"keep:new:{name}"
    if st.session_state.pop(f"fold:{name}", False):
        st.session_state[key] = False
    top = st.container()
    form = st.expander(
        "New run: model, prompts and options", expanded=not runs and not jobs, icon=":material/tune:", key=key,
        on_change="rerun",
    )  # fmt: skip
    with form:
        draft = draw_setup(cls, runs)
    with top:
        draw_start(cls, draft, folded=not form.open)
        for job in progress.jobs_of(f"job:{name}", lambda request: request.analysis == name):
            _follow(name, job)
    # Listed anew: a job that is seen to have ended may have saved its run after the first look.
    _saved(cls, _runs_of(name))


def _runs_of(name: str) -> list[Run]:
    return [run for run in saved_runs() if run.analysis == name]


def _follow(name: str, job: str) -> None:
    request = queue().request(job)
    if not progress.follow(job):
        return
    if request.kind == "estimate":
        st.markdown("**What this run would cost**")
        st.code("\n".join(queue().status(job).lines), language=None)
    else:
        _show(name, job, request)


def _show(name: str, job: str, request: Request) -> None:
    """Open the run of a job that ended, once: afterwards the reader chooses."""
    if st.session_state.get(f"showed:{name}") != job:
        st.session_state[f"showed:{name}"] = job
        st.session_state[f"keep:run:{name}"] = Path(request.out).name


def _saved(cls: type[Analysis], runs: list[Run]) -> None:
    if not runs:
        st.info(
            "No saved run of this analysis yet. Set one up above and press **Run**.", icon=":material/arrow_upward:"
        )
        return
    draw_chosen({run.name: run for run in runs}, "Saved run", f"keep:run:{cls.name}", cls.name, "Newest first.")
