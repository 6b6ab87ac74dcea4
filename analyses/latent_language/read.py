"""Reading all items at all layers at once, from stored rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.latent_language.ids import Tokens
from analyses.latent_language.items import Item
from analyses.latent_language.measures import chosen_logprobs, event_probability, token_energy
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.lenses import logit
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import Progress
from probes.reducers import Reducer
from probes.store import ActivationStore

LAST = Reducer(positions="last")
ROWS_AT_ONCE = 4096
"""Rows whose token log-probabilities are made at once, which bounds memory."""

Translate = Callable[[Tensor, int], Tensor]
"""Maps residual rows [n, d_model] of a layer to rows the lens can read."""


@dataclass(frozen=True)
class Reading:
    """What the lens says of each item at each layer."""

    items: tuple[Item, ...]
    languages: tuple[tuple[str, ...], ...]
    """Per item, the names of its sets."""
    own: tuple[NDArray[np.float64], ...]
    """Per item, [layer, language], the probability of the item's own words."""
    control: tuple[NDArray[np.float64], ...]
    """Per item, [layer, language], that of the shuffled words."""
    entropy_bits: NDArray[np.float64]
    """[item, layer]."""
    token_energy: NDArray[np.float64]
    """[item, layer]."""
    energy_scale: tuple[float, float, float]
    """(isotropic, least, greatest) token energy of this model."""
    top_id: NDArray[np.int64]
    """[item], the model's own most probable next token."""


@dataclass
class Reader:
    """Captures what items need and reads it; collects every capture for the provenance."""

    model: Model
    store: ActivationStore
    progress: Progress
    point: str = "resid_post"
    translate: Translate | None = None

    def __post_init__(self) -> None:
        self.captures: list[Activations] = []
        self.patched = 0
        """Forwards run with something changed."""

    def read(self, items: Sequence[Item]) -> Reading:
        """The reading of `items` at every layer."""
        contexts = [(i, before) for i, item in enumerate(items) for before in prefixes(item)]
        rows = self._rows(items, contexts)
        at_prompt = torch.tensor([n for n, (_, before) in enumerate(contexts) if not before])
        unembedding = self.model.unembedding()
        logprobs, entropy = self._logprobs(items, contexts, rows)
        own: list[NDArray[np.float64]] = []
        control: list[NDArray[np.float64]] = []
        for i, item in enumerate(items):
            for parts, name in ((own, "own"), (control, "control")):
                sets = item.events.get(name, item.sets)
                columns = [event_probability(logprobs[i], sequences).numpy() for sequences in sets.values()]
                parts.append(np.stack(columns, axis=1))
        energy = token_energy(unembedding)
        return Reading(
            tuple(items),
            tuple(tuple(item.sets) for item in items),
            tuple(own),
            tuple(control),
            entropy[:, at_prompt].T.double().numpy(),
            energy.of(rows[:, at_prompt]).T.numpy(),
            (energy.isotropic, *energy.bounds()),
            self._top(items),
        )

    def _top(self, items: Sequence[Item]) -> NDArray[np.int64]:
        last = Address("resid_post", self.model.shape.n_layers - 1)
        captured = self.capture([item.tokens for item in items], Need(str(last), LAST))
        best = logit.read(torch.cat(captured.get(last, LAST)), self.model.unembedding(), top_k=1)
        return best.top_ids[:, 0].cpu().numpy()

    def capture(self, sequences: Sequence[Tokens], need: Need) -> Activations:
        """A capture that the provenance will name."""
        done = capture(self.model, list(sequences), [need], self.store, progress=self.progress)
        self.captures.append(done)
        return done

    def _rows(self, items: Sequence[Item], contexts: Sequence[tuple[int, Tokens]]) -> Tensor:
        """Rows after each context, [layer, context, d_model]; contexts that lie on one sequence share its forward."""
        n_layers = self.model.shape.n_layers
        leaves: dict[int, dict[tuple[int, Tokens], None]] = {}
        where: list[tuple[int, tuple[int, Tokens], int]] = []
        for i, before in contexts:
            leaf = next(p for p in prefixes(items[i], longest=True) if p[: len(before)] == before)
            leaves.setdefault(len(leaf), {})[i, leaf] = None
            where.append((len(leaf), (i, leaf), len(before)))
        stacked: dict[int, Tensor] = {}
        order: dict[int, dict[tuple[int, Tokens], int]] = {}
        for size, members in leaves.items():
            reducer = Reducer(positions=tuple(range(-size - 1, 0))) if size else LAST
            captured = self.capture(
                [(*items[i].tokens, *leaf) for i, leaf in members], Need(f"{self.point}.*", reducer)
            )
            layers = [torch.stack(captured.get(Address(self.point, layer), reducer)) for layer in range(n_layers)]
            stacked[size] = torch.stack(layers)
            order[size] = {member: n for n, member in enumerate(members)}
        rows = torch.stack([stacked[size][:, order[size][member], at] for size, member, at in where], dim=1)
        if self.translate is not None:
            rows = torch.stack([self.translate(rows[layer], layer) for layer in range(n_layers)])
        return rows

    def _logprobs(
        self, items: Sequence[Item], contexts: Sequence[tuple[int, Tokens]], rows: Tensor
    ) -> tuple[list[dict[tuple[Tokens, int], Tensor]], Tensor]:
        """Per item, (context, token) to log-probability [layer]; and entropy in bits [layer, context]."""
        n_layers, n_contexts, _ = rows.shape
        unembedding = self.model.unembedding()
        targets = [next_tokens(items[i], before) for i, before in contexts]
        seen = logit.read(rows.flatten(0, 1), unembedding)
        log_z = seen.log_z.view(n_layers, n_contexts)
        logprobs: list[dict[tuple[Tokens, int], Tensor]] = [{} for _ in items]
        step = max(1, ROWS_AT_ONCE // n_layers)
        # Contexts that want about as many tokens go together, so that little is padded.
        order = sorted(range(n_contexts), key=lambda n: len(targets[n]))
        for first in range(0, n_contexts, step):
            chunk = order[first : first + step]
            ids = torch.zeros(len(chunk), max(len(targets[n]) for n in chunk), dtype=torch.long)
            for row, n in enumerate(chunk):
                ids[row, : len(targets[n])] = torch.tensor(targets[n])
            part = chosen_logprobs(
                rows[:, chunk].flatten(0, 1), unembedding, ids.repeat(n_layers, 1), log_z[:, chunk].flatten()
            )
            values = part.view(n_layers, len(chunk), -1).cpu()
            for row, n in enumerate(chunk):
                i, before = contexts[n]
                logprobs[i].update({(before, token): values[:, row, m] for m, token in enumerate(targets[n])})
        return logprobs, seen.entropy_bits.view(n_layers, n_contexts).cpu()


def prefixes(item: Item, *, longest: bool = False) -> list[Tokens]:
    """What an item's sequences read before their last token, the empty one first; or only those that start no other."""
    sequences = [s for sets in item.events.values() for sequences_of in sets.values() for s in sequences_of]
    contexts = sorted({s[:i] for s in sequences for i in range(len(s))} | {()}, key=lambda p: (len(p), p))
    if not longest:
        return contexts
    inner = {p[:-1] for p in contexts if p}
    return [p for p in contexts if p not in inner]


def next_tokens(item: Item, before: Tokens) -> list[int]:
    """The tokens wanted after a context of the item."""
    n = len(before)
    sequences = (s for sets in item.events.values() for sequences_of in sets.values() for s in sequences_of)
    return sorted({s[n] for s in sequences if len(s) > n and s[:n] == before})
