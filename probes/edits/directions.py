"""Directions named in words: a token's, the difference of two tokens', of two prompts, one of a saved run, or of a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from probes.cache_folder import expanded
from probes.edits.line import Line
from probes.edits.positions import At, Texts, indices, need_texts
from probes.edits.values import Source, Values
from probes.errors import OptionError, PointError, PromptError, shown
from probes.models.protocol import Model
from probes.points import POINTS, Address

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from probes.saved_directions import SavedDirections

RUN_FORMS = {"probe": "probe RUN/DATASET", "channel": "channel RUN/LAYER.HEAD.COMPONENT"}
"""The forms of a direction that a saved run keeps."""
FORMS = (
    "token ' Paris'",
    "token ' a' - token ' b'",
    "difference",
    *RUN_FORMS.values(),
    "file 'direction.safetensors'",
    "file 'some.safetensors' 'name'",
)
"""The legal forms of a direction."""


@dataclass(frozen=True)
class Place:
    """Where a direction is used."""

    address: Address
    positions: At = "all"
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenDirection:
    """The unit vector along which the logit lens reads a token, or one token rather than another.

    It is the token's column of the unembedding times the gain of the final norm, without its mean where that norm takes
    the mean away, divided by its length.
    """

    token: str
    minus: str | None = None

    def __str__(self) -> str:
        return f"token {self.token!r}" + ("" if self.minus is None else f" - token {self.minus!r}")

    def text(self, address: Address) -> str:
        """Return the direction as it enters store keys, where it is used at `address`."""
        return str(self)

    def values(self, model: Model, place: Place, texts: Texts | None) -> Values:
        """Return the direction [d_model].

        Raises:
            PointError: a point that is no row of the stream.
            PromptError: text that is not one token.
        """
        dims = POINTS[place.address.point].dims
        if dims[-1] != "d_model":
            raise PointError(
                f"{place.address} is {dims[-1]} wide: a token's direction is of the stream, such as resid_post.3"
            )
        from probes.edits.token_columns import unit_column

        minus = None if self.minus is None else token_id(model, self.minus)
        return Values(unit_column(model, token_id(model, self.token), minus), self.text(place.address))


@dataclass(frozen=True)
class Difference:
    """The other prompt's rows less this one's, at the same place, both as they are without edits."""

    def __str__(self) -> str:
        return "difference"

    def text(self, address: Address) -> str:
        """Return the direction as it enters store keys, where it is used at `address`."""
        return "difference"

    def values(self, model: Model, place: Place, texts: Texts | None) -> Values:
        """Return the difference [position, ...].

        Raises:
            OptionError: no second prompt.
            PromptError: positions that the two prompts do not share.
        """
        here = need_texts(texts, "a difference of prompts")
        other = here.other_or_refuse("a difference of prompts")
        at = indices(place.positions, model.tokenizer, here.tokens)
        if max(at, default=0) >= len(other):
            raise PromptError(
                f"position {max(at)} is outside the other prompt of {len(other)} tokens: name positions that both have"
            )
        own, theirs = (
            Source(tokens, place.address, at, place.heads).read(model, here.rows).tensor
            for tokens in (here.tokens, other)
        )
        return Values(theirs - own)


@dataclass(frozen=True)
class FileDirection:
    """A tensor of a safetensors file, as it is."""

    path: str
    name: str = ""

    def __str__(self) -> str:
        return f"file {self.path!r}" + (f" {self.name!r}" if self.name else "")

    @cached_property
    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            OptionError: no such file, no safetensors file, or several tensors and no name.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(expanded(self.path))
        except (OSError, SafetensorError, ValueError) as error:
            raise OptionError(
                f"direction file {shown(self.path)} cannot be read ({error}): give a .safetensors file"
            ) from None
        if self.name in tensors:
            return tensors[self.name].float()
        if self.name or len(tensors) != 1:
            raise OptionError(f"direction file {shown(self.path)} has tensors {', '.join(tensors)}: name one of them")
        return next(iter(tensors.values())).float()

    def text(self, address: Address) -> str:
        """Return the direction as it enters store keys: by the numbers."""
        return f"file:{Values(self.tensor).digest}"

    def values(self, model: Model, place: Place, texts: Texts | None) -> Values:
        """Return the tensor.

        Raises:
            OptionError: a tensor of another width than the point's.
        """
        return _fitting(self.tensor, model, place, f"direction file {shown(self.path)}")


def _fitting(tensor: Tensor, model: Model, place: Place, whose: str) -> Values:
    width = model.shape.width(POINTS[place.address.point].dims[-1])
    if tensor.shape[-1] != width or tensor.dim() > 2:
        raise OptionError(f"{whose} has a tensor of {tuple(tensor.shape)}; {place.address} is {width} wide")
    return Values(tensor)


@dataclass(frozen=True)
class RunDirection:
    """A unit vector that a saved run keeps.

    `probe RUN/DATASET` is the normal of the linear probe that told the data set's classes apart at the very point and layer
    where it is used, towards label 1; `probe RUN/DATASET@resid_post.8` is that of another place. `channel
    RUN/LAYER.HEAD.COMPONENT` is what a singular component of a head's output matrix writes.
    """

    kind: str
    """`probe` or `channel`."""
    path: str
    """The run's folder, or its name in the folder of runs, and the direction's name behind a slash."""

    plain: ClassVar[re.Pattern[str]] = re.compile(r"[^\s'\"]+")

    def __str__(self) -> str:
        bare = self.path.isprintable() and self.plain.fullmatch(self.path)
        return f"{self.kind} {self.path if bare else repr(self.path)}"

    @cached_property
    def saved(self) -> tuple[str, str, SavedDirections]:
        """The run, the direction's name and the run's directions.

        Raises:
            OptionError: no such run, or none that keeps directions of this kind.
        """
        from probes.saved_directions import directions_of

        return directions_of(self.kind, self.path)

    def tensor(self, address: Address) -> Float[Tensor, " d_model"]:
        """Return the unit vector that the run keeps for an address.

        Raises:
            OptionError: the run keeps none under this name, or none for this address; says which it has.
        """
        from torch import from_numpy

        run, name, saved = self.saved
        vector = saved.vectors.get(f"{name}@{address}", saved.vectors.get(name))
        if vector is None:
            raise OptionError(
                f"run {shown(run)} keeps no {self.kind} {shown(name)} for {address}: it has {saved.names}; write "
                f"{self.kind} RUN/NAME, or RUN/NAME@POINT.LAYER for one of another place"
            )
        return from_numpy(vector)

    def text(self, address: Address) -> str:
        """Return the direction as it enters store keys: by the numbers."""
        return f"run:{Values(self.tensor(address)).digest}"

    def values(self, model: Model, place: Place, texts: Texts | None) -> Values:
        """Return the vector.

        Raises:
            OptionError: as `tensor`, or a vector of another width than the point's.
        """
        return _fitting(self.tensor(place.address), model, place, f"{self.kind} {shown(self.path)}")


Direction = TokenDirection | Difference | FileDirection | RunDirection


def read_direction(line: Line) -> Direction:
    """Return the direction that stands here."""
    if line.takes("difference"):
        return Difference()
    if line.takes("file"):
        return FileDirection(line.quoted("a file's path in quotes"), line.quoted() if line.is_quoted() else "")
    for kind in RUN_FORMS:
        if line.takes(kind):
            place = f"RUN/NAME, in quotes where it holds blanks: {RUN_FORMS[kind]}"
            return RunDirection(kind, line.quoted(place) if line.is_quoted() else line.word(place))
    if not line.takes("token"):
        raise line.fault(f"a direction ({'; '.join(FORMS)})")
    token = line.quoted("a token's text in quotes")
    if not line.takes("-"):
        return TokenDirection(token)
    line.need("token")
    return TokenDirection(token, line.quoted("a token's text in quotes"))


def token_id(model: Model, text: str) -> int:
    """Return the id of a text that is one token.

    Raises:
        PromptError: it is none or several, or the model came without a tokenizer.
    """
    if model.tokenizer is None:
        raise PromptError(f"{model.ref} came without a tokenizer, so a token cannot be named by its text {shown(text)}")
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        parts = ", ".join(repr(model.tokenizer.decode([i])) for i in ids[:8])
        hint = f"; with a blank before it: {' ' + text!r}" if not text.startswith(" ") else ""
        raise PromptError(f"{shown(text)} is {len(ids)} tokens ({parts}): name one token{hint}")
    return int(ids[0])
