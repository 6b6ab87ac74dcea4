"""A model larger than memory: its blocks are read one at a time, each for all prompts, and let go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.blocks.single_block import SingleBlockRunner, of_stage, steps
from probes.cache_folder import cache_root
from probes.errors import ModelError, PointError
from probes.hooks.forward_hooks import Stop
from probes.models.backends.native import NativeModel
from probes.models.backends.spill import Spill
from probes.models.fingerprint.fingerprint import Fingerprint, fingerprint
from probes.models.finite import check_finite
from probes.models.protocol import Faithfulness, Forward, Read, Write
from probes.models.sources.block_weights import BlockWeights
from probes.models.sources.gradual_digest import GradualDigest
from probes.models.verify.checked import Checked, CheckRecord
from probes.models.verify.identities import HOOKED
from probes.models.verify.recording import Evidence
from probes.models.verify.stagewise import StagewiseEvidence
from probes.points import Address

SPILL_BYTES = 16 * 2**30
"""Residuals kept on disk at once; a larger prompt set reads the weights once for each part of this size."""


class StreamedModel(NativeModel):
    """The native backend with its blocks on disk. Rows are those of the native backend, under the same store keys.

    Args:
        module: a model whose block parameters are on the meta device.
        blocks: where they are read from.
        spill_bytes: largest file of residuals.

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
        spill_bytes: int = SPILL_BYTES,
    ) -> None:
        self.blocks, self.spill_bytes = blocks, spill_bytes
        self._runner = SingleBlockRunner([module.get_submodule(path) for path in blocks.paths])
        super().__init__(module, tokenizer, ref=ref, weights=None, revision=revision)

    def run_all(self, forwards: Sequence[Forward]) -> Iterator[int]:
        """Run every forward, block by block; a block's weights are read once for as many forwards as the spill file holds.

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
        with self._lock:
            for part in _parts(forwards, self.spill_bytes // row_bytes):
                rows = [forwards[i].tokens.numel() for i in part]
                with Spill(cache_root() / "spill", rows, row_bytes) as spill:
                    yield from self._sweep(forwards, part, spill)

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

    def generate(self, tokens: Sequence[int], max_new_tokens: int, **_: Any) -> NoReturn:
        """Refuse: each token written would read every weight again.

        Raises:
            PointError: always.
        """
        raise PointError(
            f"{self.ref} is streamed, and each token it writes would read all its weights from disk again. Load it "
            "without streaming (with a device map, blocks that do not fit in memory are offloaded), or give the "
            "responses as part of the prompts"
        )

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
            self._refuse_unfaithful(checked.verified.faithfulness)
            record.write(checked)
        self._runner.output_lengths = checked.block_outputs
        return checked

    def _digest(self) -> str:
        return self._digest_so_far.finish()

    def _refuse_unfaithful(self, faithfulness: Faithfulness) -> None:
        for identity in faithfulness.identities:
            if identity.name == HOOKED and not identity.holds:
                raise ModelError(
                    f"{self.ref}: run block by block, its logits are off by {identity.error:.1e} relative: its blocks pass "
                    "each other more than the residual stream; load it without streaming"
                )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Refuse: the blocks are not in memory.

        Raises:
            PointError: always.
        """
        raise PointError(
            f"{self.ref} is streamed: its blocks are on disk and pass through memory one at a time, so they cannot be "
            "resumed, reordered, altered or read as weights. Load it without streaming"
        )
        yield

    def _sweep(self, forwards: Sequence[Forward], part: Sequence[int], spill: Spill) -> Iterator[int]:
        """The given forwards through every stage up to the last that one of them has an address in."""
        n_layers = self.anatomy.n_layers
        ends = {i: steps(forwards[i], n_layers) for i in part}
        # Closed at once where a read fails, so that no block's weights stay behind.
        with closing(self.blocks.sweep(range(min(max(ends.values()), n_layers)))) as sweep:
            for layer in sweep:
                for slot, index in enumerate(part):
                    if layer < ends[index]:
                        leaving = self._stage(forwards[index], layer, spill.read(slot) if layer else None)
                        if layer + 1 < ends[index]:
                            spill.write(slot, leaving)
                        yield index
        for slot, index in enumerate(part):
            if ends[index] > n_layers:
                self._stage(forwards[index], n_layers, spill.read(slot))
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
        sweep = self.blocks.sweep(range(guess.n_layers))
        inside = False

        def advance(layer: int, *_: Any) -> None:
            nonlocal inside
            if not inside:
                next(sweep)
                tensors = self.blocks.placed_tensors(layer)
                for name, tensor in tensors.items():
                    check_finite(tensor, name, self.ref)
                self._digest_so_far.add(tensors)
                inside = True
                stages.stage(layer)
                inside = False

        with ExitStack() as stack, self._runner.watched():
            stack.callback(sweep.close)
            for layer, block in enumerate(self._runner.blocks):
                stack.callback(block.register_forward_pre_hook(partial(advance, layer)).remove)
            logits = self._logits(tokens).cpu()
        stages.stage(guess.n_layers)
        return stages.evidence(logits)


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
