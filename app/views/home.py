"""The first page: the model as a column of layers, and what every saved run says of each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pandas as pd
import streamlit as st

from analyses.results.depth_axis import Curve, Mark, Panel, depth_figure, narrowest, peak
from analyses.results.theme import colour_of
from app import offered
from app.places import runs_root
from app.saved import Profile, Run, open_run, profiles_of, saved_runs
from app.selected_rows import narrowed
from app.selection import Selection, current, select
from app.ui import selector
from app.ui.takeaway import figure_downloads, table_downloads
from app.ui.theme import draw_depth
from app.ui.truth import in_words, true_marks

MOST = 12
"""Panels drawn beside each other."""


def draw() -> None:
    """The page."""
    runs = saved_runs()
    st.title("Where in the depth does it happen?", anchor=False)
    if not runs:
        _empty()
        return
    models = list(dict.fromkeys(run.subject for run in runs))
    left, right = st.columns([1, 2])
    model = left.selectbox("Model", models, key="keep:home:model", help="Runs on one model share one layer axis.")
    own_runs = [run for run in runs if run.subject == model]
    newest = {run.analysis: run.name for run in reversed(own_runs)}
    order = [name for name in offered.names() if name in newest] + [n for n in newest if n not in offered.names()]
    chosen = right.multiselect(
        "Saved runs", [run.name for run in own_runs], default=[newest[name] for name in order], key=f"home:runs:{model}",
        help="The newest run of each analysis, unless you choose others.",
    )  # fmt: skip
    shown = [run for name in chosen for run in own_runs if run.name == name]
    if not shown:
        st.info("Choose a saved run above to see its layers.", icon=":material/arrow_upward:")
        return
    selector.offer(_offer(shown))
    _profiles(shown)


def _empty() -> None:
    st.info(
        f"No saved run in `{runs_root()}` yet. Open an analysis in the side bar and press **Run**, or start with "
        "`bathyscope demo --out runs/demo`, which fills this page.",
        icon=":material/water:",
    )


def _offer(runs: list[Run]) -> selector.Offer:
    """What the newest run tells apart; prompts and tokens are those of all shown runs on the same prompts."""
    of = runs[0].prompts
    prompts = max(int(run.provenance["counts"].get("prompts", 0)) for run in runs if run.prompts == of)
    seen: selector.Offer = st.session_state.get("offer", selector.Offer())
    known = seen if seen.of == of else selector.Offer()
    named = known.prompts or dict.fromkeys(range(prompts), "")
    return selector.Offer(runs[0].layers, named, known.tokens, known.heads, of)


def _profiles(runs: list[Run]) -> None:
    selection = current()
    profiles = [profile for run in runs for profile in profiles_of(run)]
    if not profiles:
        st.info("These runs say nothing of single layers. Open them under Runs.", icon=":material/info:")
        return
    labels = {_label(profile, runs): profile for profile in profiles}
    first = {profile.run: label for label, profile in reversed(labels.items())}
    default = [label for label in labels if label in first.values()][:MOST]
    chosen = st.pills(
        "Profiles", list(labels), selection_mode="multi", default=default, key=f"home:profiles:{','.join(r.name for r in runs)}",
        help="What is drawn for each layer. Up to twelve are drawn beside each other.",
    )  # fmt: skip
    profiles = [labels[label] for label in chosen][:MOST]
    if not profiles:
        st.info("Choose at least one profile.", icon=":material/arrow_upward:")
        return
    followed, said = _followed(profiles, runs, selection)
    _peaks(followed)
    marks = true_marks(runs[0].model)
    _figure(followed, runs[0].layers, selection, marks)
    if marks:
        st.caption(in_words(marks))
    if said:
        st.caption(said)
    _explain(followed, runs)
    _at_layers(followed, selection)


def _peaks(profiles: list[Profile]) -> None:
    """Where each profile is largest, in words: read before the figure is drawn, and without seeing it."""
    peaks = [(profile.title, peak(profile.table)) for profile in profiles]
    st.caption(
        "Layer at which each is largest: " + " · ".join(f"{t} **{layer}**" for t, layer in peaks if layer is not None)
    )


def _label(profile: Profile, runs: list[Run]) -> str:
    several = sum(run.analysis == profile.analysis for run in runs) > 1
    return f"{profile.title} ({profile.run})" if several else profile.title


def _followed(profiles: list[Profile], runs: list[Run], selection: Selection) -> tuple[list[Profile], str]:
    """The profiles of the selected prompts, tokens and heads, where a run's tables tell them apart."""
    if not Selection(prompts=selection.prompts, tokens=selection.tokens, heads=selection.heads):
        return profiles, ""
    profiles_cut, whole, foreign = [], list[str](), list[str]()
    by_name = {run.name: run for run in runs}
    for profile in profiles:
        run = by_name[profile.run]
        cut = _cut(profile, run, replace(selection.of_run(run.prompts), layers=()))
        profiles_cut.append(cut or profile)
        if cut is None:
            (foreign if selection.left_out(run.prompts) else whole).append(profile.title)
    said = f"Drawn from {replace(selection, layers=()).text()}."
    said += f" Not told apart, so over everything: {', '.join(whole)}." if whole else ""
    said += f" Of other prompts, so over everything: {', '.join(foreign)}." if foreign else ""
    return profiles_cut, said


