"""Saved runs: opened, compared side by side, deleted."""

from __future__ import annotations

from functools import partial

import pandas as pd
import streamlit as st

from analyses.results.depth_axis import Curve, Panel, depth_figure, narrowest
from app import offered
from app.places import runs_root
from app.saved import Profile, Run, delete_run, profiles_of, saved_runs
from app.selection import current
from app.ui import selector
from app.ui.takeaway import figure_downloads
from app.ui.theme import draw_depth
from probes.errors import UserError

A, B = "#0072B2", "#D55E00"
"""The colours of the two runs compared."""


def draw() -> None:
    """The page."""
    st.title("Saved runs", anchor=False)
    runs = saved_runs()
    st.caption(f"Folder of runs: `{runs_root()}`")
    if not runs:
        st.info(
            "No saved run yet. Run an analysis, here or with `bathyscope run` into this folder.",
            icon=":material/water:",
        )
        return
    st.dataframe(_table(runs), hide_index=True, key="runs:list", alt="Saved runs, newest first")
    names = {run.name: run for run in runs}
    tabs = st.tabs(["Open", "Compare two", "Delete"], key="runs:tab", on_change="rerun")
    for tab, draw_tab in zip(tabs, (_open, _compare, _delete), strict=True):
        if tab.open:
            with tab:
                draw_tab(names)


def _table(runs: list[Run]) -> pd.DataFrame:
    rows = [
        {
            "run": run.name,
            "analysis": offered.label(run.analysis),
            "model": run.model,
            "edits": "; ".join(run.edits),
            "layers": run.layers,
            "prompts": run.provenance["counts"].get("prompts"),
            "forwards": run.provenance["counts"].get("forwards"),
            "seconds": run.provenance.get("seconds"),
            "created": run.created[:16].replace("T", " "),
            "holds": run.provenance["faithfulness"]["holds"],
        }
        for run in runs
    ]
    table = pd.DataFrame(rows)
    return table if table["edits"].any() else table.drop(columns="edits")


def _open(names: dict[str, Run]) -> None:
    from app.ui.results import draw_chosen

    draw_chosen(names, "Run", "keep:open", "open")


def _compare(names: dict[str, Run]) -> None:
    if len(names) < 2:
        st.info("There is one run: save another to compare it with.", icon=":material/compare:")
        return
    left, right = st.columns(2)
    first = names[left.selectbox("First run", list(names), key="keep:compare:a")]
    second = names[right.selectbox("Second run", list(names), index=1, key="keep:compare:b")]
    if first.name == second.name:
        st.info("Choose two different runs.", icon=":material/compare:")
        return
    _differences(first, second)
    _overlay(first, second)
    _side_by_side(first, second)


def _differences(first: Run, second: Run) -> None:
    facts = {run.name: _facts(run) for run in (first, second)}
    keys = list(dict.fromkeys([*facts[first.name], *facts[second.name]]))
    rows = [(k, facts[first.name].get(k, ""), facts[second.name].get(k, "")) for k in keys]
    table = pd.DataFrame([row for row in rows if row[1] != row[2]], columns=["what", first.name, second.name])
    st.markdown("**What differs between the runs**")
    if len(table):
        st.dataframe(table, hide_index=True, key="compare:facts", alt="Options and provenance that differ")
    else:
        st.caption("Nothing: same model, options and prompts.")


def _facts(run: Run) -> dict[str, str]:
    provenance = run.provenance
    named = {
        "analysis": run.analysis, "model": run.model, "weights": provenance["model"]["weights"], "backend": provenance["backend"],
        "dtype": provenance["dtype"], "attention": provenance["attention"], "device": provenance["device"],
        "edits": "; ".join(run.edits), "prompts file": provenance.get("prompts_file"),
        **{f"count: {k}": v for k, v in provenance["counts"].items()},
        **{f"option: {k}": v for k, v in run.record["options"].items()},
    }  # fmt: skip
    return {name: str(value) for name, value in named.items()}


def _overlay(first: Run, second: Run) -> None:
    if first.layers != second.layers:
        st.caption(f"Layers are not overlaid: {first.layers} against {second.layers}.")
        return
    of_first, of_second = profiles_of(first), profiles_of(second)
    shared = [(p, q) for p in of_first for q in of_second if (p.analysis, p.name) == (q.analysis, q.name)]
    panels = [
        Panel(
            p.title,
            p.unit,
            (Curve(first.name, A, p.table, first.layers), Curve(second.name, B, q.table, second.layers)),
        )
        for p, q in shared
    ]
    panels = panels or [*_alone(of_first[:3], A, first.layers), *_alone(of_second[:3], B, second.layers)]
    if not panels:
        return
    selector.offer(selector.Offer(first.layers))
    layers = [layer for layer in current().layers if layer < first.layers]
    st.markdown("**Layer by layer**")
    draw = partial(depth_figure, panels, first.layers, layers, legend=True)
    alt = f"Profiles of {first.name} and {second.name}"
    draw_depth(draw, narrowest(panels), "compared", key="compare:depth", alt=alt)
    figure_downloads(lambda: draw("light"), "compared", "compare")


def _alone(profiles: list[Profile], colour: str, n_layers: int) -> list[Panel]:
    return [Panel(p.title, p.unit, (Curve(p.run, colour, p.table, n_layers),)) for p in profiles]


def _side_by_side(first: Run, second: Run) -> None:
    from app.ui.results import draw_facts, draw_figure, opened

    columns = st.columns(2)
    for column, run, side in zip(columns, (first, second), "ab", strict=True):
        with column:
            st.markdown(f"**`{run.name}`**")
            draw_facts(run)
            result = opened(run)
            if result and (specs := result.figures):
                name = st.selectbox(
                    "Figure",
                    list(specs),
                    key=f"compare:figure:{side}:{run.analysis}",
                    format_func=lambda n, s=specs: s[n].title,
                )
                draw_figure(run, result, name, f"compare-{side}")


def _delete(names: dict[str, Run]) -> None:
    chosen = st.multiselect("Runs to delete", list(names), key="delete:names")
    sure = st.checkbox("Delete their folders for good; what the store holds stays.", key="delete:sure")
    if st.button("Delete", type="primary", disabled=not (chosen and sure), key="delete:go"):
        for name in chosen:
            try:
                delete_run(names[name])
            except (UserError, OSError) as error:
                st.error(f"{name}: {error}", icon=":material/block:")
                return
        st.toast(f"Deleted {', '.join(chosen)}.")
        st.rerun()
