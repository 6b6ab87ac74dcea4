"""Registry of labelled data sets for probing: shipped ones, and the nine of the paper from a file or the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from analyses.concept_depth import datasets_published as published
from analyses.concept_depth import datasets_shipped as shipped
from analyses.concept_depth.datasets_shipped import Example
from probes.errors import OptionError, PromptError, unknown
from probes.prompts import PromptLine

Level = Literal["factual", "emotional", "inferential"]

JUDGE = "Decide whether the statement is true or not, and answer Yes or No. {text}"
REVIEW = "{text} Decide whether this review is favourable, and answer Yes or No."


@dataclass(frozen=True)
class ConceptSet:
    """A data set, and how its texts become prompts."""

    name: str
    title: str
    level: Level
    template: str
    """Holds `{text}`; published sets have theirs in our words, with the instruction where the paper has it."""
    labels: tuple[str, str]
    """What label 0 and label 1 mean."""
    source: str
    """Where the texts come from, and under which terms."""
    answers: tuple[str, str] | None = None
    """The answer texts of label 0 and label 1 after the prompt, for the causal check."""
    make: Callable[[int], list[Example]] | None = None
    """Makes a shipped set from a seed."""
    read: Callable[[Path], list[Example]] | None = None
    """Reads a published set."""
    file: str = ""
    hub: tuple[str, str] | None = None
    """Data set repository and file on the hub."""


_TRUTH = "{text}\nIs this statement true or false? Answer:"
_FACTS = "GeoNames facts (CC BY 4.0) in a table that comes with the package"

SETS: tuple[ConceptSet, ...] = (
    ConceptSet(
        "city_country", "City and country", "factual", _TRUTH, ("false", "true"), _FACTS, (" false", " true"),
        make=shipped.city_country,
    ),
    ConceptSet(
        "capital_negation", "Capitals with negation", "factual", _TRUTH, ("false", "true"), _FACTS, (" false", " true"),
        make=shipped.capital_negation,
    ),
    ConceptSet(
        "number_comparison", "Number comparison", "inferential", _TRUTH, ("false", "true"), "made by rule",
        (" false", " true"), make=shipped.number_comparison,
    ),
    ConceptSet(
        "coin_flip", "Coin flip", "inferential", "{text} Is the coin still heads up? Answer:", ("no", "yes"), "made by rule",
        (" no", " yes"), make=shipped.coin_flip,
    ),
    ConceptSet(
        "sentiment", "Sentiment", "emotional", "{text}\nIs this positive or negative? Answer:", ("negative", "positive"),
        "written by hand for this package", (" negative", " positive"), make=shipped.sentiment,
    ),
    ConceptSet(
        "paper_cities", "Cities", "factual", JUDGE, ("true", "false"), "read from a local file", (" Yes", " No"),
        read=published.cities, file="cities.csv",
    ),
    ConceptSet(
        "paper_common_claim", "CommonClaim", "factual", JUDGE, ("true", "false"), "read from a local file", (" Yes", " No"),
        read=published.common_claim, file="common_claim.csv",
    ),
    ConceptSet(
        "paper_counterfact", "Counterfact", "factual", JUDGE, ("true", "false"), "read from a local file", (" Yes", " No"),
        read=published.counterfact, file="counterfact.csv",
    ),
    ConceptSet(
        "paper_hateeval", "HateEval", "emotional", "{text} Decide whether this comment is hate speech, and answer Yes or No.",
        ("hate speech", "no hate speech"), "read from a local file", (" Yes", " No"),
        read=published.hateeval, file="hateeval.tsv",
    ),
    ConceptSet(
        "paper_stsa", "STSA", "emotional", REVIEW, ("negative", "positive"), "read from a local file", (" No", " Yes"),
        read=published.stsa, file="stsa.binary.train",
    ),
    ConceptSet(
        "paper_imdb", "IMDb", "emotional", REVIEW, ("negative", "positive"), "read from a local file or the hub",
        (" No", " Yes"), read=published.imdb, file="test-00000-of-00001.parquet",
        hub=("stanfordnlp/imdb", "plain_text/test-00000-of-00001.parquet"),
    ),
    ConceptSet(
        "paper_sarcasm", "Sarcasm", "emotional",
        "Sarcasm says one thing and means the opposite. Headline: {text} Think: is it sarcastic? Answer Yes or No.",
        ("sarcastic", "not sarcastic"), "read from a local file", (" Yes", " No"),
        read=published.sarcasm, file="sarcasm.json",
    ),
    ConceptSet(
        "paper_strategy_qa", "StrategyQA", "inferential",
        "Decide whether the answer is yes. Q: Can a penguin fly to the moon? Penguins cannot fly. Answer: no\nQ: {text} "
        "Let us think step by step.",
        ("yes", "no"), "read from a local file", (" Yes", " No"), read=published.strategy_qa, file="StrategyQA_task.json",
    ),
    ConceptSet(
        "paper_coin_flip", "Coinflip", "inferential", "{text} Work out whether the coin is still heads up, and answer Yes or No.",
        ("yes", "no"), "read from a local file", (" Yes", " No"), read=published.coin_flip, file="coin_flip.json",
    ),
)  # fmt: skip
"""Every data set; those named `paper_…` are read in their published format."""

SHIPPED = tuple(entry.name for entry in SETS if entry.make)
"""Names of the sets that need no file and no network."""


def get_set(name: str) -> ConceptSet:
    """The data set of that name.

    Raises:
        OptionError: an unknown name, with the legal ones.
    """
    by_name = {entry.name: entry for entry in SETS}
    if name not in by_name:
        raise OptionError(unknown("data set", name, by_name))
    return by_name[name]


def load_set(
    name: str,
    *,
    path: str | Path | None = None,
    limit: int = 0,
    template: str | None = None,
    seed: int = 0,
) -> list[PromptLine]:
    """A data set as prompt lines with `label`, `group`, `dataset`, `template` and `answers`, class 0 above class 1.

    Args:
        path: file or folder of a published set.
        limit: at most so many rows, whole groups drawn by `seed`; 0 takes all.
        template: replaces the set's own; must hold `{text}`.

    Raises:
        OptionError: an unknown name, or a template without `{text}`.
        PromptError: a published set whose file is missing or in another format.
    """
    entry = get_set(name)
    form = entry.template if template is None else template
    if "{text}" not in form:
        raise OptionError(f"template {form!r} does not hold {{text}}, where each example goes")
    examples = _limited(_examples(entry, None if path is None else Path(path), seed), limit, seed)
    ordered = sorted(examples, key=lambda example: example.label)
    return [_line(entry, example, form, i) for i, example in enumerate(ordered)]


def _line(entry: ConceptSet, example: Example, form: str, index: int) -> PromptLine:
    fields: dict[str, Any] = {"label": example.label, "group": example.group, "dataset": entry.name, "template": form}
    if entry.answers:
        fields["answers"] = list(entry.answers)
    return PromptLine(f"{entry.name}:{index + 1}", form.replace("{text}", example.text), None, fields)


def _examples(entry: ConceptSet, path: Path | None, seed: int) -> list[Example]:
    if entry.make:
        return entry.make(seed)
    assert entry.read is not None
    if path is None and entry.hub:
        path = _from_hub(entry)
    if path is None:
        raise PromptError(
            f"data set {entry.name!r} is not part of this package: give the path of {entry.file} "
            f"({(entry.read.__doc__ or '').strip().rstrip('.')}); shipped sets are {', '.join(SHIPPED)}"
        )
    return published.read_published(entry.read, entry.name, entry.file, path)


def _from_hub(entry: ConceptSet) -> Path:
    from huggingface_hub import hf_hub_download

    assert entry.hub is not None
    repo, file = entry.hub
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except Exception as error:
        raise PromptError(
            f"data set {entry.name!r} cannot be fetched from the hub ({type(error).__name__}): give the path of {entry.file}"
        ) from None


def _limited(examples: list[Example], limit: int, seed: int) -> list[Example]:
    """Whole groups in an order drawn by the seed, until the next one would pass the limit."""
    if not limit or len(examples) <= limit:
        return examples
    members: dict[str, list[Example]] = {}
    for example in examples:
        members.setdefault(example.group, []).append(example)
    groups = list(members)
    kept: list[Example] = []
    for place in np.random.default_rng(seed).permutation(len(groups)):
        if len(kept) + len(members[groups[place]]) <= limit:
            kept += members[groups[place]]
    return kept
