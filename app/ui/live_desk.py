"""The desk of the Live page: a window's sessions in order, what was answered of the present one, and what was refused."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from app.jobs.queue import queue
from app.live.client import ProcessEnded, ask
from app.live.kept import Kept, recall
from app.live.protocol import Action, Answer, Kind, Question
from app.offered import FIRST

KEY = "live:desk"
MOST = 200
"""Sessions remembered."""


@dataclass
class Desk:
    """What one window has done."""

    history: list[Answer] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """What each step of the history did."""
    at: int = -1
    turn: int = 0
    """How often another step was shown: part of the keys of what shows a step, since a browser that is busy may still send the
    value that a field of the same key had in an earlier one."""
    refusal: str = ""
    refused_at: str = ""
    """The part of the page whose button was refused."""
    took: float = 0.0
    """Seconds of the last answer, with the way there and back."""
    kept: Kept | None = None
    """What is shown, where it is of an earlier session of the dashboard and the model still loads."""
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further answers about the present session, by what was asked."""

    @property
    def now(self) -> Answer | None:
        """The present session; None before the first was answered."""
        return self.history[self.at] if self.history else None

    def act(self, words: str, *actions: Action, at: str = "stack") -> None:
        """Change the session, and show what follows; a refusal keeps it as it was."""
        if self.now is not None:
            self._look(words, self.now.session, actions, at)

    def open(self, session: str, words: str, at: str = "prompt") -> None:
        """Open a session by its text."""
        self._look(words, session, (), at)

    def recall(self, session: str) -> bool:
        """Show what was kept of a session, where its model is being loaded; return whether there was something."""
        self.kept = recall(session) if FIRST.is_set() else None
        if self.kept is not None:
            self.history, self.words, self.at = [Answer(self.kept.session, self.kept.data)], ["opened"], 0
            self.took = float(self.kept.data["seconds"])
        return self.kept is not None

    def settle(self) -> bool:
        """Once the model has answered, take its answer instead of what was kept; return whether it has."""
        if self.kept is None or FIRST.is_set():
            return False
        answer = self.answer_of("view", self.kept.session, at="prompt")
        self.kept = None
        if answer is not None:
            self.history[0] = answer
        return True

    def _look(self, words: str, session: str, actions: tuple[Action, ...], at: str) -> None:
        answer = self.answer_of("view", session, actions, at, lens=st.session_state.get("keep:live:lens", "logit"))
        if answer is None:
            return
        self.history, self.words = self.history[: self.at + 1][-MOST:], self.words[: self.at + 1][-MOST:]
        self.history.append(answer)
        self.words.append(words)
        self.at, self.more, self.turn = len(self.history) - 1, {}, self.turn + 1

    def answer_of(
        self, kind: Kind, session: str, actions: tuple[Action, ...] = (), at: str = "stack", **options: Any
    ) -> Answer | None:
        """Return an answer of the resident process; None where it was refused, which the page then says."""
        began = time.perf_counter()
        self.refusal, self.refused_at = "", at
        try:
            answer = ask(queue(), Question(kind, session, actions, options))
        except ProcessEnded as error:
            self.refusal = str(error)
            return None
        self.took = time.perf_counter() - began
        self.refusal = answer.refusal
        return None if answer.refusal else answer

    def grids(self, index: int) -> dict[str, Any] | None:
        """Return the lens grids of a step of the history, asked for once; None where they were refused."""
        data = self.history[index].data
        if "grids" not in data:
            lens, took = st.session_state.get("keep:live:lens", "logit"), self.took
            answer = self.answer_of("grids", self.history[index].session, at="grid", lens=lens)
            self.took += took
            if answer is None:
                return None
            data["grids"] = answer.data
        grids: dict[str, Any] = data["grids"]
        return grids

    def look(self, kind: Kind, at: str, **options: Any) -> dict[str, Any] | None:
        """Return a further answer about the present session, asked for once."""
        name = f"{kind} {sorted(options.items())}"
        if name not in self.more and self.now is not None:
            answer = self.answer_of(kind, self.now.session, at=at, **options)
            if answer is None:
                return None
            self.more[name] = answer.data
        return self.more.get(name)

    def known(self, kind: Kind, **options: Any) -> dict[str, Any] | None:
        """Return a further answer that was asked for before."""
        return self.more.get(f"{kind} {sorted(options.items())}")

    def go(self, by: int) -> None:
        """Go back or forward in the history; nothing is computed."""
        at = min(max(self.at + by, 0), len(self.history) - 1)
        if at != self.at:
            self.at, self.more, self.refusal, self.turn = at, {}, "", self.turn + 1

    def say_refusal(self, at: str) -> None:
        """Say what was refused, where it was asked for."""
        if self.refusal and self.refused_at == at:
            # The legal forms fill a screen, and stand under a button of the page.
            words, _, forms = self.refusal.partition(" The forms: ")
            st.error(words + (" **What can I write?** has their forms." if forms else ""), icon=":material/block:")


def desk() -> Desk:
    """This window's desk."""
    if KEY not in st.session_state:
        st.session_state[KEY] = Desk()
    own: Desk = st.session_state[KEY]
    return own
