"""The model: what it is, the identities it keeps, and the points it refuses."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from app.jobs.protocol import Request
from app.jobs.queue import queue
from app.saved import saved_runs
from app.ui import progress
from app.views.setup import draw_model
from probes.errors import UserError

JOB = "job:check"


def draw() -> None:
    """The page."""
    st.title("Model", anchor=False)
    st.caption(
        "Loading a model checks, on a real forward pass, that the tensors read from it add up: streams to streams, the last lens to the "
        "logits. Every result carries this stamp."
    )
    spec = draw_model()
    if (
        st.button(
            "Load and check",
            type="primary",
            key="model:check",
            disabled=spec is None,
            help="Loads the model in the worker process; seconds to minutes.",
        )
        and spec
    ):
        try:
            st.session_state[JOB] = queue().submit(Request("check", spec))
        except UserError as error:
            st.error(str(error), icon=":material/block:")
        else:
            st.rerun()
    for job in progress.jobs_of(JOB, lambda request: request.kind == "check"):
        if progress.follow(job):
            _stamp(queue().status(job).answer)
    _saved()


def _stamp(stamp: dict[str, Any]) -> None:
    st.subheader(str(stamp["ref"]), anchor=False)
    apart = ("ref", "tokenizer", "identities", "refused")
    named = [(name, str(value)) for name, value in stamp.items() if name not in apart]
    facts = pd.DataFrame(named, columns=["what", "value"])
    left, right = st.columns([1, 2])
    left.dataframe(facts, hide_index=True, key="model:facts", alt="Sizes and settings of the model")
    with right:
        draw_identities(stamp["identities"], "model:identities")
    _refused(stamp["refused"])
    if not stamp["tokenizer"]:
        st.info("This model came without a tokenizer: give prompts as token ids.", icon=":material/info:")


def draw_identities(identities: list[dict[str, Any]], key: str) -> None:
    """The identities with their errors."""
    rows = [
        {"holds": "✓ holds" if i["holds"] else "✗ FAILS", **{k: i[k] for k in ("name", "error", "tolerance")}}
        for i in identities
    ]
    config = {
        name: st.column_config.NumberColumn(name, format="%.1e", help="Relative to the largest value")
        for name in ("error", "tolerance")
    }
    st.dataframe(
        pd.DataFrame(rows), hide_index=True, key=key, column_config=config, alt="Identities and their relative errors"
    )


def _refused(refused: dict[str, str]) -> None:
    if refused:
        st.markdown("**Points this model does not have**")
        table = pd.DataFrame(refused.items(), columns=["point", "reason"])
        st.dataframe(table, hide_index=True, key="model:refused", alt="Points that are refused, with the reason")


def _saved() -> None:
    st.subheader("Models of the saved runs", anchor=False)
    seen: dict[tuple[str, ...], Any] = {}
    for run in saved_runs():
        provenance = run.provenance
        seen.setdefault(
            (provenance["model"]["weights"], provenance["backend"], provenance["dtype"], provenance["attention"]), run
        )
    if not seen:
        st.info("No saved run yet.", icon=":material/water:")
        return
    for number, run in enumerate(list(seen.values())[:20]):
        provenance, stamp = run.provenance, run.provenance["faithfulness"]
        verdict = "all identities hold" if stamp["holds"] else "SOME IDENTITIES FAIL"
        head = f"{run.model} · {provenance['model']['architecture']} · {run.layers} layers · {provenance['backend']} · {provenance['dtype']} · {verdict}"
        with st.expander(head, expanded=number == 0, key=f"model:saved:{number}"):
            draw_identities(stamp["identities"], f"model:saved-identities:{number}")
            for point, reason in stamp["refused"].items():
                st.caption(f"refused: `{point}`: {reason}")
