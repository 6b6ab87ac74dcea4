"""Setting up a run: model, prompts and options; then its cost, or its start."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import streamlit as st

from analyses.base import Analysis
from analyses.running.model_spec import CHOICES, ModelSpec
from app.jobs.protocol import Request
from app.jobs.queue import queue
from app.places import run_folder, run_name, store_root
from app.prompt_sets import PromptSet
from app.saved import Run, saved_runs
from app.ui.keep import begin
from app.ui.option_widgets import changed, draw_fields, draw_options, set_options
from app.ui.prompts import draw_prompts
from probes.errors import OptionError, UserError
from probes.html_card import count
from probes.models import list_models

DEFAULT = "smollm2-135m"
NO_MODEL = "no model is named: choose one, or type a hub id, a folder or a .gguf file"


@dataclass(frozen=True)
class Draft:
    """A run as the form describes it."""

    spec: ModelSpec | None
    """None where no model is named."""
    prompts: PromptSet | None
    options: dict[str, Any]
    name: str
    """As given; empty where the run is to be named by itself."""
    problem: str
    """Why it cannot be run; empty where it can."""


def draw_setup(cls: type[Analysis], runs: list[Run]) -> Draft:
    """The form of a new run; returns what it says now."""
    _copy(cls, runs)
    spec = draw_model()
    problem = "" if spec else NO_MODEL
    prompts: PromptSet | None = None
    try:
        prompts = draw_prompts(cls)
    except UserError as error:
        problem = str(error)
        st.error(problem, icon=":material/block:")
    st.markdown("**Options**")
    try:
        options: dict[str, Any] = draw_options(cls)
        cls(**options)
    except UserError as error:
        problem = str(error)
        st.error(problem, icon=":material/block:")
        options = {}
    name = st.text_input(
        "Name of the run", key=begin(f"keep:name:{cls.name}", ""), placeholder=run_name(cls.name, spec.ref if spec else ""),
        help="Its folder inside the folder of runs. Empty: named by analysis and model. A name that is taken gets a number.",
    )  # fmt: skip
    return Draft(spec, prompts, options, name.strip(), problem)


def draw_model() -> ModelSpec | None:
    """Draw which model, and a widget for each option of its loading; return None where no model is named."""
    at_hand = [info.ref for info in list_models()]
    refs = list(dict.fromkeys([DEFAULT, *(run.model for run in saved_runs()), *at_hand]))
    ref = st.selectbox(
        "Model", refs, key="keep:model", accept_new_options=True,
        help="A named model, a hub id, a folder or a .gguf file; type what is not listed.",
    )  # fmt: skip
    fields = dataclasses.fields(ModelSpec)[1:]
    with st.expander(f"How the model is loaded{changed(ModelSpec, fields)}", key="keep:loading"):
        loading = draw_fields(ModelSpec, fields, CHOICES)
    if named := str(ref or "").strip():
        return ModelSpec(named, **loading)
    st.error(NO_MODEL, icon=":material/block:")
    return None


def _copy(cls: type[Analysis], runs: list[Run]) -> None:
    if not runs:
        return
    names = {run.name: run for run in runs}

    def take() -> None:
        set_options(cls, names[st.session_state[f"copy:{cls.name}"]].record["options"])

    left, right = st.columns([3, 1], vertical_alignment="bottom")
    left.selectbox(
        "Start from the options of", list(names), key=f"copy:{cls.name}", help="A saved run of this analysis."
    )
    right.button("Take its options", key=f"take:{cls.name}", on_click=take, width="stretch")


def draw_start(cls: type[Analysis], draft: Draft, folded: bool) -> None:
    """The buttons that start what the form describes; what they start is followed right below them."""
    run, cost, words = st.columns([1, 1, 3], vertical_alignment="center")
    stopped = bool(draft.problem)
    run_pressed = run.button("Run", type="primary", key=f"run:{cls.name}", disabled=stopped, width="stretch")
    cost_pressed = cost.button(
        "Estimate cost", key=f"cost:{cls.name}", disabled=stopped, width="stretch",
        help="Loads the model and plans: forward passes, rows, bytes, seconds. Runs nothing.",
    )  # fmt: skip
    words.caption(f":material/block: {draft.problem}" if stopped and folded else _summary(draft))
    if draft.spec and (run_pressed or cost_pressed):
        _submit(cls, draft, draft.spec, "run" if run_pressed else "estimate")


def _summary(draft: Draft) -> str:
    """What would be run, in a line."""
    prompts = draft.prompts
    given = f"{count(prompts.count, 'prompt')}, {prompts.source}" if prompts else "prompts made by the analysis"
    return f"{draft.spec or 'no model'} · {given}"


def _submit(cls: type[Analysis], draft: Draft, spec: ModelSpec, kind: Literal["run", "estimate"]) -> None:
    """Start a job; what the last one ended with is not shown any more, even where this one is refused."""
    key = f"job:{cls.name}"
    st.session_state.pop(key, None)
    try:
        folder = run_folder(draft.name or run_name(cls.name, spec.ref))
        prompts = _file(cls, draft.options, draft.prompts)
        request = Request(kind, spec, cls.name, draft.options, prompts, str(store_root()), str(folder))
        st.session_state[key] = queue().submit(request)
    except UserError as error:
        st.error(str(error), icon=":material/block:")
        return
    st.session_state[f"fold:{cls.name}"] = kind == "run"
    st.rerun()


def _file(cls: type[Analysis], options: dict[str, Any], prompts: PromptSet | None) -> str | None:
    if prompts is not None:
        return str(prompts.save())
    if not cls(**options).makes_prompts:
        raise OptionError(f"{cls.title} needs prompts: type some, upload a file, or take a shipped set")
    return None
