"""What an intervention is, and how several are applied to one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from probes.edits.line import EditError, Line, split_layers
from probes.edits.positions import Texts
from probes.edits.programs import Program
from probes.errors import OptionError, PointError, unknown
from probes.models.protocol import Model, Shape, Write
from probes.points import Address, stage_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Scope = Literal["prefill", "every_step"]
"""When an edit acts while the model writes: on the prompt only, or also on every token written."""


ANY_LAYERS = 10_000
"""Stands for a model's number of layers where none is known: more than any has, so that no span of layers is cut."""

_GRAMMAR: dict[str, type[Edit]] = {}
"""First word of an edit's text to the class that reads it."""


class Edit:
    """An intervention: its text enters store keys, its writes are made anew for every forward.

    A class of edits that people write names its first words in `verbs`, and reads and prints the rest of the line.
    """

    verbs: ClassVar[Mapping[str, str]] = {}
    """First word to the legal form of the line."""
    strength: ClassVar[str | None] = None
    """The field that says how strongly the edit acts; None where it acts or does not."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _GRAMMAR.update(dict.fromkeys(cls.__dict__.get("verbs", {}), cls))

    def text(self) -> str:
        """Return the edit as it enters store keys; two edits that compute different numbers have different texts."""
        raise NotImplementedError

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Return writes for one forward over prompts of these unpadded lengths; None means no padding."""
        raise NotImplementedError

    def first_block(self, shape: Shape) -> int:
        """Return the first block that runs otherwise than without the edit; the number of blocks for what follows them."""
        return min((stage_of(address, shape.n_layers) for address in self.writes(shape)), default=shape.n_layers + 1)

    def line(self) -> str:
        """Return the edit as one line that `parse` reads back.

        Raises:
            OptionError: numbers that no line can hold.
        """
        raise OptionError(f"{type(self).__name__} holds numbers that no line of text can: {self.text()}")

    def __str__(self) -> str:
        return self.line()

    @classmethod
    def from_line(cls, verb: str, line: Line) -> Edit:
        """Return the edit that begins with `verb`; `line` stands after it."""
        raise NotImplementedError

    @staticmethod
    def parse(text: str) -> Edit:
        """Return the edit that one line says, such as `zero z.5.3` or `patch resid_post.12 @4 from other`.

        Raises:
            OptionError: text that is no edit, with the place and the legal forms.
        """
        verb = text.split(maxsplit=1)[0] if text.strip() else ""
        if verb not in _GRAMMAR:
            raise EditError(f"{unknown('edit', verb, _GRAMMAR)} The forms: {'; '.join(legal_forms().values())}")
        reader = _GRAMMAR[verb]
        line = Line(text, reader.verbs[verb])
        line.need(verb)
        edit = reader.from_line(verb, line)
        line.end()
        return edit


def legal_forms() -> dict[str, str]:
    """Return the legal form of every edit, by its first word."""
    return {verb: reader.verbs[verb] for verb, reader in _GRAMMAR.items()}


def parse_edits(text: str, n_layers: int) -> list[Edit]:
    """Return the edits that a line says; a point at several layers, as in `zero mlp_out.3-5`, is one edit for each.

    Raises:
        OptionError: as `Edit.parse`.
    """
    return [Edit.parse(part) for part in split_layers(text, n_layers)]


def check_edits(lines: Sequence[str]) -> None:
    """Refuse lines that are no edits of any model.

    Raises:
        OptionError: the first of them, with the place and the legal forms.
    """
    for line in lines:
        # Parts of one line differ by their layer alone.
        Edit.parse(split_layers(line, ANY_LAYERS)[0])


@runtime_checkable
class Borrowing(Protocol):
    """An edit whose values come from the model, from the prompt, or from another prompt."""

    def resolved(self, model: Model, texts: Texts | None = None) -> Edit:
        """Return the same edit with its values read from the model; `text` stays as it was.

        Args:
            model: the model that is edited.
            texts: the prompts that words such as `other` are about; None where many prompts are run.
        """
        ...


@runtime_checkable
class Altering(Protocol):
    """An edit of the module itself: of its weights, of its norms, or of the order in which its blocks run."""

    def within(self, model: Model) -> AbstractContextManager[None]:
        """Alter the model inside; outside it is exactly as before."""
        ...


@runtime_checkable
class Reordering(Protocol):
    """An edit of the order in which blocks run; several are one order."""

    def reordered(self, program: Program, n_layers: int) -> Program:
        """Return the program that follows from the one that ran before this edit."""
        ...

    def path(self, program: Program) -> Edit:
        """Return the edit that runs the blocks as a program says."""
        ...


def reordered(edits: Sequence[Edit], n_layers: int) -> Program:
    """Return the order in which blocks run under edits."""
    program = Program.plain(n_layers)
    for edit in edits:
        if isinstance(edit, Reordering):
            program = edit.reordered(program, n_layers)
    return program


def resolve(model: Model, edits: Sequence[Edit], texts: Texts | None = None) -> list[Edit]:
    """Return edits that need no further forward to make their writes, all changes of order as one.

    Raises:
        UserError: an edit that this model or these prompts cannot have.
    """
    ready, last = list[Edit](), None
    for edit in edits:
        if isinstance(edit, Reordering):
            last = edit
        else:
            ready.append(edit.resolved(model, texts) if isinstance(edit, Borrowing) else edit)
            for address in ready[-1].writes(model.shape):
                if reason := model.refusal(address):
                    raise PointError(f"edit of {address}: {model.ref} has no such point: {reason}")
    return [last.path(reordered(edits, model.shape.n_layers)), *ready] if last is not None else ready


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
    return composed([edit.writes(model.shape, lengths) for edit in edits])


def composed(parts: Sequence[Mapping[Address, Write]]) -> dict[Address, Write]:
    """Return writes that act one after the other where they share an address."""
    combined: dict[Address, Write] = {}
    for part in parts:
        for address, write in part.items():
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
