"""A model larger than memory: its blocks are read one at a time, each for all prompts, and let go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.blocks.single_block import SingleBlockRunner, of_stage, steps
from probes.cache_folder import cache_root
from probes.errors import ModelError, PointError
from probes.hooks.attention_probabilities import Attended
from probes.hooks.forward_hooks import ForwardHooks, Stop
from probes.models.backends.native import NativeModel
from probes.models.backends.spill import Spill
from probes.models.fingerprint.fingerprint import Fingerprint, fingerprint
from probes.models.protocol import Forward, Read, Write
from probes.models.sources.block_weights import BlockWeights
from probes.models.sources.digest import weights_digest
from probes.models.verify.identities import HOOKED
from probes.models.verify.recording import Call, Evidence, attention_of, checked_sites, record
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
        weights: str,
        revision: str | None = None,
        spill_bytes: int = SPILL_BYTES,
    ) -> None:
        self.blocks, self.spill_bytes = blocks, spill_bytes
        self._runner = SingleBlockRunner([module.get_submodule(path) for path in blocks.paths])
        super().__init__(module, tokenizer, ref=ref, weights=weights, revision=revision)
        for identity in self.faithfulness.identities:
            if identity.name == HOOKED and not identity.holds:
                raise ModelError(
                    f"{ref}: run block by block, its logits are off by {identity.error:.1e} relative: its blocks pass each "
                    "other more than the residual stream; load it without streaming"
                )

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

    def _digest(self) -> str:
        return weights_digest(self.module, self.blocks.tensor)

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

    def _plain(self, tokens: Tensor) -> Tensor:
        """Logits by the module's own forward, nothing rerouted; each block's weights come and go around its call."""
        sweep = self.blocks.sweep(range(len(self.blocks.paths)))

        def advance(*_: Any) -> None:
            next(sweep)

        with ExitStack() as stack:
            stack.callback(sweep.close)
            for block in self._runner.blocks:
                stack.callback(block.register_forward_pre_hook(advance).remove)
            stack.enter_context(self._runner.watched())
            return self._logits(tokens)

    @torch.inference_mode()
    def _evidence(self, guess: Anatomy, tokens: Tensor) -> Evidence:
        """What the checks look at: logits of a plain forward, everything else from a streamed one."""
        logits, n_layers = self._plain(tokens).cpu(), guess.n_layers
        sites, raw = checked_sites(guess), dict[tuple[str, str], Tensor]()
        attended: dict[int, Attended] | str = {}
        entering: Tensor | None = None
        embed = guess.map.path("embed")
        for layer in chain(self.blocks.sweep(range(n_layers)), [n_layers]):
            inside = {key: site for key, site in sites.items() if self._stage_of_path(key[0], embed) == layer}
            left: list[Tensor] = []
            call = partial(self._through, layer, entering, self._logits)
            raw.update(record(inside, partial(_kept, call, left), tokens))
            if layer < n_layers and not isinstance(attended, str):
                of_layer = attention_of(self.module, guess, call, tokens, [layer])
                attended = of_layer if isinstance(of_layer, str) else {**attended, **of_layer}
            entering = left[0]
        return Evidence(logits, raw, attended)

    def _stage_of_path(self, path: str, embed: str | None) -> int:
        for layer, block in enumerate(self.blocks.paths):
            if path == block or path.startswith(f"{block}."):
                return layer
        return 0 if path == embed else len(self.blocks.paths)


def _kept(call: Call, results: list[Tensor], tokens: Tensor, hooks: ForwardHooks | None = None) -> Tensor:
    results.append(call(tokens, hooks))
    return results[-1]


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
