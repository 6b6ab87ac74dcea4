"""Contextual decomposition of a model: prompts prepared once, batches of sources carried to what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.blocks.rerouting import module_of
from probes.decomposition.attention import Rotation, rotation_of, scoring_of
from probes.decomposition.block_operations import ModelOperations, read_model_operations
from probes.decomposition.logit_operations import LogitOperations, read_logit_operations
from probes.decomposition.module_reading import tolerance
from probes.decomposition.nodes import Baseline, Source, check, groups
from probes.decomposition.rules import PRESETS, Attending, Rules, by_heads, mix
from probes.decomposition.trace import Trace, trace
from probes.decomposition.walk import Prepared, Visit, Walk, head_normed
from probes.errors import OptionError, PointError, unknown
from probes.models.protocol import Model
from probes.models.verify.recording import deviation
from probes.points import Address

ROWS = 1024
"""Rows (sources times positions) carried at once, which bounds memory; below some hundreds a layer's weights are read too often."""
POINTS = (
    *("resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "q", "k", "v", "z"),
    *("mlp_in", "mlp_post", "mlp_out"),
)
"""The points at which both parts can be had."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Both parts of an activation, [source, pos, ...] each; their sum is the model's own."""

    relevant: Tensor
    total: Tensor
    """[pos, ...]."""

    @property
    def irrelevant(self) -> Float[Tensor, "source pos *width"]:
        """Return what the total holds beside the relevant part."""
        return self.total - self.relevant


def rules_of(preset: str | Rules) -> Rules:
    """Return the rules of a preset by name, or the rules given.

    Raises:
        OptionError: an unknown preset, with the legal ones.
    """
    if isinstance(preset, Rules):
        return preset
    if preset not in PRESETS:
        raise OptionError(unknown("preset", preset, PRESETS))
    return PRESETS[preset]


class Decomposer:
    """A model whose operations have been read and checked, ready to be decomposed on any prompt.

    Args:
        tokens: a prompt on which the operations are checked.

    Raises:
        PointError: an operation that the rules do not know, by name.
    """

    def __init__(self, model: Model, tokens: Sequence[int]) -> None:
        self.model = model
        self._rotations: dict[int, tuple[Rotation, ...]] = {}
        seen = trace(model, tokens)
        with module_of(model) as (module, anatomy):
            config = module.config.get_text_config()  # type: ignore[union-attr,operator]
            self.operations: ModelOperations = read_model_operations(anatomy, model.shape.causal, seen, config)
            cap = float(anatomy.map.sizes.output_logits_soft_cap)
            last = seen.get("block", "out", anatomy.n_layers - 1)
            self._logit_operations: LogitOperations | PointError
            try:
                self._logit_operations = read_logit_operations(module, seen, last, cap if cap > 0 else None)
            except PointError as reason:
                self._logit_operations = reason

    @property
    def logit_operations(self) -> LogitOperations:
        """Return the operations after the last block.

        Raises:
            PointError: they are unknown to the rules.
        """
        if isinstance(self._logit_operations, PointError):
            raise self._logit_operations
        return self._logit_operations

    @torch.no_grad()
    def prepare(self, tokens: Sequence[int], *, joint: bool = True) -> Prepared:
        """Trace a prompt once; `joint` also reads what attention does to queries and keys, which frozen attention does not need.

        Raises:
            PointError: attention that the rules do not reproduce, by block.
        """
        seen, shape = trace(self.model, tokens), self.operations
        patterns, scorings, entering, received = [], [], [], []
        with module_of(self.model) as (module, anatomy):
            for layer in range(anatomy.n_layers):
                block, attended = shape.blocks[layer], seen.attended[layer]
                scoring = scoring_of(anatomy.component("attn", layer), attended, shape.causal)
                q, k = (t[0].transpose(0, 1).to(seen.logits.dtype) for t in (attended.query, attended.key))
                k = k[:, :: k.shape[1] // shape.n_kv_heads]
                unnormed = shape.kind == "post_norm" or block.ln1 is None
                entering.append(seen.get("block", "in", layer) if unnormed else seen.get("ln1", "out", layer))
                values = by_heads(block.v.total(entering[-1]), shape.d_head)
                received.append(Attending(q, k, values))
                patterns.append(scoring.probabilities(scoring.scores(q, k)))
                scorings.append(scoring)
            rotations = self._rotated(module, anatomy, seen, len(tokens)) if joint else ()
        prepared = Prepared(seen, tuple(patterns), tuple(scorings), tuple(entering), tuple(received), rotations)
        for layer in range(len(patterns)):
            self._check(prepared, layer)
        return prepared

    def _rotated(self, module: nn.Module, anatomy: Anatomy, seen: Trace, n: int) -> tuple[Rotation, ...]:
        """Return every layer's rotation, measured once for each length of prompt; `_check` tests it on each prompt."""
        if n not in self._rotations:
            dtype, sizes = seen.logits.dtype, (n, self.model.shape.d_model)
            self._rotations[n] = tuple(
                rotation_of(module, anatomy, layer, seen.calls[layer], sizes, dtype)
                for layer in range(anatomy.n_layers)
            )
        return self._rotations[n]

    def _check(self, prepared: Prepared, layer: int) -> None:
        """Check that the pattern times the values is z, and that rotated queries and keys are those that attention received."""
        block, received = self.operations.blocks[layer], prepared.received[layer]
        bound = tolerance(getattr(torch, self.model.context.dtype))
        z = mix(prepared.patterns[layer], received.value).flatten(-2)
        errors = {"attention probabilities": deviation(z, prepared.trace.get("attn.o", "in", layer))}
        if prepared.rotations:
            for name, linear, norm in (("query", block.q, block.q_norm), ("key", block.k, block.k_norm)):
                flat = linear.total(prepared.entering[layer])
                states = by_heads(flat, self.operations.d_head)
                if norm is not None:
                    states = head_normed(states, norm, flat, lambda x, _, norm=norm: norm.total(x))  # type: ignore[misc]
                turned = prepared.rotations[layer].turned(states, name, slice(None))
                errors[f"{name} states"] = deviation(turned, getattr(received, name))
        for name, error in errors.items():
            if error > bound:
                raise PointError(
                    f"{self.model.ref}: the {name} of block {layer} are not what the rules compute (off by {error:.1e}), "
                    "so its attention cannot be decomposed"
                )

    def walk(
        self,
        prompt: Prepared,
        sources: Sequence[Source],
        visit: Callable[[list[int]], tuple[Mapping[Address, Visit], Callable[[Tensor, Tensor], None] | None]],
        *,
        rules: str | Rules = "faithful",
        baseline: Baseline | None = None,
        keep: Sequence[int] | None = None,
        restart: bool = True,
        rows: int = ROWS,
    ) -> None:
        """Carry every source of a prompt to what is visited, in batches that each source joins at its own layer.

        Args:
            visit: for a batch (indices of its sources, in the order in which they begin), what is done at which
                addresses, and what is done with what leaves the last block [source, pos, d_model] at its positions
                [pos], or None to stop before. Sources that begin later than an address are not among those given.
            keep: the positions carried on after the last block's attention; all unless given.
            restart: begin each source at its layer, and a batch at its earliest position.

        Raises:
            PointError: a node that the model or prompt does not have, or split attention of a prompt prepared without.
        """
        chosen = rules_of(rules)
        n = len(prompt.trace.tokens)
        check(sources, len(self.operations.blocks), self.operations.n_heads, n)
        if chosen.attention != "frozen" and not prompt.rotations:
            raise PointError("this prompt was prepared for frozen attention only; prepare it with joint=True")
        for indices in groups(sources, n, rows, self.operations.causal):
            visits, end = visit(indices)
            reach = {**visits}
            if end is not None:
                reach.setdefault(Address("resid_post", len(self.operations.blocks) - 1), lambda *_: None)
            walk = Walk(self.operations, prompt, [sources[i] for i in indices], chosen, baseline, reach, restart)
            if keep is not None:
                begin = int(walk.at[0]) if len(walk.at) else 0
                kept = sorted({position % n for position in keep})
                walk.keep = torch.tensor([p for p in kept if p >= begin], dtype=torch.long, device=self.model.device)
                if not len(walk.keep):
                    continue
            rel = walk.run()
            if end is not None:
                end(rel, walk.at)


def decompose(
    model: Model | Decomposer,
    tokens: Sequence[int],
    sources: Sequence[Source],
    *,
    points: Sequence[str | Address] = (),
    logits: Sequence[int] = (),
    rules: str | Rules = "faithful",
    baseline: Baseline | None = None,
    restart: bool = True,
    rows: int = ROWS,
) -> dict[str, Parts]:
    """Return both parts of activations for each source, by address; of logits those of chosen token ids, under `logits`.

    Args:
        sources: sets of nodes (`head`, `mlp`, `token`), each declared relevant together.
        points: addresses such as `resid_post.3` or `z.2`.
        logits: token ids whose logits are decomposed.
        baseline: the mean to which a node's activation is compared; None declares it relevant as it is.
        restart: begin at the earliest source instead of at block 0; the result is the same.

    Raises:
        PointError: a point or node that this model does not have, or an operation that the rules do not know.
    """
    chosen = rules_of(rules)
    addresses = [a if isinstance(a, Address) else Address.parse(a) for a in points]
    if bad := [a for a in addresses if a.point not in POINTS]:
        raise PointError(unknown("point of a decomposition", bad[0], POINTS))
    decomposer = model if isinstance(model, Decomposer) else Decomposer(model, tokens)
    for address in addresses:
        if reason := decomposer.model.refusal(address):
            raise PointError(f"{decomposer.model.ref} has no point {str(address)!r}: {reason}")
    prompt = decomposer.prepare(tokens, joint=chosen.attention != "frozen")
    n, parts = len(tokens), dict[str, Parts]()
    ids = torch.tensor(list(logits), dtype=torch.long, device=decomposer.model.device)

    def put(name: str, indices: list[int], rel: Tensor, total: Tensor, at: Tensor) -> None:
        if name not in parts:
            parts[name] = Parts(rel.new_zeros(len(sources), n, *rel.shape[2:]), total.new_zeros(n, *total.shape[1:]))
        parts[name].relevant[torch.tensor(indices[: len(rel)])[:, None], at] = rel
        parts[name].total[at] = total

    def visit(indices: list[int]) -> tuple[dict[Address, Visit], Callable[[Tensor, Tensor], None] | None]:
        visits: dict[Address, Visit] = {a: partial(put, str(a), indices) for a in addresses}

        def end(rel: Tensor, at: Tensor) -> None:
            last = prompt.trace.get("block", "out", len(decomposer.operations.blocks) - 1)[at]
            put("logits", indices, *decomposer.logit_operations.relevant(rel, last, ids, chosen), at)

        return visits, end if len(ids) else None

    if len(ids):
        _ = decomposer.logit_operations
    # An empty source, carried through everything, brings every total; batches that begin later do not pass them all.
    decomposer.walk(prompt, [()], lambda _: visit([0]), rules=chosen, restart=False)
    decomposer.walk(prompt, sources, visit, rules=chosen, baseline=baseline, restart=restart, rows=rows)
    return parts
