"""A tuned map's last steps down the divergence itself, for readers who compare with published numbers.

Belrose et al. 2023 train from zero by stochastic gradient descent; here Adam starts at the closed form, one map at a time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probes.lenses import logit
from probes.lenses.tuned import AffineMap
from probes.models.protocol import Unembedding

RATE = 1e-4
STEP_ROWS = 4096
"""Rows of a step, at most."""
PART_ROWS = 64
"""Rows whose logits are held at once."""


def refined(
    start: AffineMap,
    rows: Float[Tensor, "row d_model"],
    final: Float[Tensor, "row d_model"],
    unembedding: Unembedding,
    steps: int,
    seed: int,
) -> AffineMap:
    """Return the map after `steps` of Adam on KL(model || lens).

    Args:
        start: the closed form.
        rows: of the layer, at unit scale.
        final: the last block's rows that each is to be mapped to.
        unembedding: the model's, which stays as it is.
        steps: how many.
        seed: of the rows drawn for each step, where there are more than `STEP_ROWS`.
    """
    generator = torch.Generator().manual_seed(seed)
    change, bias = (part.clone().requires_grad_() for part in (start.change, start.bias))
    optimizer = torch.optim.Adam([change, bias], RATE)
    for _ in range(steps):
        drawn = torch.randperm(len(rows), generator=generator)[:STEP_ROWS]
        optimizer.zero_grad()
        for part in torch.split(drawn, PART_ROWS):
            with torch.no_grad():
                model = logit.logprobs_of(final[part], unembedding)
            with torch.enable_grad():
                lens = logit.logprobs_of(AffineMap(change, bias)(rows[part]), unembedding)
                loss = (model.exp() * (model - lens)).sum() / len(drawn)
            for tensor, gradient in zip((change, bias), torch.autograd.grad(loss, [change, bias]), strict=True):
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        optimizer.step()
    return AffineMap(change.detach(), bias.detach())
