"""What a model's stored rows say of its norms: streams, scales, and the tokens to be predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.results.per_prompt import PerPrompt
from probes.batches import Batch, batches
from probes.blocks.batch import Blocks, on_blocks
from probes.blocks.rerouting import module_of
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.lenses import logit
from probes.models.protocol import Model, Unembedding
from probes.norms import Kind, NoNormError, NormSite, Rows, Switches
from probes.points import Address

BATCH_TOKENS = 1024
"""Padded tokens measured at once."""
_POINT: dict[Kind, str] = {"qk": "attn_scale", "v": "attn_scale", "mlp": "mlp_scale", "final": "final_scale"}
POSITION_CLASSES = ("first", "end_of_text", "other")


def needs(model: Model, layers: Sequence[int], pattern: bool, neurons: bool) -> list[Need]:
    """Return what the diagnostics read of each prompt, as far as the model has it.

    Streams, the divisors that are points, heads' outputs of `layers`; with `pattern` these layers' patterns, with `neurons`
    the last MLP's activations.
    """
    last = model.shape.n_layers - 1
    points = ["resid_pre.0", "resid_post.*", "attn_scale.*", "mlp_scale.*", "final_scale"]
    points += [f"{head}.{layer}" for head in ("z", "pattern")[: 1 + pattern] for layer in layers]
    points += [f"mlp_post.{last}"] if neurons else []
    return [Need(tuple(p for p in points if has(model, p.partition(".")[0])))]


def has(model: Model, point: str) -> bool:
    """Return whether a model has a point (in its last layer, where it is layered)."""
    layered = point not in ("embed", "final_scale", "final_norm", "logits")
    return model.refusal(Address(point, model.shape.n_layers - 1 if layered else None)) is None


@dataclass(frozen=True, eq=False)
class Part:
    """Some prompts as one padded batch, with the stream that the store holds of them."""

    batch: Batch
    stream: Sequence[Tensor]
    """[batch, pos, d_model] entering each block and leaving the last."""
    counted: Tensor
    """[batch, pos], True where statistics are taken: a next token is known, and the position counts."""

    @property
    def prompts(self) -> Int[Tensor, " row"]:
        """Prompt of each counted position."""
        return torch.tensor(self.batch.indices)[:, None].expand_as(self.counted)[self.counted]

    @property
    def targets(self) -> Int[Tensor, " row"]:
        """Next token of each counted position."""
        following = self.batch.tokens.roll(-1, 1)
        return following[self.counted]


def switches_of(model: Model) -> Switches | None:
    """Return the switches of a model's norms; None where it has no norms."""
    with module_of(model) as (_, anatomy):
        try:
            return Switches(anatomy, getattr(model.tokenizer, "eos_token_id", None))
        except NoNormError:
            return None


class Measured:
    """A model, its stored rows, and what follows from them without a forward of the whole model.

    Args:
        first_token: whether each prompt's first position counts in statistics over tokens.
    """

    def __init__(self, activations: Activations, first_token: bool) -> None:
        self.activations, self.model, self.first_token = activations, activations.model, first_token
        self.sequences = activations.sequences
        self.n_layers = self.model.shape.n_layers
        with module_of(self.model) as (_, anatomy):
            self.anatomy = anatomy
        self.switches = switches_of(self.model)
        self.unembedding: Unembedding = self.model.unembedding()

    @property
    def n_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.sequences)

    def column(self, n: int = 1) -> PerPrompt:
        """Return empty sums per prompt, of `n` columns."""
        return PerPrompt(self.n_prompts, n)

    def parts(self) -> Iterator[Part]:
        """Yield all prompts in padded batches, with their streams."""
        at = [Address("resid_pre", 0), *(Address("resid_post", layer) for layer in range(self.n_layers))]
        rows = [self.activations.get(address) for address in at]
        for batch in batched(self.sequences):
            stream = [_padded([layer[i] for i in batch.indices], batch).to(self.model.device) for layer in rows]
            yield Part(batch, stream, self.counted(batch))

    def counted(self, batch: Batch) -> Bool[Tensor, "batch pos"]:
        """Return the positions with a next token, without each prompt's first unless that is all there is."""
        lengths = torch.tensor(batch.lengths)[:, None]
        places = torch.arange(batch.tokens.shape[1])[None]
        known = places < lengths - 1
        if self.first_token:
            return known
        return known & ((places > 0) | (lengths == 2))

    def loss(
        self, rows: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"], unembedding: Unembedding | None = None
    ) -> Float[Tensor, " row"]:
        """Return the cross-entropy of targets read from rows of the last stream, nats, on the CPU."""
        ids = targets.to(self.unembedding.weight.device)[:, None]
        return -logit.read(rows, unembedding or self.unembedding, ids=ids).logprobs[:, 0].cpu()

    def scales(self, sites: Sequence[NormSite]) -> dict[NormSite, list[Tensor]]:
        """Return each site's scale at every position of every prompt, [pos] float32 per prompt; a mean over heads for q/k norms.

        Divisors that are points come from the store; the others from one run of each block on its stored input.
        """
        scales = {
            site: [row.float() for row in self.activations.get(Address(_POINT[site.kind], site.layer))]
            for site in sites
            if site.kind in _POINT and has(self.model, _POINT[site.kind])
        }
        others = [site for site in sites if site not in scales]
        if others:
            scales |= self._watched(others)
        return {site: scales[site] for site in sites}

    def _watched(self, sites: Sequence[NormSite]) -> dict[NormSite, list[Tensor]]:
        assert self.switches is not None
        switches = self.switches
        of = {switches.norm(site).path: site for site in sites}
        scales: dict[NormSite, dict[int, Tensor]] = {site: {} for site in sites}
        for part in self.parts():

            def see(norm, _, scale, part=part):  # type: ignore[no-untyped-def]
                mean = scale.detach().flatten(2).mean(-1) if scale.ndim > 2 else scale.detach()
                for row, (prompt, n) in enumerate(zip(part.batch.indices, part.batch.lengths, strict=True)):
                    scales[of[norm.path]][prompt] = mean[row, :n].float().cpu()

            def work(blocks: Blocks, part=part) -> None:  # type: ignore[no-untyped-def]
                switches.enter(part.batch.tokens.to(self.model.device))
                with switches.attached():
                    for layer in range(self.n_layers):
                        blocks.run(part.stream[layer], layer, stop=layer + 1)

            switches.watches.update(dict.fromkeys(of, see))
            try:
                on_blocks(self.model, part.batch.tokens, work)
            finally:
                switches.watches.clear()
        return {site: [scales[site][i] for i in range(self.n_prompts)] for site in sites}

    def classes(self, prompt: int) -> dict[str, Tensor]:
        """Return, per position class, which positions of a prompt are in it, [pos]; every position is in one."""
        rows = Rows.of(torch.tensor([self.sequences[prompt]]), self.switches.end_of_text if self.switches else None)
        ends = rows.end_of_text[0] & ~rows.first[0]
        return dict(zip(POSITION_CLASSES, (rows.first[0], ends, ~rows.first[0] & ~ends), strict=True))


def batched(sequences: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Yield the prompts in the batches in which they are measured."""
    return batches(sequences, BATCH_TOKENS)


def _padded(rows: Sequence[Tensor], batch: Batch) -> Tensor:
    out = rows[0].new_zeros(*batch.tokens.shape, rows[0].shape[-1])
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out
