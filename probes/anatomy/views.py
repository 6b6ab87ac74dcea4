"""Views: how a point is read out of, and written into, the tensor that passes a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int, Shaped
from torch import Tensor


@runtime_checkable
class View(Protocol):
    """A pure pair of functions between a module's tensor [batch, pos, width] and a point's tensor [batch, pos, ...]."""

    def read(self, raw: Tensor) -> Tensor:
        """Return the point's tensor out of the module's."""
        ...

    def write(self, raw: Tensor, new: Tensor) -> Tensor:
        """Return the module's tensor with the point's exchanged for `new`."""
        ...


@dataclass(frozen=True)
class IdentityView:
    """The tensor itself."""

    def read(self, raw: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return the tensor itself."""
        return raw

    def write(self, raw: Shaped[Tensor, "*shape"], new: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return a copy of `new`."""
        # A copy, because some blocks add to their MLP's output in place.
        return new.clone()


@dataclass(frozen=True)
class Heads:
    """The last axis split into `n` heads of `width`."""

    n: int
    width: int

    def read(self, raw: Shaped[Tensor, "*rest width"]) -> Shaped[Tensor, "*rest head d_head"]:
        """Return the heads, [batch, pos, head, width]."""
        return raw.view(*raw.shape[:-1], self.n, self.width)

    def write(
        self, raw: Shaped[Tensor, "*rest width"], new: Shaped[Tensor, "*rest head d_head"]
    ) -> Shaped[Tensor, "*rest width"]:
        """Return the heads `new` side by side, in the shape of `raw`."""
        return new.reshape(raw.shape).clone()


@dataclass(frozen=True, eq=False)
class Gather:
    """Some outputs of a joint projection, `index` [head, d_head]."""

    index: Int[Tensor, "head d_head"]

    def read(self, raw: Shaped[Tensor, "*rest width"]) -> Shaped[Tensor, "*rest head d_head"]:
        """Return the outputs at `index`, [batch, pos, head, d_head]."""
        return raw[..., self._index(raw)]

    def _index(self, raw: Tensor) -> Tensor:
        index = self.index.to(raw.device)
        # Layouts are worked out in inference mode, and autograd keeps no tensor from there.
        return index.clone() if index.is_inference() else index

    def write(
        self, raw: Shaped[Tensor, "*rest width"], new: Shaped[Tensor, "*rest head d_head"]
    ) -> Shaped[Tensor, "*rest width"]:
        """Return `raw` with the outputs at `index` exchanged for `new`."""
        out = raw.clone()
        out[..., self._index(raw)] = new
        return out


@dataclass(frozen=True)
class Divisor:
    """What a norm divides its input by, in float32: [batch, pos, width] -> [batch, pos]. Can only be read."""

    eps: float
    centred: bool
    constant: bool = False
    """Whether the norm is a linear map, whose divisor is one."""

    def read(self, raw: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest"]:
        """Return the divisor of each row."""
        x = raw.float()
        if self.constant:
            return x.new_ones(x.shape[:-1])
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x.square().mean(-1) + self.eps).sqrt()

    def write(self, raw: Tensor, new: Tensor) -> Tensor:
        """Raise AssertionError: a divisor is never written."""
        raise AssertionError("a divisor is derived, so a write to it is refused before the forward")

    def normalised(self, raw: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest width"]:
        """Return the norm's input after division, before its weights, in float32."""
        x = raw.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x / self.read(raw)[..., None]


@dataclass(frozen=True)
class Site:
    """Where a point passes: the input or output of a module, and the view of it there."""

    modules: tuple[str, ...]
    """Dotted paths. Where there are several, all receive the same input, and the first to run stands for all."""
    side: Literal["input", "output"]
    view: View = IdentityView()
    in_place: bool = False
    """Whether a write must change the tensor itself, because the block goes on to use it besides this module."""
