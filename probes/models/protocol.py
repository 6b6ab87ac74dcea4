"""What every model backend gives: named tensors of one forward pass, with edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.points import Address

Read = Callable[[Tensor], None]
"""Receives a point's tensor, shape [batch, pos, ...], during the forward; must not keep it without copying."""

Write = Callable[[Tensor], Tensor]
"""Receives a point's tensor and returns its replacement of the same shape and dtype."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    architecture: str
    """The Hugging Face class name, for instance `LlamaForCausalLM`."""
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    """The longest sequence the model was made for, in tokens."""
    causal: bool
    """Whether position p depends on positions <= p only."""

    def width(self, dim: str) -> int:
        """The size of a named axis of `probes.points` other than pos, query and key."""
        sizes = {"head": self.n_heads, "kv_head": self.n_kv_heads, **asdict(self)}
        return int(sizes[dim])


@dataclass(frozen=True)
class Context:
    """Everything besides the tokens that decides what a row's numbers are; part of every store key."""

    weights: str
    """Digest of the weights and of the configuration that decides the computation."""
    backend: str
    dtype: str
    attention: str
    """The attention implementation, for instance `sdpa`."""
    edits: str = "none"
    """Canonical text of the interventions applied, or `none`."""


@dataclass(frozen=True, eq=False)
class Canary:
    """What a model computes on a fixed short input; whatever reproduces it is believed to be the same model."""

    tokens: Tensor
    """[rows, pos], without padding."""
    values: Tensor
    """[rows, pos, width], float32: some of the model's outputs at every position."""
    tolerance: float
    """Relative difference that another device or library may make."""


@dataclass(frozen=True)
class Identity:
    """One identity checked on a forward pass of the loaded model."""

    name: str
    error: float
    """Largest deviation relative to the largest magnitude of the expected tensor; unitless."""
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Faithfulness:
    """The identities of a loaded model, and the points it refuses with the reason."""

    identities: tuple[Identity, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Point name (or `lens`) to the reason this model does not have it."""

    @property
    def holds(self) -> bool:
        return all(identity.holds for identity in self.identities)


@dataclass(frozen=True)
class Unembedding:
    """How a residual is read: final norm, then unembedding, then softcap."""

    norm: Callable[[Tensor], Tensor]
    """The model's own final norm, [..., d_model] -> [..., d_model]."""
    weight: Tensor
    """[d_vocab, d_model]."""
    bias: Tensor | None = None
    """[d_vocab]."""
    softcap: float | None = None
    """Logits become `softcap * tanh(logits / softcap)`."""


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass as data; the fields are the arguments of `Model.run`."""

    tokens: Tensor
    """[batch, pos], right-padded."""
    reads: Mapping[Address, Read]
    writes: Mapping[Address, Write] = field(default_factory=dict)
    lengths: Sequence[int] | None = None


@runtime_checkable
class Model(Protocol):
    """A loaded model behind one of the backends. Analyses never ask which.

    In a notebook, a model made by another library comes in by `Model.from_hf`, `Model.from_bridge` or
    `Model.from_nnsight`, and goes out by the `as_bridge` and `as_nnsight` of the backends in memory.
    """

    ref: str
    shape: Shape
    context: Context
    tokenizer: Any
    """A Hugging Face tokenizer, or None where the model came without one."""
    device: torch.device
    faithfulness: Faithfulness
    revision: str | None
    canary: Canary

    def current(self) -> Context:
        """The context of the model as it is now, whatever was done to it since it was wrapped.

        Raises ModelError where no key can say what it computes: a hook or a patched `forward` of somebody else, autocast.
        """
        ...

    def refusal(self, address: Address) -> str | None:
        """None where the address can be read, otherwise the reason it cannot."""
        ...

    def run(
        self,
        tokens: Tensor,
        reads: Mapping[Address, Read],
        writes: Mapping[Address, Write] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """One forward over right-padded `tokens` [batch, pos], stopped after the last address asked for.

        A read sees its tensor after the write of the same address. `lengths` are the unpadded lengths; None
        means no padding. Raises PointError for an address the model refuses, before any computation.
        """
        ...

    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        writes: Callable[[], Mapping[Address, Write]] | None = None,
    ) -> list[int]:
        """The tokens the model writes after `tokens` (greedy at temperature 0), ended by an end-of-sequence token.

        `writes` makes fresh writes for every forward of the decoding.
        """
        ...

    def unembedding(self) -> Unembedding:
        """The final norm and unembedding; raises PointError where they do not reproduce the logits."""
        ...

    @staticmethod
    def from_hf(module: nn.Module, tokenizer: Any = None, *, backend: str = "native", ref: str | None = None) -> Model:
        """A transformers model in memory; raises ModelError where its identities fail."""
        from probes.models.interop import from_hf

        return from_hf(module, tokenizer, backend=backend, ref=ref)

    @staticmethod
    def from_bridge(bridge: Any, *, ref: str | None = None) -> Model:
        """A TransformerLens TransformerBridge; raises ModelError where its identities fail."""
        from probes.models.interop import from_bridge

        return from_bridge(bridge, ref=ref)

    @staticmethod
    def from_nnsight(traced: Any, *, ref: str | None = None) -> Model:
        """An nnsight model whose weights are in memory; raises ModelError where its identities fail."""
        from probes.models.interop import from_nnsight

        return from_nnsight(traced, ref=ref)


@runtime_checkable
class LayerMajor(Protocol):
    """A model for which many forwards together are cheaper than one after another: block by block, each over all."""

    def run_all(self, forwards: Sequence[Forward]) -> Iterator[int]:
        """Runs all of them, giving a forward's index each time one more block of it is done and its reads have happened.

        Raises PointError for an address the model refuses, before any computation.
        """
        ...


@runtime_checkable
class BlockAccess(Model, Protocol):
    """A model that hands out its module, so that its blocks can be run one by one, reordered, altered or differentiated.

    Only the native backend does; the others keep their module to themselves.
    """

    module: nn.Module
    """The transformers module whose forward is the model's."""
    anatomy: Anatomy
    """Where the points lie in `module`."""

    def exclusive(self) -> AbstractContextManager[None]:
        """A context in which no other thread runs the model, for alterations of the module that end with it.

        Raises PointError where the blocks are not in memory.
        """
        ...

    def hooked(
        self, reads: Mapping[Address, Read], writes: Mapping[Address, Write], rows: tuple[int, int]
    ) -> AbstractContextManager[None]:
        """A context in which reads and writes happen whenever a block runs, on `rows` (batch, pos).

        Raises PointError for an address the model refuses.
        """
        ...

    def block_output_lengths(self) -> tuple[int | None, ...]:
        """Per block, the length of the tuple it returns; None where it returns a bare tensor."""
        ...
