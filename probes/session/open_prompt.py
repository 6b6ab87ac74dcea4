"""A prompt kept open: run once without edits, and again from the first block that an edit changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.quick_linear import QuickLinear
from probes.blocks.rerouting import call_blocks
from probes.edits import BlockPath, Edit, Texts, altered, read, resolve, writes_of
from probes.edits.program_runs import run_step
from probes.edits.programs import Program, Step
from probes.lenses.logit import unembedded
from probes.models.protocol import BlockAccess, Model, Read, Write
from probes.points import Address, stage_of

KEPT_RUNS = 24
"""Runs that a prompt keeps, so that going back recomputes nothing."""


@dataclass(frozen=True, eq=False)
class Run:
    """A prompt run through the blocks under some edits."""

    steps: tuple[Step, ...]
    """[step], the blocks that each step runs: one, or several side by side."""
    streams: Float[Tensor, "stage pos d_model"]
    """What enters the first step, and what leaves each; empty where the model cannot be read so."""
    logprobs: Float[Tensor, " d_vocab"]
    """Of the token after the prompt, in nats."""
    ran: int
    """How many blocks were run for it."""


class OpenPrompt:
    """A model's runs of one prompt.

    Args:
        model: the model.
        tokens: the prompt.
        other: a second prompt, which edits may copy from.

    Raises:
        PromptError: a prompt that the model cannot run.
    """

    def __init__(self, model: Model, tokens: Sequence[int], other: Sequence[int] | None = None) -> None:
        self.model, self.tokens = model, tuple(tokens)
        self._rows: dict[tuple[tuple[int, ...], Address], Tensor] = {}
        self.texts = Texts(self.tokens, None if other is None else tuple(other), self.rows)
        self.resumable = (
            model.shape.causal and isinstance(model, BlockAccess) and "lens" not in model.faithfulness.refused
        )
        with QuickLinear():
            self.base = CachedPrompt(model, self.tokens, 0) if self.resumable else None
        self._runs: dict[tuple[Edit, ...], Run] = {}
        self.clean = self.run(())

    @property
    def ids(self) -> Int[Tensor, "1 pos"]:
        """The prompt as a batch of one."""
        return torch.tensor([self.tokens], device=self.model.device)

    def rows(self, tokens: tuple[int, ...], address: Address) -> Tensor:
        """Return a point's rows [pos, ...] in the unedited run of some tokens; all layers of it are read at once."""
        if (tokens, address) not in self._rows:
            layers = range(self.model.shape.n_layers)
            addresses = [address] if address.layer is None else [Address(address.point, layer) for layer in layers]
            given = [a for a in addresses if a == address or self.model.refusal(a) is None]
            with QuickLinear():
                values = read(self.model, torch.tensor([tokens]), given)
            self._rows.update({(tokens, a): rows[0] for a, rows in values.items()})
        return self._rows[tokens, address]

    def ready(self, edits: Sequence[Edit]) -> list[Edit]:
        """Return edits with their values read from the model and the prompts.

        Raises:
            UserError: edits that this model or prompt cannot have.
        """
        return resolve(self.model, edits, self.texts)

    def run(self, edits: Sequence[Edit]) -> Run:
        """Return the prompt's run under edits; only what follows the first that differs from a known run is run.

        Raises:
            UserError: edits that this model or prompt cannot have.
        """
        key = tuple(edits)
        if key not in self._runs:
            with self._exclusive():
                ready = self.ready(edits)
                self._runs[key] = self._resumed(key, ready) if self.resumable else self._whole(ready)
            for old in [k for k in self._runs if k][: max(0, len(self._runs) - KEPT_RUNS)]:
                del self._runs[old]
        return self._runs[key]

    def cached(self, writes: Mapping[Address, Write]) -> CachedPrompt:
        """Return the prompt run once under writes of points [1, pos, ...], to be resumed from inside it."""
        assert self.base is not None
        if not writes:
            return self.base
        with QuickLinear():
            return CachedPrompt(self.model, self.tokens, 0, writes)

    def _exclusive(self) -> AbstractContextManager[None]:
        """Keep the model for all blocks of a run: taking it for each costs as much as a third of a block."""
        return self.model.exclusive() if isinstance(self.model, BlockAccess) else nullcontext()

    @torch.no_grad()
    def _whole(self, ready: Sequence[Edit]) -> Run:
        n = self.model.shape.n_layers
        streams = [a for a in (Address("resid_post", layer) for layer in range(n)) if self.model.refusal(a) is None]
        logits = Address("logits")
        values = read(self.model, self.ids, [*streams, logits], ready)
        kept = torch.stack([values[a][0] for a in streams]) if len(streams) == n else torch.empty(0)
        first = kept[:1] if len(kept) else kept
        return Run(Program.plain(n).steps, torch.cat((first, kept)), values[logits][0, -1].float().log_softmax(-1), n)

    @torch.no_grad()
    def _resumed(self, key: tuple[Edit, ...], ready: Sequence[Edit]) -> Run:
        assert self.base is not None
        if not ready:
            clean = torch.stack(self.base.entering[:])
            logprobs = self.logprobs(clean[-1][None], {})
            return Run(Program.plain(self.model.shape.n_layers).steps, clean, logprobs, len(clean) - 1)
        program = program_of(ready, self.model.shape.n_layers)
        writes = writes_of(self.model, ready)
        known, start = self._known(key, ready)
        if start == 0 and Address("embed") in writes:
            hidden = self._embedded(writes)
            streams = [hidden]
        else:
            streams = [known.streams[stage][None] for stage in range(min(start, len(program.steps)) + 1)]
        with altered_blocks(self.model, ready):
            for step in program.steps[start:]:
                streams.append(self.step(step, program, streams[-1], writes))
            logprobs = self.logprobs(streams[-1], writes)
        return Run(program.steps, torch.cat(streams), logprobs, sum(map(len, program.steps[start:])))

    def _known(self, key: tuple[Edit, ...], ready: Sequence[Edit]) -> tuple[Run, int]:
        """Return the known run that agrees with these edits the furthest, and up to which block it does."""
        n = self.model.shape.n_layers
        best = (self.clean, min((edit.first_block(self.model.shape) for edit in ready), default=n))
        if isinstance(ready[0], BlockPath):
            return best
        blocks = {edit: one.first_block(self.model.shape) for edit, one in zip(key, ready, strict=True)}
        for other, run in self._runs.items():
            if not other or run.steps != self.clean.steps or any(edit not in blocks for edit in other):
                continue
            shared = [edit for edit in key if edit in other]
            start = min((blocks[edit] for edit in key if edit not in other), default=n)
            if tuple(shared) == other and start > best[1]:
                best = (run, start)
        return best

    def _embedded(self, writes: Mapping[Address, Write]) -> Float[Tensor, "1 pos d_model"]:
        embed = {Address("embed"): writes[Address("embed")]}
        model = self.model
        assert isinstance(model, BlockAccess)
        with model.hooked({}, embed, (1, len(self.tokens))):
            return call_blocks(model, self.ids, lambda hidden, _: hidden.clone(), use_cache=False)

    def step(
        self,
        step: Step,
        program: Program,
        hidden: Float[Tensor, "row pos d_model"],
        writes: Mapping[Address, Write],
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what leaves a step of a program where `hidden` enters it, under the writes inside its blocks."""
        return run_step(lambda block, rows: self.through(block, rows, writes), step, hidden, program.mean)

    def through(
        self,
        layer: int,
        hidden: Float[Tensor, "row pos d_model"],
        writes: Mapping[Address, Write],
        reads: Mapping[Address, Read] | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what leaves a block where `hidden` enters it, under those of the writes that are inside it."""
        assert self.base is not None
        own = {a: write for a, write in writes.items() if a.layer == layer}
        with QuickLinear():
            return self.base.through(layer, hidden, own, reads)

    def logprobs(
        self, leaving: Float[Tensor, "row pos d_model"], writes: Mapping[Address, Write]
    ) -> Float[Tensor, "*row d_vocab"]:
        """Return the next token's log-probabilities after what leaves the last block; of one row without that axis."""
        lens = self.model.unembedding()
        late = {
            a: write
            for a, write in writes.items()
            if stage_of(a, self.model.shape.n_layers) >= self.model.shape.n_layers
        }
        rows = lens.norm(leaving if late else leaving[:, -1:])
        if (norm := Address("final_norm")) in late:
            rows = late[norm](rows)
        rows = rows[:, -1:] if Address("logits") not in late else rows
        logits = unembedded(rows, lens)
        if (address := Address("logits")) in late:
            logits = late[address](logits)
        out = logits[:, -1].log_softmax(-1)
        return out[0] if len(out) == 1 else out


def program_of(ready: Sequence[Edit], n_layers: int) -> Program:
    """Return the program in which resolved edits run the blocks."""
    return next((edit.program for edit in ready if isinstance(edit, BlockPath)), Program.plain(n_layers))


@contextmanager
def altered_blocks(model: Model, ready: Sequence[Edit]) -> Iterator[None]:
    """Alter weights and norms inside, as the edits say; the order of blocks is the caller's."""
    with altered(model, [edit for edit in ready if not isinstance(edit, BlockPath)]):
        yield
