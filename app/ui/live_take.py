"""Taking a live session along: as a command, as Python, as a notebook, as a link, as a file, as a job on many prompts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

import streamlit as st

from app import offered
from app.jobs.protocol import Request
from app.jobs.queue import queue
from app.live.named_model import model_of
from app.places import NAME, run_folder, run_name, runs_root, store_root
from app.ui import progress
from app.ui.live_desk import Desk
from probes.errors import OptionError, UserError

PARAMETER = "live"
SUFFIX = ".session"
READERS = ("logit_lens", "voids", "concept_depth", "latent_language")
"""Analyses that read a model without changing it, so that they can be run under edits."""


def sessions_root() -> Path:
    """The folder of saved sessions."""
    return runs_root() / ".sessions"


def command(session: str, data: dict[str, Any]) -> str:
    """The command line of a session."""
    parts = ["bathyscope", "edit", *model_of(session).flags(), "--text", data["text"]]
    parts += ["--other", data["other"]] if data["other"] is not None else []
    parts += [part for step in data["steps"] if step["on"] for part in ("--edit", step["text"])]
    parts += ["--watch", watch_text(data["watch"])] if data["watch"] else []
    return shlex.join(parts)


def watch_text(tokens: list[str]) -> str:
    """Tokens as a command line and a form have them: words by commas where each begins with one blank, else in quotes."""
    plain = all(token[:1] == " " and token[1:] == token.strip() and not set(token) & set(",'\"") for token in tokens)
    return ", ".join(token[1:] for token in tokens) if plain else " ".join(map(repr, tokens))


def python(session: str) -> str:
    """The Python of a session."""
    return "\n".join([
        "from probes import load_model",
        "from probes.session import Session",
        "",
        f"model = {model_of(session).python()}",
        f"session = Session.parse({session!r}, model)",
        "session.compare()",
    ])  # fmt: skip


def notebook(session: str) -> bytes:
    """A notebook of a session."""
    cells = [
        {"cell_type": "markdown", "id": "about", "metadata": {}, "source": "A session of Bathyscope's Live page."},
        *({"cell_type": "code", "id": f"cell{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
          for i, source in enumerate([python(session), "session.everywhere().lines(session.tokens)"])),
    ]  # fmt: skip
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}).encode()


def draw_take(desk: Desk, data: dict[str, Any]) -> None:
    """Draw what can be taken along."""
    assert desk.now is not None
    session = desk.now.session
    st.caption("Command")
    st.code(command(session, data), language="bash", wrap_lines=True)
    st.caption("Python")
    st.code(python(session), language="python", wrap_lines=True)
    st.caption("Link to this session")
    st.code(f"{st.context.url or ''}?{PARAMETER}={quote(session)}", language=None, wrap_lines=True)
    left, right = st.columns(2)
    left.download_button("Notebook", notebook(session), "live.ipynb", "application/x-ipynb+json", key="live:notebook",
                         on_click="ignore", icon=":material/download:")  # fmt: skip
    right.download_button("Session file", f"{session}\n", f"live{SUFFIX}", "text/plain", key="live:file", on_click="ignore",
                          icon=":material/download:")  # fmt: skip
    _draw_saved(desk, session)
    _draw_job(desk, session, data)
    desk.say_refusal("take")


def _draw_saved(desk: Desk, session: str) -> None:
    def save() -> None:
        desk.refused_at, name = "take", str(st.session_state["live:name"]).strip()
        if not NAME.fullmatch(name):
            desk.refusal = f"session name {name!r}: use letters, digits, dots, dashes and underscores"
            return
        sessions_root().mkdir(parents=True, exist_ok=True)
        (sessions_root() / f"{name}{SUFFIX}").write_text(f"{session}\n", encoding="utf-8")
        desk.refusal = ""
        st.session_state["live:kept"] = name

    def reopen() -> None:
        if name := st.session_state["live:saved"]:
            desk.open((sessions_root() / f"{name}{SUFFIX}").read_text(encoding="utf-8"), f"reopened {name}", "take")

    left, right = st.columns([3, 1], vertical_alignment="bottom")
    left.text_input("Save as", key="live:name", placeholder="eiffel-patched")
    right.button("Save", on_click=save, key="live:save", width="stretch", icon=":material/save:")
    if kept := st.session_state.pop("live:kept", None):
        st.caption(f":material/check: Session {kept} is saved.")
    if names := sorted(path.name.removesuffix(SUFFIX) for path in sessions_root().glob(f"*{SUFFIX}")):
        left, right = st.columns([3, 1], vertical_alignment="bottom")
        left.selectbox("Saved sessions", names, key="live:saved")
        right.button("Reopen", on_click=reopen, key="live:reopen", width="stretch", icon=":material/folder_open:")


def _draw_job(desk: Desk, session: str, data: dict[str, Any]) -> None:
    def start() -> None:
        from app.prompt_sets import typed

        desk.refused_at, desk.refusal = "take", ""
        name = st.session_state["live:job:analysis"]
        try:
            lines = str(st.session_state["live:job:prompts"]).strip()
            if not lines:
                raise OptionError("no prompts: write one a line")
            prompts = typed(lines, offered.get_analysis(name).prompt_fields)
            spec = model_of(session)
            edits = tuple(step["text"] for step in data["steps"] if step["on"])
            folder = run_folder(run_name(name, f"{spec.ref}-edited"))
            request = Request("run", spec, name, {}, str(prompts.save()), str(store_root()), str(folder), edits)
            st.session_state["live:job"] = queue().submit(request)
        except UserError as error:
            desk.refusal = str(error)

    with st.expander("Run on a prompt set", key="live:job:box", icon=":material/playlist_play:"):
        st.selectbox("Analysis", READERS, key="live:job:analysis", format_func=offered.label)
        st.text_area("Prompts, one a line", key="live:job:prompts", height=100)
        st.button("Run under these edits", key="live:job:start", on_click=start, icon=":material/play_arrow:")
        for job in progress.jobs_of("live:job", lambda request: bool(request.edits)):
            if progress.follow(job, by_itself=False):
                name = Path(queue().request(job).out).name
                st.link_button(f"Open {name}", f"runs?run={quote(name)}", icon=":material/folder_open:")
