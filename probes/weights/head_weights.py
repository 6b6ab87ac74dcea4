"""The weights of a model's attention heads, in one shape for every family."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.blocks.rerouting import module_of
from probes.edits.weights import matrix
from probes.errors import PointError
from probes.models.protocol import Model
from probes.weights.composition import Heads, rotation


@torch.no_grad()
def head_weights(model: Model, *, fold_norm: bool = True, center: bool = True) -> Heads:
    """Return W_Q, W_K, W_V and W_O of every head, float32 on the CPU; grouped keys and values repeated per query head.

    Args:
        fold_norm: put the gain of the norm before attention into W_Q, W_K and W_V.
        center: when folding a norm that subtracts the mean, also make these matrices blind to it.

    Raises:
        PointError: a layer without attention heads, or weights that are quantised or not in memory.
    """
    with module_of(model) as (_, anatomy):
        layers = [_layer(anatomy, layer) for layer in range(anatomy.n_layers)]
        gains = [_gain(anatomy, layer) if fold_norm else None for layer in range(anatomy.n_layers)]
        notes = _notes(anatomy, fold_norm)
    w_q, w_k, w_v, w_o = (torch.stack([part[i] for part in layers]) for i in range(4))
    if fold_norm:
        w_q, w_k, w_v = (_folded(w, gains, center) for w in (w_q, w_k, w_v))
    group = w_q.shape[1] // w_k.shape[1]
    w_k, w_v = (w.repeat_interleave(group, dim=1) for w in (w_k, w_v))
    return Heads(w_q, w_k, w_v, w_o, fold_norm, notes)


def rotary(model: Model, offset: int) -> Float[Tensor, "d_head d_head"] | None:
    """Return the matrix between W_Q and W_Kᵀ at a distance of `offset` tokens; None for offset 0.

    Raises:
        PointError: the model has no rotary embedding that this can read.
    """
    if offset == 0:
        return None
    with module_of(model) as (module, _):
        embeddings = [m for m in module.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        if not embeddings:
            raise PointError(f"{model.ref} has no rotary embedding: leave rope_offset at 0")
        frequencies = torch.as_tensor(embeddings[0].inv_freq).double().tolist()
    return rotation(model.shape.d_head, offset, frequencies)


def _inputs(projection: nn.Module, d_model: int) -> Tensor:
    """Return a projection's weights with inputs first, [d_model, outputs] float32."""
    weight, rows = matrix(projection, d_model)
    return (weight if rows else weight.T).detach().float().cpu()


def _layer(anatomy: Anatomy, layer: int) -> tuple[Tensor, ...]:
    d_model, k = int(anatomy.map.sizes.d_model), anatomy.d_head
    if anatomy.map.path("attn.qkv", layer):
        joint = _inputs(anatomy.component("attn.qkv", layer), d_model)
        if anatomy.layout is None:
            raise PointError(f"block {layer}: the layout of the joint query-key-value projection is not known")
        qkv = [joint[:, index.cpu()].movedim(1, 0) for index in (anatomy.layout.q, anatomy.layout.k, anatomy.layout.v)]
    else:
        parts = [_inputs(anatomy.component(f"attn.{name}", layer), d_model) for name in "qkv"]
        qkv = [part.reshape(d_model, -1, k).movedim(1, 0) for part in parts]
    output = _inputs(anatomy.component("attn.o", layer), anatomy.n_heads * k)
    return (*qkv, output.reshape(anatomy.n_heads, k, -1))


def _gain(anatomy: Anatomy, layer: int) -> tuple[Tensor, bool] | None:
    """Return (gain [d_model], whether the mean is subtracted) of the norm before attention, or None where there is none."""
    path = anatomy.map.path("ln1", layer)
    if path is None or anatomy.kind == "post_norm":
        return None
    norm, d = anatomy.map.module.get_submodule(path), int(anatomy.map.sizes.d_model)
    weight = getattr(norm, "weight", None)
    device, dtype = (
        (weight.device, weight.dtype) if isinstance(weight, Tensor) else (torch.device("cpu"), torch.float32)
    )
    # The gain is measured on the norm itself, since families store it as w or as 1 + w: alternating signs have mean zero
    # and root mean square one, so they come out as the gain, plus a bias that the difference of two such inputs removes.
    signs = torch.ones(d, device=device, dtype=dtype)
    signs[1::2] = -1
    up, down = norm(signs[None] * 64)[0].float(), norm(-signs[None] * 64)[0].float()
    gain = (up - down).cpu() / 2 * signs.float().cpu()
    shifted = norm(signs[None] * 64 + 640)[0].float()
    centred = bool((shifted - up).abs().max() < 0.1 * gain.abs().max())
    return gain, centred


def _folded(w: Tensor, gains: list[tuple[Tensor, bool] | None], center: bool) -> Tensor:
    out = w.clone()
    for layer, entry in enumerate(gains):
        if entry is None:
            continue
        gain, centred = entry
        out[layer] *= gain[:, None]
        if center and centred:
            out[layer] -= out[layer].mean(-2, keepdim=True)
    return out


def _notes(anatomy: Anatomy, fold_norm: bool) -> tuple[str, ...]:
    notes = [
        "Scores leave out biases, MLPs and the norms between two layers: they measure direct paths under isotropic input."
    ]
    if fold_norm and (anatomy.kind == "post_norm" or anatomy.map.path("ln1", 0) is None):
        notes.append("This model has no norm before attention, so there is no gain to fold.")
    if anatomy.map.path("attn.q_norm", 0):
        notes.append("Queries and keys are normalised in this model, which scores of kind q and k leave out.")
    if anatomy.map.path("ln1_post", 0):
        notes.append("Attention's output is normalised before it is added, which the output weights here leave out.")
    return tuple(notes)
