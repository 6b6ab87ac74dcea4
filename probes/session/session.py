"""A model, a prompt or two and a stack of edits: what changes when they act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import Tensor

from probes.edits import Edit, generate, parse_edits, resolve
from probes.edits.directions import token_id
from probes.errors import OptionError
from probes.lenses.card import card_of
from probes.lenses.divergence import Distributions
from probes.lenses.logit import LogitLens
from probes.lenses.protocol import Lens
from probes.models.protocol import Model
from probes.prompts import token_ids
from probes.session.comparison import Comparison, LayerRow, Outcome, TokenProbability
from probes.session.everywhere import EffectMap, sweep
from probes.session.lens_grid import TOP, LensGrid, read_and_keep, read_grid
from probes.session.open_prompt import OpenPrompt, Run
from probes.session.state import PromptText, State, Step, as_prompt


class Kept:
    """What sessions of one model and its prompts share, so that nothing known is computed again."""

    def __init__(self, model: Model, text: PromptText, other: PromptText | None) -> None:
        own, *rest = token_ids([prompt for prompt in (text, other) if prompt is not None], model)
        self.prompt = OpenPrompt(model, own, rest[0] if rest else None)
        self.grids: dict[tuple[object, ...], LensGrid] = {}
        self.distributions: tuple[object, Distributions | None] | None = None
        """What a lens reads at every place of the clean run, and which lens; None there where that is too much to keep."""
        self.words: dict[int, str] = {}
        """Tokens as text: decoding all of a grid takes as long as running the model."""

    def clean_grid(self, ids: Sequence[int], lens: Lens) -> LensGrid:
        """Return the clean run's grid, and keep its distributions."""
        grid, known = read_and_keep(self.prompt.model, self.prompt.clean, ids, lens)
        self.distributions = key_of(lens), known
        return grid

    def known(self, lens: Lens) -> Distributions | None:
        """Return what a lens reads at every place of the clean run; None where that is too much to keep."""
        if self.distributions is None or self.distributions[0] != key_of(lens):
            self.clean_grid((), lens)
        assert self.distributions is not None
        return self.distributions[1]


