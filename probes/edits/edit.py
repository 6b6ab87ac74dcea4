"""What an intervention is, and how several are applied to one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from probes.errors import OptionError
from probes.models.protocol import Model, Shape, Write
from probes.points import Address

Scope = Literal["prefill", "every_step"]
"""When an edit acts while the model writes: on the prompt only, or also on every token written."""


@runtime_checkable
class Edit(Protocol):
    """An intervention: its text enters store keys, its writes are made anew for every forward."""

    def text(self) -> str:
        """Return the edit as text; two edits that compute different numbers have different texts."""
        ...

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return writes for one forward over prompts of these unpadded lengths; None means no padding."""
        ...


@runtime_checkable
class Borrowing(Protocol):
    """An edit whose values come from another prompt."""

    def resolved(self, model: Model) -> Edit:
        """Return the same edit with its values read from the model; `text` stays as it was."""
        ...


@runtime_checkable
class Altering(Protocol):
    """An edit of the module itself: of its weights, or of the order in which its blocks run."""

    def within(self, model: Model) -> AbstractContextManager[None]:
        """Alter the model inside; outside it is exactly as before."""
        ...


def resolve(model: Model, edits: Sequence[Edit]) -> list[Edit]:
    """Return edits that need no further forward to make their writes."""
    return [edit.resolved(model) if isinstance(edit, Borrowing) else edit for edit in edits]


@contextmanager
def altered(model: Model, edits: Sequence[Edit]) -> Iterator[None]:
    """Alter weights and block order as the edits say inside; restore them outside, even after an error."""
    with ExitStack() as stack:
        for edit in edits:
            if isinstance(edit, Altering):
                stack.enter_context(edit.within(model))
        yield


def writes_of(model: Model, edits: Sequence[Edit], lengths: Sequence[int] | None = None) -> dict[Address, Write]:
    """Return fresh writes of all edits for one forward, composed in order where they share an address."""
    combined: dict[Address, Write] = {}
    for edit in edits:
        for address, write in edit.writes(model.shape, lengths).items():
            earlier = combined.get(address)
            combined[address] = write if earlier is None else _composed(earlier, write)
    return combined


def _composed(first: Write, second: Write) -> Write:
    return lambda tensor: second(first(tensor))


def decoding_writes(model: Model, edits: Sequence[Edit]) -> Callable[[], dict[Address, Write]]:
    """Return a maker of writes for the forwards of one `generate`: the first reads the prompt, each later one a new token."""
    forwards = 0

    def writes() -> dict[Address, Write]:
        nonlocal forwards
        forwards += 1
        active = edits if forwards == 1 else [e for e in edits if getattr(e, "scope", "every_step") == "every_step"]
        return writes_of(model, active)

    return writes


def generate(model: Model, tokens: Sequence[int], max_new_tokens: int, edits: Sequence[Edit], **how: Any) -> list[int]:
    """Return the tokens that the model writes under the edits; further arguments go to `model.generate`.

    Raises:
        OptionError: a path program together with edits of the prompt alone, which no cache then tells apart.
    """
    ready = resolve(model, edits)
    whole = any(getattr(edit, "uncached", False) for edit in ready)
    if whole and any(getattr(edit, "scope", "every_step") == "prefill" for edit in ready):
        raise OptionError(
            "under a path program every step reads the whole text: give the other edits scope 'every_step'"
        )
    with altered(model, ready):
        if not whole:
            return model.generate(
                tokens, max_new_tokens, writes=decoding_writes(model, ready) if ready else None, **how
            )
        written: list[int] = []
        end = getattr(model.tokenizer, "eos_token_id", None)
        while len(written) < max_new_tokens and (not written or written[-1] != end):
            written += model.generate([*tokens, *written], 1, writes=lambda: writes_of(model, ready), **how)
        return written


def logits(
    model: Model, tokens: Int[Tensor, "batch pos"], edits: Sequence[Edit] = (), lengths: Sequence[int] | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """Return the model's own logits under the edits, for right-padded tokens."""
    return read(model, tokens, [Address("logits")], edits, lengths)[Address("logits")]


def read(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    addresses: Sequence[Address],
    edits: Sequence[Edit] = (),
    lengths: Sequence[int] | None = None,
) -> dict[Address, Tensor]:
    """Return copies of points [batch, pos, ...] under the edits, for right-padded tokens."""
    values: dict[Address, Tensor] = {}
    reads = {a: lambda t, a=a: values.__setitem__(a, t.clone()) for a in addresses}
    ready = resolve(model, edits)
    with altered(model, ready):
        model.run(tokens, reads, writes_of(model, ready, lengths), lengths)
    # Cloned once more outside the forward, so that autograd accepts them.
    return {address: tensor.clone() for address, tensor in values.items()}
