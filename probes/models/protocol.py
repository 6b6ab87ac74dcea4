"""The interface of every model backend: named tensors of one forward pass, with edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from probes.points import Address

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from probes.anatomy import Anatomy
    from probes.shelf import Shelf

T = TypeVar("T")

Read = Callable[["Tensor"], None]
"""Receives a point's tensor, shape [batch, pos, ...], during the forward; must not keep it without copying."""

Write = Callable[["Tensor"], "Tensor"]
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
        """Return the size of a named axis of `probes.points` other than pos, query and key."""
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
    """A model's outputs on a fixed short input; a model that reproduces them is taken for the same one."""

    tokens: Int[Tensor, "batch pos"]
    """[rows, pos], without padding."""
    values: Float[Tensor, "batch pos width"]
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
        """Whether the deviation is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Faithfulness:
    """The identities of a loaded model, and the points it refuses with the reason."""

    identities: tuple[Identity, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Point name (or `lens`) to the reason this model does not have it."""

    @property
    def holds(self) -> bool:
        """Whether every identity holds."""
        return all(identity.holds for identity in self.identities)


@dataclass(frozen=True)
class Unembedding:
    """The map from a residual to logits: final norm, then unembedding, then softcap."""

    norm: Callable[[Tensor], Tensor]
    """The model's own final norm, [..., d_model] -> [..., d_model]."""
    weight: Float[Tensor, "d_vocab d_model"]
    """[d_vocab, d_model]."""
    bias: Float[Tensor, d_vocab] | None = None
    """[d_vocab]."""
    softcap: float | None = None
    """Logits become `softcap * tanh(logits / softcap)`."""


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass as data; the fields are the arguments of `Model.run`."""

    tokens: Int[Tensor, "batch pos"]
    """[batch, pos], right-padded."""
    reads: Mapping[Address, Read]
    writes: Mapping[Address, Write] = field(default_factory=dict)
    lengths: Sequence[int] | None = None


@runtime_checkable
class Model(Protocol):
    """A loaded model behind one of the backends. Analyses never ask which.

    In a notebook, a model made by another library comes in, and ours goes out, by `probes.models.interop`.
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
        """Return the context of the model as it is now, whatever was done to it since it was wrapped.

        Raises ModelError where no key can say what it computes: a hook or a patched `forward` of somebody else, autocast.
        """
        ...

    def refusal(self, address: Address) -> str | None:
        """Return why the address cannot be read, or None where it can."""
        ...

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        reads: Mapping[Address, Read],
        writes: Mapping[Address, Write] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Run one forward over right-padded `tokens` [batch, pos], stopped after the last address read or written.

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
        """Return the tokens the model writes after `tokens` (greedy at temperature 0), ended by an end-of-sequence token.

        `writes` makes fresh writes for every forward of the decoding.
        """
        ...

    def unembedding(self) -> Unembedding:
        """Return the final norm and unembedding; raises PointError where they do not reproduce the logits."""
        ...


@runtime_checkable
class LayerMajor(Protocol):
    """A model that runs many forwards together more cheaply: block by block, each block over all of them."""

    def run_all(self, forwards: Sequence[Forward]) -> Iterator[int]:
        """Run all forwards, giving a forward's index each time one more block of it is done and its reads have happened.

        Raises PointError for an address the model refuses, before any computation.
        """
        ...

    def together(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Return what tasks return that run this model, each block's weights read once for all that want it next."""
        ...

    def resumable(self, key: str) -> AbstractContextManager[None]:
        """Return a context in which finished groups of blocks are kept, until it ends well; `key` names the work."""
        ...


@runtime_checkable
class SavedRun(Protocol):
    """One run through the blocks, of which activations are kept at the ends of groups of blocks."""

    def saved(self) -> list[tuple[int, dict[str, Tensor]]]:
        """Return what was kept by an earlier process, as (blocks done, tensors) in order."""
        ...

    def save(self, done: int, tensors: Mapping[str, Tensor], instead: bool) -> None:
        """Keep tensors after `done` blocks, instead of what was kept before or beside it."""
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

    @property
    def shelf(self) -> Shelf:
        """Where activations wait that a later block needs."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Return a context in which no other thread runs the model, for what ends with it."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Return the context of `exclusive`, in which all weights can be read, altered and differentiated.

        Raises PointError where the blocks are not in memory.
        """
        ...

    def at(self, layer: int) -> AbstractContextManager[None]:
        """Return a context in which block `layer` can be run; where blocks are read from disk, its weights are there."""
        ...

    def altering(
        self, layer: int, alteration: Callable[[], AbstractContextManager[Any]]
    ) -> AbstractContextManager[None]:
        """Return a context in which block `layer` runs inside `alteration()`, which alters its weights and undoes it."""
        ...

    def during(self, context: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[None]:
        """Return a context inside which `context()` is entered, except while the model works on another task."""
        ...

    def saved_run(self, *entering: Tensor) -> SavedRun | None:
        """Return where the run that these tensors enter is kept; None where nothing is kept of it."""
        ...

    def ends_group(self, layer: int) -> bool:
        """Tell whether a saved run keeps its activations after block `layer`."""
        ...

    def hooked(
        self, reads: Mapping[Address, Read], writes: Mapping[Address, Write], rows: tuple[int, int]
    ) -> AbstractContextManager[None]:
        """Return a context in which reads and writes happen whenever a block runs, on `rows` (batch, pos).

        Raises PointError for an address the model refuses.
        """
        ...

    def block_output_lengths(self) -> tuple[int | None, ...]:
        """Return the length of the tuple that each block returns; None where it returns a bare tensor."""
        ...
