"""Setting up a run: model, prompts, options, cost, and the start."""

from __future__ import annotations

from typing import Any

import streamlit as st

from analyses.base import Analysis
from app.jobs.protocol import Request
from app.jobs.queue import queue
from app.places import run_folder, store_root
from app.prompt_sets import PromptSet
from app.saved import Run, saved_runs
from app.ui.keep import begin, forget
from app.ui.options import draw_options, set_options
from app.ui.prompts import draw_prompts
from probes.errors import OptionError, UserError
from probes.models import list_models
from probes.models.handover import BACKENDS
from probes.models.load import ATTENTIONS, DTYPES

DEFAULT = "smollm2-135m"


def draw_setup(cls: type[Analysis], runs: list[Run]) -> None:
    """The form of a new run, from model to start."""
    _copy(cls, runs)
    loading = draw_model()
    problem = None
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
    _start(cls, loading, prompts, options, problem)


def draw_model() -> dict[str, Any]:
    """Which model, and how it is loaded: keyword arguments of `analyses.cli.run.Loading`."""
    at_hand = [info.ref for info in list_models()]
    refs = list(dict.fromkeys([DEFAULT, *(run.model for run in saved_runs()), *at_hand]))
    ref = st.selectbox(
        "Model", refs, key="keep:model", accept_new_options=True,
        help="A named model, a hub id, a folder or a .gguf file; type what is not listed.",
    )  # fmt: skip
    with st.expander("How the model is loaded", key="keep:loading"):
        columns = st.columns(4)
        backend = columns[0].selectbox("Backend", list(BACKENDS), key="keep:backend", help="What runs the model.")
        dtype = columns[1].selectbox(
            "Precision", DTYPES, key="keep:dtype", help="auto: float32 on a CPU, the checkpoint's own on CUDA."
        )
        attention = columns[2].selectbox(
            "Attention", ATTENTIONS, key="keep:attention", help="The implementation of attention."
        )
        device = columns[3].text_input("Device", key=begin("keep:device", "auto"), help="auto, cpu, cuda or cuda:N.")
    return {
        "model": str(ref or "").strip(),
        "backend": backend,
        "dtype": dtype,
        "attention": attention,
        "device": device,
    }


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


def _start(
    cls: type[Analysis],
    loading: dict[str, Any],
    prompts: PromptSet | None,
    options: dict[str, Any],
    problem: str | None,
) -> None:
    key = begin(f"keep:name:{cls.name}", _free(cls.name))
    left, right = st.columns([2, 1], vertical_alignment="bottom")
    name = left.text_input(
        "Name of the run", key=key, help="Its folder inside the folder of runs, as `--out` on the command line."
    )
    replace = right.toggle("Replace a run of that name", key=f"replace:{cls.name}")
    run, cost, _ = st.columns([1, 1, 3])
    pressed = run.button("Run", type="primary", key=f"run:{cls.name}", disabled=problem is not None, width="stretch")
    asked = cost.button(
        "Estimate cost", key=f"cost:{cls.name}", disabled=problem is not None, width="stretch",
        help="Loads the model and plans: forward passes, rows, bytes, seconds. Runs nothing.",
    )  # fmt: skip
    if not pressed and not asked:
        return
    try:
        request = Request(
            "run" if pressed else "estimate",
            loading,
            cls.name,
            options,
            _file(cls, options, prompts),
            str(store_root()),
            _out(name, replace),
        )
        st.session_state[f"job:{cls.name}"] = queue().submit(request)
    except UserError as error:
        st.error(str(error), icon=":material/block:")
        return
    if pressed:
        forget(key)
        st.session_state[f"follow:{cls.name}"] = name
    st.rerun()


def _out(name: str, replace: bool) -> str:
    folder = run_folder(name)
    if folder.exists() and not replace:
        raise OptionError(f"a run named {name!r} is there already: take another name, or tick that it may be replaced")
    return str(folder)


def _file(cls: type[Analysis], options: dict[str, Any], prompts: PromptSet | None) -> str | None:
    if prompts is not None:
        return str(prompts.save())
    if not cls(**options).makes_prompts:
        raise OptionError(f"{cls.title} needs prompts: type some, upload a file, or take a shipped set")
    return None


def _free(name: str) -> str:
    """A run name that is not taken."""
    taken = {run.name for run in saved_runs()}
    number, made = 1, name
    while made in taken or run_folder(made).exists():
        number += 1
        made = f"{name}-{number}"
    return made
