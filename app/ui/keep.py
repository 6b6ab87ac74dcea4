"""Widget values that outlive a change of page: those whose key begins with `keep:`.

Streamlit forgets a widget that a run did not draw; a copy of its value beside the widgets brings it back.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

PREFIX = "keep:"
_COPY = "kept"


def keep() -> None:
    """Copy what widgets hold, and give back what they forgot; call it before any is drawn."""
    kept = _copy()
    kept.update({str(name): value for name, value in st.session_state.items() if str(name).startswith(PREFIX)})
    for name, value in kept.items():
        st.session_state[name] = value


def begin(name: str, value: Any) -> str:
    """Give a widget its first value, unless it has one; return its key."""
    if name not in st.session_state:
        st.session_state[name] = value
    return name


def _copy() -> dict[str, Any]:
    if _COPY not in st.session_state:
        st.session_state[_COPY] = {}
    kept: dict[str, Any] = st.session_state[_COPY]
    return kept