def _cut(profile: Profile, run: Run, part: Selection) -> Profile | None:
    if not part:
        return None
    result = open_run(run)
    tables = {name: narrowed(table, part) for name, table in result.tables.items()}
    tables = {name: table if len(table) else result.tables[name] for name, table in tables.items()}
    try:
        table = result.profiles[profile.name].read(tables)
    except (KeyError, ValueError, IndexError):
        return None
    if table["value"].to_numpy().tolist() == profile.table["value"].to_numpy().tolist():
        return None
    return Profile(profile.run, profile.analysis, profile.name, profile.title, profile.unit, profile.caption, table)


def _figure(profiles: list[Profile], n_layers: int, selection: Selection, marks: tuple[Mark, ...]) -> None:
    order = list(offered.names())
    panels = [
        Panel(p.title, p.unit, (Curve(p.run, colour_of(p.analysis, order), p.table, n_layers),)) for p in profiles
    ]
    layers = [layer for layer in selection.layers if layer < n_layers]

    def chosen() -> None:
        points = st.session_state["home:depth"]["selection"]["points"]
        select(layers=sorted({int(point["y"]) for point in points if "y" in point}))

    draw = partial(depth_figure, panels, n_layers, layers, truth=marks)
    words = ", ".join(p.title for p in profiles)
    alt = f"One panel for each of {words}; layer 0 at the bottom of {n_layers}. The numbers are in the table below."
    choosing = {"on_select": chosen, "selection_mode": ("points", "box")}
    draw_depth(draw, narrowest(panels), "depth", key="home:depth", alt=alt, **choosing)
    left, right = st.columns([1, 3])
    with left:
        figure_downloads(lambda: draw("light"), "depth", "home")
    right.caption(
        "Click a layer or a point to select it on every page; with Shift, several. Bands are 95 % intervals where a run has them."
    )


def _explain(profiles: list[Profile], runs: list[Run]) -> None:
    with st.expander("What am I looking at?", icon=":material/help:"):
        for profile in profiles:
            st.markdown(
                f"**{profile.title}** ({offered.label(profile.analysis)}, run `{profile.run}`). {profile.caption}"
            )
        worst = [run.name for run in runs if not run.provenance.get("faithfulness", {}).get("holds", True)]
        if worst:
            st.warning(
                f"The model's identities did not all hold in {', '.join(worst)}: see the Model page.",
                icon=":material/warning:",
            )


def _at_layers(profiles: list[Profile], selection: Selection) -> None:
    tables = [
        p.table.assign(analysis=offered.label(p.analysis), profile=p.title, unit=p.unit, run=p.run) for p in profiles
    ]
    columns = ["layer", "profile", "value", "ci_low", "ci_high", "unit", "run", "analysis"]
    table = pd.concat(tables, ignore_index=True).reindex(columns=columns)
    cut = table[table["layer"].isin(selection.layers)] if selection.layers else table
    where = f"layers {', '.join(map(str, selection.layers))}" if selection.layers else "every layer"
    st.subheader(f"The numbers at {where}", anchor=False)
    st.dataframe(cut, hide_index=True, height=300, key="home:numbers", alt=f"Profile values at {where}")
    table_downloads(cut, "profiles", "home-table")