@dataclass(frozen=True)
class Session:
    """A model and a state; immutable, so that an action gives another session, and undoing it is the old one.

    `Session(model, "The Eiffel Tower is in").edit("zero z.5.3").compare()`

    Args:
        model: the model.
        text: the prompt, or token ids.
        other: a second prompt, to copy from.
        watch: tokens whose probability is followed, as text.
        steps: the stack of edits.
    """

    model: Model = field(compare=False, repr=False)
    text: PromptText
    other: PromptText | None = None
    watch: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    ref: str = ""
    """What the model is loaded by; its `ref` by default."""
    kept: Kept | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        set_field = partial(object.__setattr__, self)
        set_field("text", as_prompt(self.text))
        set_field("other", None if self.other is None else as_prompt(self.other))
        set_field("watch", tuple(self.watch))
        set_field("steps", tuple(self.steps))
        set_field("ref", self.ref or self.model.ref)
        set_field("kept", self.kept or Kept(self.model, self.text, self.other))

    @property
    def state(self) -> State:
        """The session without its model."""
        return State(self.ref, self.text, self.other, self.steps, self.watch)

    def __str__(self) -> str:
        return str(self.state)

    @classmethod
    def parse(cls, text: str, model: Model | None = None) -> Session:
        """Return the session whose text this is.

        Args:
            text: as `str(session)` gives it.
            model: the model it names; loaded by its name where it is not given.

        Raises:
            UserError: text that is no session, or a model that cannot be loaded.
        """
        state = State.parse(text)
        if model is None:
            from probes.models.load import load_model

            model = load_model(state.model)
        return cls.of(model, state)

    @classmethod
    def of(cls, model: Model, state: State, kept: Kept | None = None) -> Session:
        """Return the session of a state, with what an earlier session of the same prompts knows."""
        return cls(model, state.text, state.other, state.watch, state.steps, state.model, kept)

    def with_state(self, state: State) -> Session:
        """Return the session of another state of the same model; what is known of the same prompts stays known."""
        same = (state.text, state.other) == (self.text, self.other)
        return Session.of(self.model, state, self.kept if same else None)

    def edit(self, *lines: str | Edit) -> Session:
        """Return the session with more edits on top, each a line such as `zero z.5.3`, or an edit.

        Raises:
            OptionError: a line that is no edit, with the legal forms.
        """
        n = self.model.shape.n_layers
        edits = [edit for line in lines for edit in (parse_edits(line, n) if isinstance(line, str) else [line])]
        return self.with_state(self.state.edit(*edits))

    def watching(self, *tokens: str) -> Session:
        """Return the session that follows these tokens."""
        return replace(self, watch=tokens)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that are on."""
        return self.state.edits

    @property
    def prompt(self) -> OpenPrompt:
        """The prompt's runs."""
        assert self.kept is not None
        return self.kept.prompt

    @property
    def run(self) -> Run:
        """The run under the edits."""
        return self.prompt.run(self.edits)

    @cached_property
    def watched_ids(self) -> tuple[int, ...]:
        """Ids of the watched tokens.

        Raises:
            PromptError: text that is not one token.
        """
        return tuple(token_id(self.model, text) for text in self.watch)

    def token(self, number: int) -> str:
        """Return a token as text; its id where the model came without a tokenizer."""
        if self.model.tokenizer is None:
            return f"[{number}]"
        assert self.kept is not None
        if number not in self.kept.words:
            self.kept.words[number] = str(self.model.tokenizer.decode([number]))
        return self.kept.words[number]

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The prompt's tokens as text."""
        return tuple(map(self.token, self.prompt.tokens))

    def readable(self) -> None:
        """Check that every layer can be read.

        Raises:
            PointError: a model that cannot be read by a lens.
            OptionError: one whose layers are not handed out.
        """
        self.model.unembedding()
        if not self.prompt.clean.streams.numel():
            raise OptionError(f"{self.model.ref} cannot be read layer by layer")

    def grid(self, before: bool = False, lens: Lens | None = None) -> LensGrid:
        """Return every layer's reading at every position, under the edits or before them.

        Raises:
            PointError: a model that cannot be read by a lens.
        """
        self.readable()
        through = lens or logit_lens(self.model)
        clean = self._grid((), through, None)
        return clean if before or not self.edits else self._grid(self.edits, through, clean)

    def _grid(self, edits: tuple[Edit, ...], lens: Lens, clean: LensGrid | None) -> LensGrid:
        assert self.kept is not None
        key = (edits, key_of(lens), self.watched_ids)
        grids = self.kept.grids
        if key not in grids:
            if clean is None:
                grids[key] = self.kept.clean_grid(self.watched_ids, lens)
            else:
                run, reference = self.prompt.run(edits), (self.prompt.clean, clean)
                grids[key] = read_grid(self.model, run, self.watched_ids, lens, reference, self.kept.known(lens))
            while len(grids) > 24:
                grids.pop(next(iter(grids)))
        return grids[key]

    def compare(self, new_tokens: int = 0, layers: bool = True) -> Comparison:
        """Return the next token before and after the edits.

        Args:
            new_tokens: how many tokens to write greedily after the prompt, before and after.
            layers: also read every layer at the last position.

        Raises:
            UserError: edits that this model or prompt cannot have.
        """
        clean, run = self.prompt.clean, self.run
        reads = layers and run.streams.numel() > 0 and "lens" not in self.model.faithfulness.refused
        rows = self._layers(clean, run) if reads else ((), ())
        written = self._written(new_tokens) if new_tokens else (None, None)
        before, after = (
            Outcome(self._top(one.logprobs), self._watched(one.logprobs), own, text)
            for one, own, text in zip((clean, run), rows, written, strict=True)
        )
        p = clean.logprobs.double()
        kl = float((p.exp() * (p - run.logprobs.double())).sum().clamp_min(0)) if run is not clean else 0.0
        return Comparison(
            tuple(map(str, self.edits)), self.tokens, before, after, kl, run.ran if run is not clean else 0
        )

    def _layers(self, clean: Run, run: Run) -> tuple[tuple[LayerRow, ...], tuple[LayerRow, ...]]:
        lens = logit_lens(self.model)
        last = [replace(one, streams=one.streams[:, -1:]) for one in (clean, run)]
        before = read_grid(self.model, last[0], self.watched_ids, lens)
        after = before if run is clean else read_grid(self.model, last[1], self.watched_ids, lens, (last[0], before))
        return self._layer_rows(before), self._layer_rows(after)

    def _layer_rows(self, grid: LensGrid) -> tuple[LayerRow, ...]:
        tops = zip(grid.top_ids[:, 0, 0].tolist(), grid.top_logprobs[:, 0, 0].tolist(), strict=True)
        return tuple(
            LayerRow(step_name(step), TokenProbability(self.token(i), i, p), tuple(w), kl)
            for step, (i, p), w, kl in zip(
                grid.steps, tops, grid.watched[:, 0].tolist(), grid.kl[:, 0].tolist(), strict=True
            )
        )

    def _top(self, logprobs: Tensor) -> tuple[TokenProbability, ...]:
        values, ids = logprobs.topk(min(TOP, len(logprobs)))
        return tuple(TokenProbability(self.token(i), i, p) for i, p in zip(ids.tolist(), values.tolist(), strict=True))

    def _watched(self, logprobs: Tensor) -> tuple[TokenProbability, ...]:
        return tuple(
            TokenProbability(text, i, float(logprobs[i])) for text, i in zip(self.watch, self.watched_ids, strict=True)
        )

    def _written(self, new_tokens: int) -> tuple[str, str]:
        ready = resolve(self.model, self.edits, self.prompt.texts)
        both = [generate(self.model, self.prompt.tokens, new_tokens, edits) for edits in ([], ready)]
        before, after = ("".join(map(self.token, ids)) for ids in both)
        return before, after

    def everywhere(self, index: int = -1, heads: bool | None = None) -> EffectMap:
        """Return the effect of one edit of the stack at every layer and position, or every head, the others as they are.

        Args:
            index: which edit; the last by default.
            heads: every layer and head instead of every layer and position; as the edit names heads, by default.

        Raises:
            OptionError: no edit, or one that stands at no place.
        """
        return sweep(self.prompt, self.steps, self.watched_ids, index, heads)


def key_of(lens: Lens) -> tuple[object, ...]:
    """Return what tells a lens from others of the same model."""
    return lens.card.kind, lens.card.tensors


def step_name(step: Sequence[int]) -> str:
    """Return a step of a program in words: its block, or those that run side by side."""
    return "|".join(map(str, step))


def logit_lens(model: Model) -> LogitLens:
    """Return the logit lens of a model."""
    return LogitLens(card_of("logit", model))
