"""A saved run: its facts, its figures and its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from urllib.parse import quote

import streamlit as st

from analyses.results.card import Tables
from analyses.results.result import Result
from analyses.results.theme import SELECTED
from analyses.running.model_spec import ModelSpec
from app.saved import Run, open_run
from app.selection import Selection, current, select
from app.ui import selector
from app.ui.figures import Drawing, clicked_layers, data_of, drawn
from app.ui.keep import begin
from app.ui.live_take import PARAMETER
from app.ui.tables import draw_table
from app.ui.takeaway import figure_downloads, rebuild
from app.ui.theme import mode, restyled
from app.ui.window import WIDTH, longest
from probes.errors import UserError
from probes.html_card import count


def draw_result(run: Run, result: Result, key: str) -> None:
    """Everything a saved run has, one figure and one table at a time."""
    selector.offer(_offer(str(run.folder), run.stamp, run.prompts, result))
    if left := current().left_out(run.prompts):
        st.info(left, icon=":material/filter_alt_off:")
    draw_facts(run)
    for note in result.notes:
        st.caption(f":material/info: {note}")
    if result.figures:
        _figures(run, result, key)
    st.subheader("Tables", anchor=False)
    name = st.pills(
        "Table",
        list(result.tables),
        default=next(iter(result.tables)),
        key=f"table-of:{key}",
        label_visibility="collapsed",
    )
    if name:
        draw_table(
            result.tables[name], current().of_run(run.prompts), f"{result.analysis}-{name}", f"{key}:{name}:{run.name}",
            run.prompts,
        )  # fmt: skip
    rebuild(run, result)


def draw_chosen(runs: Mapping[str, Run], label: str, widget: str, key: str, help_: str | None = None) -> None:
    """A choice of saved runs, at first the one that the address names, else the first; and the chosen one."""
    if st.session_state.get(widget) not in runs:
        requested = st.query_params.get("run")
        st.session_state[widget] = requested if requested in runs else next(iter(runs))
    run = runs[st.selectbox(label, list(runs), key=widget, help=help_)]
    if result := opened(run):
        draw_result(run, result, key)


def opened(run: Run) -> Result | None:
    """A run's result; None where it cannot be read, which the page says."""
    try:
        return open_run(run)
    except UserError as error:
        st.error(str(error), icon=":material/broken_image:")
        return None


def draw_facts(run: Run) -> None:
    """Model, prompts, cost and faithfulness in a line."""
    provenance, counts = run.provenance, run.provenance["counts"]
    stamp = provenance["faithfulness"]
    badge = (
        f":green-badge[{len(stamp['identities'])} identities hold]"
        if stamp["holds"]
        else ":red-badge[identities FAIL: see Model]"
    )
    facts = [
        f":blue-badge[{run.subject}]",
        f":gray-badge[{count(counts.get('prompts', 0), 'prompt')}, {count(counts.get('tokens', 0), 'token')}]",
        f":gray-badge[{count(counts.get('forwards', 0), 'forward pass')}]",
        f":gray-badge[{provenance['backend']} · {provenance['dtype']} · {provenance['attention']} · {provenance['device']}]",
        f":gray-badge[{provenance.get('seconds', 0):.1f} s · {run.created[:16].replace('T', ' ')}]",
        badge,
    ]
    st.markdown(" ".join(facts))


def _figures(run: Run, result: Result, key: str) -> None:
    specs = result.figures
    name = st.pills(
        "Figure", list(specs), default=next(iter(specs)), key=f"figure-of:{key}", label_visibility="collapsed",
        format_func=lambda n: specs[n].title,
    )  # fmt: skip
    if not name:
        st.info("Choose a figure above.", icon=":material/arrow_upward:")
        return
    draw_figure(run, result, name, key)


def draw_figure(run: Run, result: Result, name: str, key: str) -> None:
    """One figure with what it says, its numbers and its downloads."""
    spec, selection = result.figures[name], current().of_run(run.prompts)
    widget = f"figure:{key}:{name}"
    end = st.session_state.get(f"window:{widget}:{run.name}")
    drawing = made_figure(str(run.folder), run.stamp, name, selection, mode(), end, result)
    figure, said = drawing.figure, drawing.said
    st.subheader(spec.title, anchor=False)
    if drawing.windowed:
        last = longest(result.tables)
        window = begin(f"window:{widget}:{run.name}", last)
        st.slider("Positions shown end before", WIDTH, last, key=window, help="Shorter prompts show their own end.")

    def chosen() -> None:
        points = [dict(point) for point in st.session_state[widget]["selection"]["points"]]
        layers = clicked_layers(figure, points, run.layers)
        if layers is not None:
            select(layers=layers)

    st.plotly_chart(
        figure, key=widget, on_select=chosen, selection_mode=("points", "box"),
        width="content" if figure.layout.width else "stretch",
        config={"displaylogo": False, "toImageButtonOptions": {"format": "svg", "filename": f"{result.analysis}-{name}"}},
        alt=f"{spec.title}. {spec.caption}",
    )  # fmt: skip
    if spec.live is not None:
        _offer_live(run, spec.live, result, widget)
    if said:
        st.caption(f":material/filter_alt: {said}")
    st.markdown(f"**What am I looking at?** {spec.caption}")
    st.caption(f"Method: {result.card.reference}")
    left, right = st.columns([1, 3])
    with left:
        figure_downloads(
            lambda: made_figure(str(run.folder), run.stamp, name, selection, "light", end, result).figure,
            f"{result.analysis}-{name}",
            widget,
        )
    with right.expander("The numbers of this figure", key=f"numbers:{widget}", on_change="rerun") as numbers:
        if numbers.open:
            st.dataframe(
                data_of(figure), hide_index=True, height=260, key=f"data:{widget}", alt=f"Numbers of {spec.title}"
            )


def _offer_live(run: Run, live: Callable[[Tables, str], Sequence[str]], result: Result, widget: str) -> None:
    """Offer what was clicked as a session of the Live page."""
    points = (st.session_state.get(widget) or {}).get("selection", {}).get("points", [])
    names = [str(point["customdata"][0]) for point in map(dict, points) if point.get("customdata")]
    lines = live(result.tables, names[0]) if names else []
    if not lines:
        st.caption(":material/touch_app: Click a cell to open it Live.")
        return
    session = "\n".join([f"model {ModelSpec.of(run.provenance)}", *lines])
    st.link_button(f"Open {names[0]} Live", f"live?{PARAMETER}={quote(session)}", icon=":material/touch_app:")


@st.cache_resource(max_entries=32, ttl=1800, show_spinner="Drawing …")
def made_figure(
    folder: str, stamp: int, name: str, selection: Selection, kind: str, end: int | None, _result: Result
) -> Drawing:
    """A figure as a page of that kind shows it, drawn once for each run, selection, window and theme; not to be changed."""
    drawing = drawn(_result, name, selection, SELECTED[kind], end)
    return replace(drawing, figure=restyled(drawing.figure, kind))


@st.cache_resource(max_entries=32, ttl=1800, show_spinner=False)
def _offer(folder: str, stamp: int, of: str, _result: Result) -> selector.Offer:
    return selector.offer_of(_result, of)
