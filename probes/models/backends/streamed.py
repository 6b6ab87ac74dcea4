"""A model larger than memory: its blocks are read one at a time, each for all prompts, and let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import repeat
from typing import Any, NoReturn, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.blocks.journal import Checkpoint, Journal, key_of
from probes.blocks.rerouting import in_order, rerouted
from probes.blocks.schedule import BlockSchedule
from probes.blocks.single_block import SingleBlockRunner, of_stage, steps
from probes.blocks.strands import ContextMaker
from probes.cache_folder import cache_root
from probes.errors import ModelError, PointError
from probes.hooks.forward_hooks import Stop
from probes.models.backends.native import NativeModel
from probes.models.fingerprint.checksum import combined
from probes.models.fingerprint.fingerprint import Fingerprint, fingerprint
from probes.models.finite import check_finite
from probes.models.protocol import Context, Forward, Read, SavedRun, Write
from probes.models.sources.block_weights import BlockWeights
from probes.models.sources.gradual_digest import GradualDigest
from probes.models.verify.checked import Checked, CheckRecord
from probes.models.verify.identities import HOOKED
from probes.models.verify.recording import Evidence
from probes.models.verify.stagewise import StagewiseEvidence
from probes.points import Address, stage_of
from probes.shelf import Kept, Shelf

T = TypeVar("T")

MEMORY_BYTES = 2 * 2**30
"""Activations kept in memory between blocks, at most; more are kept on disk."""
KEPT_BYTES = 16 * 2**30
"""Residuals of one capture kept between blocks; a larger prompt set reads the weights once for each part of this size."""


class StreamedModel(NativeModel):
    """The native backend with its blocks on disk. Rows are those of the native backend, under the same store keys.

    Args:
        module: a model whose block parameters are on the meta device.
        blocks: where they are read from.
        memory_bytes: most bytes of activations that wait in memory for a later block; more wait on disk.

    Raises:
        ModelError: as the native backend, or a model whose blocks pass each other more than the residual stream.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        *,
        blocks: BlockWeights,
        ref: str,
        revision: str | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.blocks, self.kept_bytes = blocks, KEPT_BYTES
        self._memory_bytes = memory_bytes
        self._journal: Journal | None = None
        self.schedule = BlockSchedule(lambda layer: blocks.read(layer), blocks.placed)
        self._runner = SingleBlockRunner([module.get_submodule(path) for path in blocks.paths])
        super().__init__(module, tokenizer, ref=ref, weights=None, revision=revision)

    @cached_property
    def shelf(self) -> Shelf:
        """Where activations wait for a later block: in memory up to `memory_bytes`, then on disk."""
        return Shelf(cache_root() / "spill", self._memory_bytes)

    def together(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Return what tasks return that run this model, each block's weights read once for all that want it next.

        Raises:
            BaseException: what the first failing task raised; the others are ended.
        """
        return self.schedule.together(tasks)

    @contextmanager
    def resumable(self, key: str) -> Iterator[None]:
        """Keep finished groups of blocks inside, so that after a kill the same work goes on from the last of them.

        Args:
            key: names the work: all that decides it beside the model.
        """
        context = self.current()
        name = combined([key, repr(context), version("bathyscope")])
        self._journal = Journal(cache_root() / "unfinished" / name, self.shape.n_layers)
        self._journal.clear_old()
        try:
            with self.schedule.counted_anew():
                yield
            self._journal.remove()
        finally:
            self._journal = None

    def saved_run(self, *entering: Tensor) -> SavedRun | None:
        """Return where the run that these tensors enter is kept; None outside of `resumable`."""
        if self._journal is None:
            return None
        return Checkpoint(self._journal, key_of(self.schedule.next_path(), entering))

    def ends_group(self, layer: int) -> bool:
        """Tell whether a saved run keeps its activations after block `layer`."""
        return self._journal is not None and self._journal.ends_group(layer)

    def run_all(self, forwards: Sequence[Forward]) -> Iterator[int]:
        """Run every forward, block by block; a block's weights are read once for as many forwards as are kept at once.

        Gives a forward's index each time one more block of it is done.

        Raises:
            PointError: an address this model refuses, or a write to a derived one; before any computation.
            PromptError: token ids outside the vocabulary, or more positions than the context window.
            ModelError: not enough disk space for the residuals.
        """
        for forward in forwards:
            self._admit(forward.reads, forward.writes)
            self._admit_tokens(forward.tokens, forward.tokens.shape[1])
        row_bytes = self.shape.d_model * max(4, getattr(torch, self.context.dtype).itemsize)
        run = self._run_rerouted if self._is_rerouted else self._sweep
        with self._lock:
            for part in _parts(forwards, self.kept_bytes // row_bytes):
                yield from run(forwards, part)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        reads: Mapping[Address, Read],
        writes: Mapping[Address, Write] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Run one forward over right-padded `tokens` [batch, pos], reading every block up to the last address's once.

        Raises:
            PointError, PromptError, ModelError: as `run_all`.
        """
        for _ in self.run_all([Forward(tokens, reads, writes or {}, lengths)]):
            pass

    def generate(self, tokens: Sequence[int], max_new_tokens: int, **how: Any) -> list[int]:
        """Return the tokens the model writes after `tokens`; each reads all weights, once for all texts written together.

        Raises:
            PointError, PromptError, OptionError: as the native backend.
        """
        with nullcontext() if self._is_rerouted else rerouted(self, in_order(self.shape.n_layers)):
            return super().generate(tokens, max_new_tokens, **how)

    def current(self) -> Context:
        """Return the context of the module as it is now; while tasks are under way, as it was when they began."""
        return self.context if self.schedule.driving else super().current()

    def block_output_lengths(self) -> tuple[int | None, ...]:
        """Return the length of the tuple that each block returns; None where it returns a bare tensor."""
        return self._runner.output_lengths

    def whole(self) -> NoReturn:
        """Refuse: the blocks are not in memory.

        Raises:
            PointError: always.
        """
        raise PointError(
            f"{self.ref} is streamed: its blocks are on disk and pass through memory one at a time, so they cannot be "
            "differentiated or read as weights. Load it without streaming"
        )

    def at(self, layer: int) -> AbstractContextManager[None]:
        """Have the weights of block `layer` in place inside; a task waits for its turn."""
        return self.schedule.at(layer, layer + 1 if layer + 1 < self.shape.n_layers else None)

    @contextmanager
    def altering(self, layer: int, alteration: ContextMaker) -> Iterator[None]:
        """Have the weights of block `layer` altered inside whenever they are in place."""
        with self.schedule.altering(layer, alteration):
            yield

    def during(self, context: ContextMaker) -> AbstractContextManager[Any]:
        """Have a context entered inside, except while another task runs."""
        return self.schedule.during(context)

    def _new_lock(self) -> AbstractContextManager[Any]:
        return self.schedule

    @property
    def _is_rerouted(self) -> bool:
        return self.module.get_submodule(self.blocks.paths[0]) is not self._runner.blocks[0]

    def _fingerprint(self) -> Fingerprint:
        return fingerprint(self.module, self.blocks.files)

    def _run_checks(self, guess: Anatomy, dtype: torch.dtype, weights: str | None) -> Checked:
        """Check and digest the model in one pass over its weights; files that are as they were are not read again."""
        record = CheckRecord.of(self._fingerprint(), self.blocks.canary_rows())
        checked = record.read(guess)
        if checked is None:
            self._digest_so_far = GradualDigest(self.module, self.blocks.tensor)
            checked = super()._run_checks(guess, dtype, weights)
            checked = replace(checked, block_outputs=self._runner.output_lengths)
            for identity in checked.verified.faithfulness.identities:
                if identity.name == HOOKED and not identity.holds:
                    raise ModelError(
                        f"{self.ref}: run block by block, its logits are off by {identity.error:.1e} relative: its blocks "
                        "pass each other more than the residual stream; load it without streaming"
                    )
            record.write(checked)
        self._runner.output_lengths = checked.block_outputs
        return checked

    def _digest(self) -> str:
        return self._digest_so_far.finish()

    def _run_rerouted(self, forwards: Sequence[Forward], part: Sequence[int]) -> Iterator[int]:
        """The given forwards with their blocks run by another program than the model's own."""
        run = partial(NativeModel.run, self)
        given = [forwards[i] for i in part]
        self.together([partial(run, f.tokens, f.reads, f.writes, f.lengths) for f in given])
        for index in part:
            yield from repeat(index, steps(forwards[index], self.anatomy.n_layers))

    def _sweep(self, forwards: Sequence[Forward], part: Sequence[int]) -> Iterator[int]:
        """The given forwards through every stage up to the last that one of them has an address in."""
        n_layers = self.anatomy.n_layers
        ends = {i: steps(forwards[i], n_layers) for i in part}
        reading = {i: _first_read(forwards[i], n_layers) for i in part}
        runs = {i: self.saved_run(forwards[i].tokens) if reading[i] else None for i in part}
        kept, done = dict[int, Kept](), dict.fromkeys(part, 0)
        for index, run in runs.items():
            for blocks, tensors in run.saved() if run else ():
                done[index], kept[index] = blocks, self.shelf.keep(tensors["entering"].to(self.device))
        n_blocks = min(max(ends.values()), n_layers)
        for layer in range(min(done.values()), n_blocks):
            with self.schedule.at(layer, layer + 1 if layer + 1 < n_blocks else None):
                for index in (i for i in part if done[i] <= layer < ends[i]):
                    entering = kept.pop(index).get(self.shelf) if layer else None
                    leaving = self._stage(forwards[index], layer, entering)
                    if (run := runs[index]) and self.ends_group(layer) and layer < reading[index]:
                        run.save(layer + 1, {"entering": leaving}, instead=True)
                    if layer + 1 < ends[index]:
                        kept[index] = self.shelf.keep(leaving)
                    yield index
        for index in part:
            if ends[index] > n_layers:
                self._stage(forwards[index], n_layers, kept.pop(index).get(self.shelf))
                yield index

    @torch.inference_mode()
    def _stage(self, forward: Forward, layer: int, entering: Tensor | None) -> Tensor:
        """One block of one forward, or what follows the blocks; what leaves the block, [batch, pos, d_model]."""
        n_layers = self.anatomy.n_layers
        reads, writes = of_stage(forward.reads, layer, n_layers), of_stage(forward.writes, layer, n_layers)
        hooks = self._hooks(reads, writes, stop=layer == n_layers)
        left = self._through(layer, entering, partial(self._forward, hooks, lengths=forward.lengths), forward.tokens)
        hooks.finish()
        return left

    def _through(self, layer: int, entering: Tensor | None, call: Any, *given: Any) -> Tensor:
        with self._runner.only(layer, entering) as left, suppress(Stop):
            call(*given)
        return left[0] if left else torch.empty(0)

    def _evidence(self, guess: Anatomy, tokens: Tensor) -> Evidence:
        """What the checks look at: logits of a plain forward, everything else from stages that go on inside it.

        Each block is read once, and digested on the way.
        """
        stages = StagewiseEvidence(self.module, guess, self._runner, self._logits, tokens)
        inside, in_place = False, ExitStack()

        def advance(layer: int, *_: Any) -> None:
            nonlocal inside
            if not inside:
                in_place.close()
                then = layer + 1 if layer + 1 < guess.n_layers else None
                in_place.enter_context(self.schedule.at(layer, then))
                tensors = self.blocks.placed_tensors(layer)
                for name, tensor in tensors.items():
                    check_finite(tensor, name, self.ref)
                self._digest_so_far.add(tensors)
                inside = True
                stages.stage(layer)
                inside = False

        with ExitStack() as stack, in_place, self._runner.watched():
            for layer, block in enumerate(self._runner.blocks):
                stack.enter_context(block.register_forward_pre_hook(partial(advance, layer)))
            logits = self._logits(tokens).cpu()
        stages.stage(guess.n_layers)
        return stages.evidence(logits)


def _first_read(forward: Forward, n_layers: int) -> int:
    """The first stage that something is read in, before which a forward may be gone on with."""
    return min((stage_of(address, n_layers) for address in forward.reads), default=0)


def _parts(forwards: Sequence[Forward], rows: int) -> Iterator[list[int]]:
    """Indices of forwards whose residuals fit `rows` rows together; one that alone does not fit is by itself."""
    part: list[int] = []
    used = 0
    for index, forward in enumerate(forwards):
        if part and used + forward.tokens.numel() > rows:
            yield part
            part, used = [], 0
        part.append(index)
        used += forward.tokens.numel()
    if part:
        yield part
