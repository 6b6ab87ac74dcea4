"""The identities checked on a small forward pass when a model is loaded, and the anatomy that passes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from probes.anatomy import Anatomy, Kind
from probes.errors import ModelError, PointError
from probes.models.finite import check_weights
from probes.models.protocol import Faithfulness, Identity
from probes.models.unembedding import apply, logits_of, unembedding_of
from probes.models.verify.recording import Evidence, Recording, deviation, every_site
from probes.models.verify.refusals import refusals
from probes.points import POINTS, Address

_KINDS: tuple[Kind, ...] = ("sequential", "parallel", "post_norm")
HOOKED = "logits of a hooked forward == logits"
"""The identity that compares a recorded forward with a plain one."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Relative tolerance of an identity by dtype; 1e-2 for the half precisions."""


@dataclass(frozen=True)
class Verified:
    """An anatomy that holds on this model."""

    anatomy: Anatomy
    faithfulness: Faithfulness
    causal: bool
    d_mlp: int | None
    """The width seen at the input of the MLP's output projection; None where there is no such projection."""


def probe_tokens(n_vocab: int, n_ctx: int, avoid: int | None) -> Int[Tensor, "2 pos"]:
    """Return two rows [2, pos] of ids spread over the vocabulary that differ in the last one only."""
    pool = [1 + (i + 1) * (n_vocab - 2) // 11 for i in range(10)]
    pool = [token for token in dict.fromkeys(pool) if token != avoid]
    row = [pool[i % (len(pool) - 1)] for i in range(min(8, n_ctx))]
    return torch.tensor([row, [*row[:-1], pool[-1]]])


def stream_errors(anatomy: Anatomy, seen: Recording) -> dict[str, float]:
    """Return the identities of the residual stream for this kind of block, each with its worst error over layers."""
    worst: dict[str, float] = {}
    for layer in range(anatomy.n_layers):
        for name, (actual, expected) in _layer_identities(anatomy, seen, layer).items():
            worst[name] = max(worst.get(name, 0.0), deviation(actual, expected))
    return worst


def _layer_identities(anatomy: Anatomy, seen: Recording, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
    def at(point: str) -> Tensor:
        return seen.need(Address(point, layer))

    out: dict[str, tuple[Tensor, Tensor]] = {}
    if layer + 1 < anatomy.n_layers:
        out["resid_pre[l+1] == resid_post[l]"] = (seen.need(Address("resid_pre", layer + 1)), at("resid_post"))
    pre, post = at("resid_pre"), at("resid_post")
    if seen.lacks(Address("attn_out", layer)) or seen.lacks(Address("mlp_out", layer)):
        return out
    attn, mlp = at("attn_out"), at("mlp_out")
    if anatomy.kind == "parallel":
        norm = next((n for n in ("ln2", "ln1") if anatomy.map.path(n, layer)), None)
        normed = apply(anatomy.component(norm, layer), pre) if norm else pre
        out["resid_post == resid_pre + attn_out + mlp_out"] = (pre + attn + mlp, post)
        # The sum alone is true of a sequential block too.
        out["mlp_in == norm(resid_pre)"] = (normed, at("mlp_in"))
    elif anatomy.kind == "sequential":
        mid = at("resid_mid")
        out["resid_mid == resid_pre + attn_out"] = (pre + attn, mid)
        out["resid_post == resid_mid + mlp_out"] = (mid + mlp, post)
    else:
        norms = [anatomy.component(name, layer) for name in ("ln1", "ln2")]
        mid = at("mlp_in")
        out["mlp_in == norm(resid_pre + attn_out)"] = (apply(norms[0], pre + attn), mid)
        out["resid_post == norm(mlp_in + mlp_out)"] = (apply(norms[1], mid + mlp), post)
    return out


def _fitting(
    guess: Anatomy, raw: Mapping[tuple[str, str], Tensor], ref: str, tolerance: float
) -> tuple[Anatomy, Recording, dict[str, float]]:
    """The first kind of block whose identities all hold, the map's own word first."""
    first: tuple[str, float] | None = None
    for kind in (guess.kind, *(k for k in _KINDS if k != guess.kind)):
        anatomy = replace(guess, kind=kind)
        try:
            seen = Recording(raw, every_site(anatomy))
            errors = stream_errors(anatomy, seen)
        except PointError:
            continue
        failed = {name: error for name, error in errors.items() if not error <= tolerance}
        if not failed:
            return anatomy, seen, errors
        first = first or max(failed.items(), key=lambda item: item[1])
    name, error = first or ("resid_pre[l+1] == resid_post[l]", float("inf"))
    raise ModelError(
        f"{ref}: the map of {guess.map.architecture} does not fit this model: {name} is off by {error:.1e} relative "
        f"(tolerance {tolerance:.0e}), and no other kind of block fits. Nothing read from it could be trusted."
    )


def _lens(anatomy: Anatomy, seen: Recording, logits: Tensor, tolerance: float) -> tuple[Identity | None, str | None]:
    name = "logits == unembed(final_norm(resid_post))"
    if anatomy.map.path("ln_final") and "final_norm" in anatomy.refused:
        return None, anatomy.refused["final_norm"]
    try:
        unembedding = unembedding_of(anatomy)
    except PointError as reason:
        return None, str(reason)
    last = seen.need(Address("resid_post", anatomy.n_layers - 1))
    error = deviation(logits_of(unembedding, last.to(unembedding.weight.device)).to(logits.device), logits)
    if error <= tolerance:
        return Identity(name, error, tolerance), None
    return None, (
        f"the final norm and unembedding do not reproduce this model's logits (off by {error:.1e} relative), so a "
        "residual cannot be read through them"
    )


@torch.inference_mode()
def verify(
    guess: Anatomy,
    gather: Callable[[Tensor], Evidence],
    ref: str,
    dtype: torch.dtype,
    pad: int | None,
) -> Verified:
    """Check the identities on every layer, and settle what the map leaves open.

    Args:
        gather: runs token ids [batch, pos] and records what passes.

    Raises:
        ModelError: weights or logits that are not finite, or a map no kind of block makes true.
    """
    check_weights(guess.map.module, ref)
    tolerance = TOLERANCE.get(dtype, 1e-2)
    sizes = guess.map.sizes
    tokens = probe_tokens(int(sizes.d_vocab), int(sizes.n_ctx), pad)
    evidence = gather(tokens)
    logits = evidence.logits
    if not torch.isfinite(logits).all():
        raise ModelError(f"{ref}: the logits of a forward pass hold NaN or infinite values; try dtype float32")
    anatomy, seen, errors = _fitting(guess, evidence.raw, ref, tolerance)
    last = seen.need(Address("resid_post", anatomy.n_layers - 1))
    if anatomy.map.bare:
        errors["last hidden state == resid_post"] = deviation(last, logits)
    else:
        errors[HOOKED] = deviation(seen.need(Address("logits")), logits)
    causal = deviation(last[1, :-1], last[0, :-1]) <= tolerance
    anatomy, further = refusals(anatomy, seen, evidence.attended, causal, tolerance)
    lens, against = _lens(anatomy, seen, logits, tolerance)
    identities = [Identity(name, error, tolerance) for name, error in (errors | further).items()]
    wide = None if seen.lacks(Address("mlp_post", 0)) else seen.need(Address("mlp_post", 0)).shape[-1]
    faithfulness = Faithfulness(
        tuple(identities + ([lens] if lens else [])), {**absent(anatomy), **({"lens": against} if against else {})}
    )
    return Verified(anatomy, faithfulness, causal, wide)


def absent(anatomy: Anatomy) -> Mapping[str, str]:
    """Return the points that no layer has, with the reason."""
    out: dict[str, str] = {}
    for name, point in POINTS.items():
        layers = range(anatomy.n_layers) if point.layered else (None,)
        reasons = [anatomy.refusal(Address(name, layer)) for layer in layers]
        if all(reasons):
            out[name] = str(reasons[0])
    return out
