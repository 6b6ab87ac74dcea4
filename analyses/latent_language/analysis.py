"""Latent languages: which language the layers between prompt and answer would write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.interventions import Interventions
from analyses.latent_language import answers as own_answers
from analyses.latent_language import swap
from analyses.latent_language import tables as tabled
from analyses.latent_language.extra_settings import Settings
from analyses.latent_language.extras import EXTRAS, Extra, fitted_lens
from analyses.latent_language.figures import FIGURES
from analyses.latent_language.ids import Collide, Rule, SetRule
from analyses.latent_language.items import (
    Dropped,
    Item,
    check_targets,
    given_items,
    target_ids,
    task_items,
    with_controls,
)
from analyses.latent_language.profiles import PROFILES
from analyses.latent_language.read import LAST, Reader, Reading, prefixes
from analyses.latent_language.task_prompts import Form, Framing, Task, queries
from analyses.latent_language.verdicts import verdicts
from analyses.options import accept_old_names, option
from analyses.reading.choice import chosen_lens
from analyses.results.statistics import Ci
from analyses.word_lists import read_words, shipped_words
from probes.capture.needs import Need
from probes.errors import OptionError, PromptError
from probes.models.protocol import Model
from probes.progress import Progress
from probes.prompts import Field, Prompt
from probes.store import ActivationStore

Language = Literal["en", "fr", "de", "es", "it", "ru", "zh", "ja", "ar"]

ADDED = {"attn": "attn_out", "mlp": "mlp_out"}
"""What a lens of that name reads instead of the stream."""


@accept_old_names
@dataclass(frozen=True)
class LatentLanguage(Analysis):
    """Latent languages by the lens (Wendler et al. 2024, arXiv 2402.10588; Zhong et al. 2024, arXiv 2408.10811)."""

    task: Task = option("translation", "What is asked, for each word of the list, where prompts carry no targets.")
    form: Form = option("quoted", "Of translation: the paper's, ending in an open quote, or the same without quotes.")
    source: tuple[Language, ...] = option(("fr",), "Language asked from; one, or one per target.")
    target: tuple[Language, ...] = option(("zh",), "Language asked for; one, or one per source.")
    latents: tuple[Language, ...] = option(("en",), "Languages the middle layers may be writing in.")
    set_rule: SetRule = option(
        "prefix", "prefix: tokens that start the word; first_token: its first token; multi_token: the whole word."
    )
    on_collision: Collide = option(
        "drop", "What to do where two languages share tokens: drop the item, keep, or subtract them.",
        aliases=("collide",),
    )  # fmt: skip
    spaces: bool = option(True, "Whether forms with a leading space count.")
    case: bool = option(False, "Whether the word in lower case and with a capital counts too.")
    byte_tokens: bool = option(True, "Whether tokens that cut a character count, for set_rule prefix.")
    synonyms: bool = option(True, "Whether synonyms of the list count.")
    words: str = option("", "A word file or folder in place of the shipped list, also in the papers' formats.")
    n_shot: int = option(-1, "Demonstrations per prompt; -1 for the papers' 4, and 2 for cloze.", low=-1, high=32)
    n_prompts: int = option(
        0,
        "Words kept per pair, drawn by seed among those that can be measured; 0 for all.",
        low=0,
        aliases=("n_items",),
    )
    lens: str = option(
        "logit",
        "What is read: the stream (logit), the stream through a tuned lens fitted here (tuned) or through the lens in a folder, "
        "or what attention or the MLP adds (attn, mlp).",
        lenses=("tuned", "attn", "mlp"),
    )
    answers: Literal["generate", "first_token"] = option(
        "generate", "How the model's own answer is judged: the word it writes, or its most probable next token."
    )
    ci: Ci = option("bootstrap", "The 95 % intervals over items: resampled, or Gaussian.")
    extras: tuple[Extra, ...] = option(
        (), "Further measurements: culture questions, similarity across languages, swapped dimensions, what a layer writes.",
        old_values={"readout": "layer_writing"},
    )  # fmt: skip
    framings: tuple[Framing, ...] = option(("plain", "japan"), "For culture: no country named, or which one.")
    layers: tuple[float, ...] = option(
        (0.25, 0.5, 0.75, 0.9), "For swap and layer_writing: where, as relative depth.", low=0, high=1
    )
    shares: tuple[float, ...] = option(
        (0.1, 0.5, 1.0, 2.0, 5.0, 10.0), "For swap: percent of dimensions swapped.", low=0, high=100
    )
    swap_to: Language = option("en", "For swap: the language whose dimensions are put in.")
    extra_items: int = option(12, "For swap, layer_writing and similarity: how many items.", low=2)
    beam_width: int = option(5, "For layer_writing: beams kept.", low=1, high=50)
    beam_tokens: int = option(4, "For layer_writing: tokens written.", low=1, high=32)
    seed: int = option(42, "Seed of demonstrations, draws, controls and intervals.", low=0)

    name = "latent_language"
    title = "Latent languages by the lens"
    reference = (
        'Wendler et al. 2024, "Do Llamas Work in English?", arXiv 2402.10588; Zhong et al. 2024, '
        '"Beyond English-Centric LLMs: What Language Do Multilingual Language Models Think in?", arXiv 2408.10811'
    )
    prompt_fields: ClassVar[Mapping[str, Field]] = {
        "targets": Field(
            'What each language would say next: {"en": ["dog"], "fr": ["chien"]}, or token ids {"en": [262]}.',
            check_targets,
            ids=target_ids,
        )
    }
    figures = FIGURES
    profiles = PROFILES

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.source) != len(self.target) and 1 not in (len(self.source), len(self.target)):
            raise OptionError(
                f"options source ({len(self.source)}) and target ({len(self.target)}) must be equally many, or one of them one"
            )

    @property
    def _point(self) -> str:
        return ADDED.get(self.lens, "resid_post")

    @property
    def makes_prompts(self) -> bool:
        """Yes: where no prompt carries targets, those of its task."""
        return True

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(source, target) of each pair; the source is the target where a task has none."""
        n = max(len(self.source), len(self.target))
        targets = self.target * (n // len(self.target))
        sources = self.source * (n // len(self.source)) if self.task == "translation" else targets
        return tuple(dict.fromkeys(zip(sources, targets, strict=True)))

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Those of the extra `swap`."""
        if "swap" not in self.extras or model.tokenizer is None:
            return Interventions()
        return Interventions({"rows with swapped dimensions": swap.forwards(self._settings(()), model.shape.n_layers)})

    def needs(self, model: Model) -> list[Need]:
        """The last row of every layer, and of the stream's end, which says what the model answers."""
        return [Need((f"{self._point}.*", f"resid_post.{model.shape.n_layers - 1}"), LAST)]

    def rule(self, model: Model) -> Rule | None:
        """How words become token sequences; None where the model has no tokenizer."""
        if model.tokenizer is None:
            return None
        return Rule(model.tokenizer, self.set_rule, self.spaces, self.case, self.byte_tokens)

    def collect(self, model: Model, prompts: PromptsLike = ()) -> list[Prompt]:
        """Every sequence that will be read, with the tokens that teacher forcing adds."""
        items, _ = self.items(model, prompts)
        return [Prompt((*item.tokens, *leaf)) for item in items for leaf in prefixes(item, longest=True)]

    def items(self, model: Model, prompts: PromptsLike = ()) -> tuple[list[Item], list[Dropped]]:
        """What will be measured, and what is left out with the reason.

        Prompts that carry `targets` are the items; where none does, the task's prompts are made from the word list.

        Raises:
            PromptError: no item is left, or the model has no tokenizer for a task.
        """
        drawn = as_prompts(prompts, model, self.prompt_fields)
        if any("targets" in prompt.fields for prompt in drawn):
            items, dropped = given_items(drawn, self.rule(model), model, self.target[0], self.on_collision)
        else:
            items, dropped = self._task_items(model)
        if not items:
            reasons = "; ".join(sorted({reason for _, _, reason in dropped})[:3])
            raise PromptError(
                f"no item is left to measure ({reasons}); try --on-collision subtract or another --set-rule"
            )
        return with_controls(items, self.seed, model.shape.d_vocab), dropped

    def _task_items(self, model: Model) -> tuple[list[Item], list[Dropped]]:
        rule = self.rule(model)
        if rule is None:
            raise PromptError(f'{model.ref} has no tokenizer: give lines with "tokens" and "targets" of token ids')
        words = read_words(self.words) if self.words else shipped_words()
        n_shot = (2 if self.task == "cloze" else 4) if self.n_shot < 0 else self.n_shot
        items: list[Item] = []
        dropped: list[Dropped] = []
        for source, target in self.pairs:
            drawn = queries(words, self.task, source, target, n_shot, 0, self.seed, self.form)
            pair = f"{source}→{target}" if self.task == "translation" else f"{self.task} {target}"
            languages = tuple(dict.fromkeys((target, *self.latents)))
            kept, lost = task_items(
                drawn,
                rule,
                model,
                pair,
                languages,
                self.on_collision,
                self.synonyms,
                len(items),
                self.n_prompts,
                self.seed,
            )
            items, dropped = items + kept, dropped + lost
            if not drawn:
                dropped.append((pair, "all", f"the word list has nothing for {self.task} from {source} to {target}"))
        return items, dropped

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Tables `probability`, `curve`, `geometry`, `profile`, `lead`, `summary`, `answers`, `dropped`, and one or two
        for each of `extras`.

        Prompts may carry `targets`: {language: [token ids]} for plain sums over these ids, or {language: [words]}.
        """
        model.unembedding()
        items, dropped = self.items(model, prompts)
        reader = Reader(model, store, progress, self._point)
        tables: dict[str, pd.DataFrame] = {}
        settings = self._settings(items)
        if self.lens == "tuned":
            tables["tuned_lens"] = fitted_lens(reader, settings)
        elif self.lens not in ADDED:
            reader.translate = chosen_lens(self.lens, model).readable
        reading = reader.read(items)
        said, written = own_answers.said(reading, model, store, self.answers, progress)
        right = own_answers.right(reading, said)
        tables = {**self._tables(reading, said, right, model), **tables}
        for extra in self.extras:
            extra_tables, lost = EXTRAS[extra](reader, settings)
            tables |= extra_tables
            dropped += lost
        tables["dropped"] = pd.DataFrame(dropped, columns=["pair", "item", "reason"])
        counts = {"prompts": len(items), "tokens": sum(len(item.tokens) for item in items), "answers_written": written}
        notes = (*verdicts(tables["summary"]), *self._notes(tables["dropped"], items))
        return Measured([], tables, reader.captures, notes, counts, reader.patched)

    def _tables(
        self, reading: Reading, said: Sequence[str | None], right: NDArray[np.bool_], model: Model
    ) -> dict[str, pd.DataFrame]:
        curves = tabled.curve(reading, right, model, self.ci, self.seed)
        leads = tabled.lead(reading, self.ci, self.seed)
        pairs = np.array([item.pair for item in reading.items])
        counted = {str(pair): (int(right[pairs == pair].sum()), int((pairs == pair).sum())) for pair in set(pairs)}
        return {
            "probability": tabled.probability(reading),
            "curve": curves,
            "geometry": tabled.geometry(reading),
            "profile": tabled.profile(reading, self.ci, self.seed),
            "lead": leads,
            "summary": tabled.summary(curves, leads, counted),
            "answers": tabled.answers(reading, said, right, model),
        }

    def _settings(self, items: Sequence[Item]) -> Settings:
        return Settings(
            items=tuple(items), pairs=self.pairs, seed=self.seed, ci=self.ci, n_prompts=self.n_prompts,
            framings=self.framings, depths=self.layers, shares=self.shares, swap_to=self.swap_to,
            extra_items=self.extra_items, beam_width=self.beam_width, beam_tokens=self.beam_tokens,
            spaces=self.spaces, case=self.case, words=self.words, form=self.form,
        )  # fmt: skip

    def _notes(self, dropped: pd.DataFrame, items: Sequence[Item]) -> list[str]:
        notes, n_items = [], len(items)
        for pair, n in Counter(item.pair for item in items if not item.pair.startswith("given")).items():
            if n < self.n_prompts:
                notes.append(
                    f"{pair}: {n} items instead of {self.n_prompts}, all that the word list and this tokenizer allow."
                )
        lost = dropped[~dropped["pair"].str.startswith("culture")]
        if len(lost):
            common = lost["reason"].str.replace(r"\d+ tokens?", "tokens", regex=True).value_counts()
            notes.append(f"{len(lost)} items were left out, {n_items} kept; the usual reason: {common.index[0]}.")
        if self.set_rule == "prefix":
            notes.append(
                "Under set_rule prefix a token that starts a word also starts many others: compare with the shuffled-word control."
            )
        if self.lens == "logit":
            notes.append(
                "The logit lens is not calibrated in early layers; `lens=tuned` reads them through a fitted map."
            )
        return notes
