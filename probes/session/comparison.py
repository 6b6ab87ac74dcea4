"""A prompt's next token before and after edits, and how every layer reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probes.html_card import Fold, card


@dataclass(frozen=True)
class TokenProbability:
    """A token and its log-probability in nats."""

    token: str
    token_id: int
    logprob: float

    def data(self) -> dict[str, Any]:
        """Return the value for JSON."""
        return {"token": self.token, "token_id": self.token_id, "logprob": self.logprob}

    def __str__(self) -> str:
        return f"{self.token!r} {math.exp(self.logprob):.3f}"


@dataclass(frozen=True)
class LayerRow:
    """What the lens reads after a block, at the last position."""

    block: str
    """Which; several side by side as `14|15`."""
    top: TokenProbability
    watched: tuple[float, ...]
    """Log-probabilities of the watched tokens, in nats."""
    kl: float
    """KL(before || this row), in nats; 0 in the rows before."""

    def data(self) -> dict[str, Any]:
        """Return the value for JSON."""
        return {"block": self.block, "top": self.top.data(), "watched": list(self.watched), "kl": self.kl}


@dataclass(frozen=True)
class Outcome:
    """What the model says after the prompt."""

    top: tuple[TokenProbability, ...]
    """Most probable first."""
    watched: tuple[TokenProbability, ...]
    layers: tuple[LayerRow, ...]
    """The lens after every block that ran; empty where the model cannot be read so."""
    written: str | None = None
    """A greedy continuation, where one was asked for."""

    def data(self) -> dict[str, Any]:
        """Return the value for JSON."""
        rows = {"top": [t.data() for t in self.top], "watched": [t.data() for t in self.watched]}
        return {
            **rows,
            "layers": [row.data() for row in self.layers],
            **({} if self.written is None else {"written": self.written}),
        }


@dataclass(frozen=True)
class Comparison:
    """Before and after the edits."""

    edits: tuple[str, ...]
    tokens: tuple[str, ...]
    """The prompt's."""
    before: Outcome
    after: Outcome
    kl: float
    """KL(before || after) of the next token, in nats."""
    blocks_run: int
    """How many blocks were run for the edits."""

    def data(self) -> dict[str, Any]:
        """Return the value for JSON."""
        return {
            "edits": list(self.edits),
            "tokens": list(self.tokens),
            "before": self.before.data(),
            "after": self.after.data(),
            "kl": self.kl,
            "blocks_run": self.blocks_run,
        }

    def _facts(self) -> Mapping[str, str]:
        def told(tokens: Sequence[TokenProbability]) -> str:
            return ", ".join(map(str, tokens))

        facts = {"before": told(self.before.top), "after": told(self.after.top)}
        if self.before.watched:
            changes = zip(self.before.watched, self.after.watched, strict=True)
            facts["watched"] = ", ".join(
                f"{b.token!r} {math.exp(b.logprob):.3f} → {math.exp(a.logprob):.3f} ({a.logprob - b.logprob:+.3f} nats)"
                for b, a in changes
            )
        if self.before.written is not None:
            facts["written before"], facts["written after"] = repr(self.before.written), repr(self.after.written)
        return facts

    def __str__(self) -> str:
        head = f"{' ; '.join(self.edits) or 'no edits'}: KL {self.kl:.4g} nats"
        return "\n".join([head, *(f"  {name:15}{value}" for name, value in self._facts().items())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [
            (a.block, repr(b.top.token), f"{math.exp(b.top.logprob):.3f}", repr(a.top.token), f"{math.exp(a.top.logprob):.3f}", f"{a.kl:.3g}")
            for b, a in zip(self.before.layers, self.after.layers, strict=False)
        ]  # fmt: skip
        fold = Fold("the lens at the last position", ("block", "before", "p", "after", "p", "KL, nats"), rows)
        return card("; ".join(self.edits) or "no edits", f"KL {self.kl:.4g} nats", self._facts(), [fold])
