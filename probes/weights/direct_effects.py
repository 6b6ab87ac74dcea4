"""What each head adds to a token's logit by the direct path: its output, the final norm at its scale, the unembedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.rerouting import module_of
from probes.edits.token_columns import lens_column
from probes.edits.weights import matrix
from probes.errors import PointError
from probes.models.protocol import Model


@torch.no_grad()
def head_effects(
    model: Model, z: Mapping[int, Float[Tensor, "head d_head"]], final_scale: float, token: int
) -> Float[Tensor, "layer head"]:
    """Return every head's direct effect on a token's logit, in logits, of one position.

    The final norm's scale is taken as it is, so that the effects of all that writes to the stream add up to the logit
    less the norm's and the unembedding's own biases (Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits").

    Args:
        model: the model.
        z: per layer, the heads' outputs before the output projection.
        final_scale: the divisor of the final norm at that position.
        token: the token's id.

    Raises:
        PointError: a model that changes what attention adds before the stream gets it, or whose weights are not at hand.
    """
    column = lens_column(model, token)
    rows = []
    with module_of(model) as (_, anatomy):
        for layer in range(anatomy.n_layers):
            if anatomy.map.path("ln1_post", layer):
                raise PointError(
                    f"{model.ref} normalises what attention adds, so no head has a direct effect of its own"
                )
            weight, inputs_first = matrix(anatomy.component("attn.o", layer), model.shape.n_heads * model.shape.d_head)
            along = (weight.float() if inputs_first else weight.float().T) @ column.to(weight.device)
            rows.append((z[layer].to(along) * along.view(model.shape.n_heads, model.shape.d_head)).sum(-1).cpu())
    return torch.stack(rows) / final_scale
