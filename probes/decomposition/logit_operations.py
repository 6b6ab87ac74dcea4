"""What stands between the last block and the logits, the final norm first, as operations that the rules know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.decomposition import rules as rule
from probes.decomposition.module_reading import linear_of, norm_of, tolerance
from probes.decomposition.rules import Linear, Norm, Rules
from probes.decomposition.trace import Trace
from probes.errors import PointError
from probes.models.verify.recording import deviation

Step = Linear | Norm | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LogitOperations:
    """Operations from the last residual to the logits: the last Linear is the unembedding."""

    steps: tuple[Step, ...]
    softcap: float | None

    def capped(self, x: Float[Tensor, "*rest ids"]) -> Float[Tensor, "*rest ids"]:
        """Return logits after the softcap."""
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def relevant(
        self,
        rel: Float[Tensor, "source pos d_model"],
        total: Float[Tensor, "pos d_model"],
        ids: Int[Tensor, " ids"],
        rules: Rules,
    ) -> tuple[Float[Tensor, "source pos ids"], Float[Tensor, "pos ids"]]:
        """Return relevant and total logits of some tokens, for a last residual."""
        for step in self.steps[:-1]:
            rel, total = _step(step, rel, total, rules)
        unembed = self.steps[-1]
        assert isinstance(unembed, Linear)
        columns = Linear(unembed.weight[:, ids], None if unembed.bias is None else unembed.bias[ids])
        rel, total = _step(columns, rel, total, rules)
        if self.softcap is None:
            return rel, total
        out = self.capped(total)
        return rule.function(self.capped, (rel,), (total,), rules, out), out


def _step(step: Step, rel: Tensor, total: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    if isinstance(step, Linear):
        return rule.linear(rel, step, total, rules), step.total(total)
    if isinstance(step, Norm):
        return rule.norm(rel, step, total, rules), step.total(total)
    out = step(total)
    return rule.function(step, (rel,), (total,), rules, out), out


@torch.no_grad()
def read_logit_operations(
    module: nn.Module, seen: Trace, last: Float[Tensor, "pos d_model"], softcap: float | None
) -> LogitOperations:
    """Read the operations after the last block from the modules that ran, and check that they lead to the logits.

    Args:
        last: what leaves the last block.

    Raises:
        PointError: they are no chain of projections, norms and activations.
    """
    steps: list[Step] = []
    current = last
    for path, x, y in seen.tail:
        part = module.get_submodule(path)
        if deviation(x, current) > tolerance(next(module.parameters()).dtype):
            raise PointError(f"{path} does not read what the module before it gave, so logits cannot be decomposed")
        if x.shape == y.shape and torch.equal(x, y):
            continue
        steps.append(_read(part, path, x, y))
        current = y
    out = current if softcap is None else softcap * torch.tanh(current / softcap)
    if not steps or not isinstance(steps[-1], Linear) or deviation(out, seen.logits) > 1e-2:
        raise PointError("the modules after the last block do not lead to the logits, so these cannot be decomposed")
    return LogitOperations(tuple(steps), softcap)


def _read(part: nn.Module, path: str, x: Tensor, y: Tensor) -> Step:
    weight = getattr(part, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return linear_of(part, x.shape[-1])
    if isinstance(weight, Tensor):
        return norm_of(part, x, y, path)
    if not list(part.parameters()) and deviation(part(x), y) <= tolerance(x.dtype):
        activation: Callable[[Tensor], Tensor] = part
        return activation
    raise PointError(
        f"{path}: {type(part).__name__} is no projection, norm or activation, so logits cannot be decomposed"
    )
