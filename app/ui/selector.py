"""The side bar's choice of layers, prompts, tokens and heads, which every page follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import streamlit as st

from app.selection import HEADS, KINDS, clear, current, select, settle

if TYPE_CHECKING:
    import pandas as pd

    from analyses.results.result import Result

HELP = {
    "layers": "Marked in every figure, kept in every table. A click on a depth axis does the same.",
    "prompts": "Figures and tables show these prompts only, as far as they tell prompts apart.",
    "tokens": "Positions from 0 within each prompt.",
    "heads": "Layer and head, both from 0, of analyses that tell heads apart.",
}
MOST = 2000
"""Values offered of each kind."""


@dataclass(frozen=True)
class Offer:
    """What can be selected on the runs that are open."""

    layers: int = 0
    prompts: dict[int, str] = field(default_factory=dict)
    """Index to the prompt's beginning, where it is known."""
    tokens: int = 0
    heads: tuple[str, ...] = ()
    of: str = ""
    """Which prompts those are, as `Run.prompts` says it."""


def offer_of(result: Result, of: str = "") -> Offer:
    """What the tables of a result tell apart."""
    prompts: dict[int, str] = {}
    tokens, heads = 0, set()
    for table in result.tables.values():
        if "prompt" in table and len(table):
            words = _words(table)
            numbers = table["prompt"].astype(int).unique().tolist()
            prompts |= {p: prompts.get(p) or words.get(p, "") for p in numbers}
        if "position" in table and table["position"].dtype.kind == "i" and len(table):
            tokens = max(tokens, int(table["position"].max()) + 1)
        for layer, head in HEADS:
            if {layer, head} <= set(table):
                heads |= set(zip(table[layer].astype(int), table[head].astype(int), strict=True))
    named = tuple(f"{layer}.{head}" for layer, head in sorted(heads))
    return Offer(int(result.provenance["model"]["layers"]), dict(sorted(prompts.items())), tokens, named, of)


def _words(table: pd.DataFrame) -> dict[int, str]:
    """The beginning of each prompt, where the table has its text or its tokens."""
    if "text" in table:
        return dict(table.groupby("prompt")["text"].first().astype(str))
    own = ("input_token",) if "input_token" in table else ("token",) if "token_class" in table else ()
    column = next((c for c in own if c in table), None)  # other tables' tokens are predictions
    if column is None or "position" not in table or table["position"].dtype.kind != "i":
        return {}
    first = table.drop_duplicates(["prompt", "position"]).sort_values(["prompt", "position"])
    return {p: "".join(group[column].astype(str))[:48] for p, group in first.groupby(first["prompt"].astype(int))}


def offer(offered: Offer) -> None:
    """Say what this page's runs let one select."""
    st.session_state["offer"] = offered
    settle(offered.of)


def draw() -> None:
    """The side bar's widgets."""
    offered: Offer = st.session_state.get("offer", Offer())
    st.subheader("Selection", anchor=False)
    if left := current().left_out(offered.of):
        st.caption(f":material/filter_alt_off: {left}")
    _choose("layers", range(offered.layers))
    _choose("prompts", list(offered.prompts), offered.prompts)
    _choose("tokens", range(offered.tokens))
    _choose("heads", offered.heads)
    st.button(
        "Clear the selection", on_click=clear, disabled=not current(), width="stretch", icon=":material/filter_alt_off:"
    )


def _choose(kind: str, options: Sequence[int] | Sequence[str] | range, words: dict[int, str] | None = None) -> None:
    of = st.session_state.get("offer", Offer()).of
    chosen = list(getattr(current().of_run(of), kind))
    choices = list(dict.fromkeys([*list(options)[:MOST], *chosen]))
    key = f"choose:{kind}"
    st.session_state[key] = chosen
    st.multiselect(
        kind.capitalize(), choices, key=key, help=HELP[kind], disabled=not choices, placeholder="all" if choices else "none here",
        format_func=lambda value: f"{value} · {words[value]}" if words and words.get(value) else str(value),
        on_change=lambda: select(**{kind: st.session_state[key]}, of=of),
    )  # fmt: skip


assert set(HELP) == set(KINDS)
