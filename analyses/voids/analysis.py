"""Voids: which layers are unactivated for which tokens, by changes of the L2 norm along depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from analyses.base import Analysis, Measured, PromptsLike, as_prompts
from analyses.generation import Decoding, respond
from analyses.interventions import Interventions
from analyses.options import accept_old_names, option
from analyses.scoring import check_answer, check_choices, score_choices
from analyses.voids import tables as voids_tables
from analyses.voids.early_exit import LAST, Masked, Reader, Tokens, run_masked
from analyses.voids.figures import FIGURES, PROFILES
from analyses.voids.norm_gates import RELEASED_NAMES, Delta, NormGate, step_size
from analyses.voids.trace import Item, Trace, apply_rule, batch_threshold, token_frame
from probes.capture.activations import Activations
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.edits import Edit
from probes.errors import OptionError
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Field, Prompt
from probes.reducers import ROWS, Reducer
from probes.store import ActivationStore

NORM = Reducer("norm")


@accept_old_names
@dataclass(frozen=True)
class Voids(Analysis):
    """Layer voids by the L2 rule (Shemiranifar 2025, "Void in Language Models", arXiv 2505.14467)."""

    alpha: tuple[float, ...] = option(
        (0.8,), "Share of the range of earlier steps a block must reach; one or several.", low=0, high=1
    )
    mode: Literal["measure", "early_exit", "skip"] = option(
        "early_exit", "measure: only that; early_exit: read the last active layer, as released; skip: leave void blocks out.",
        aliases=("semantics",), old_values={"trace": "measure", "readout": "early_exit", "mask": "skip"},
    )  # fmt: skip
    delta: Delta = option("norm_diff", "How a block's step is measured; norm_diff is the paper's.")
    first_layers: Literal["released", "always_active"] = option(
        "released", "Whether layers 0 and 1 can be void when the norm falls."
    )
    batch_layer0_threshold: bool = option(
        False, "Layer 0's threshold from the range over prompts, as the released code does in a batch.",
        aliases=("batch_lambda0",),
    )  # fmt: skip
    first_token: bool = option(True, "Whether a prompt's first token counts in the usage.", aliases=("include_bos",))
    norm_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Precision of norms and steps; bfloat16 shows the released code's noise."
    )
    phases: tuple[Literal["prompt", "response"], ...] = option(("prompt", "response"), "Which tokens are judged.")
    max_new_tokens: int = option(0, "Length of the response phase; 0 leaves it out.", low=0)
    response_from: Literal["model", "gated_model"] = option(
        "model", "Who writes the response: the plain model, or the one whose void blocks the mode leaves out.",
        old_values={"semantics": "gated_model"},
    )  # fmt: skip
    temperature: float = option(0.0, "Sampling temperature of the response; 0 is greedy, the paper used 0.6.", low=0)
    top_p: float = option(1.0, "Nucleus of the sampling; the paper used 0.9.", low=0, high=1)
    readout_positions: Literal["last", "all"] = option(
        "last", "Prompt positions whose read-out is scored, beside the whole response."
    )
    chat: bool = option(False, "Wrap each text as one user turn of the chat template.")
    seed: int = option(0, "Seed of sampling, controls and intervals.")

    name = "voids"
    title = "Voids: unactivated layers by the L2 norm"
    reference = 'Shemiranifar 2025, "Void in Language Models", arXiv 2505.14467'
    prompt_fields: ClassVar[Mapping[str, Field]] = {
        "choices": Field('Answers to choose from, at least two: ["Paris", "Rome"].', check_choices),
        "answer": Field("The right one of the choices.", check_answer),
    }
    figures = FIGURES
    profiles = PROFILES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_dtype == "bfloat16" and self.delta not in ("norm_diff", "rel_norm_diff"):
            raise OptionError(f"norm_dtype bfloat16 needs delta norm_diff or rel_norm_diff, not {self.delta}")
        if self.mode == "skip" and (self.batch_layer0_threshold or self.norm_dtype != "float32"):
            raise OptionError(
                "mode skip judges blocks while they run: batch_layer0_threshold and norm_dtype bfloat16 need measure or early_exit"
            )

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Under mode `skip` each prompt and response with void blocks left out, and with random ones; and gated responses."""
        counts = {"masked forwards": 2 * len(self.alpha) * len(prompts)} if self.mode == "skip" else {}
        if self._gated:
            distinct = len({prompt.tokens for prompt in prompts})
            counts["tokens written under the rule"] = len(self.alpha) * distinct * self.max_new_tokens
        return Interventions(counts, exact=not self._gated)

    def needs(self, model: Model) -> list[Need]:
        """Norms of the stream for the rule; rows where the step or the read-out needs them."""
        if self.delta in ("norm_of_diff", "cosine"):
            return [Need(("resid_pre.0", "resid_post.*"))]
        if self.mode == "skip":
            return [Need(f"resid_post.{model.shape.n_layers - 1}", self._row_reducer)]
        needs = [Need(("resid_pre.0", "resid_post.*"), NORM)]
        if self.mode == "early_exit":
            needs.append(Need(("resid_pre.0", "resid_post.*"), self._row_reducer))
        return needs

    @property
    def _responds(self) -> bool:
        return self.max_new_tokens > 0 and "response" in self.phases

    @property
    def _gated(self) -> bool:
        """Whether the model with its gates writes the responses."""
        return self._responds and self.response_from == "gated_model" and self.mode != "measure"

    @property
    def _row_reducer(self) -> Reducer:
        steps_need_rows = self.delta in ("norm_of_diff", "cosine")
        return ROWS if steps_need_rows or self._responds or self.readout_positions == "all" else LAST

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Tables `activity`, `usage`, `void_rate`, and with a mode other than `measure` `readout` and `controls`.

        Prompts may carry `choices` (texts) and `answer` (one of them); then `accuracy` is a table too.
        """
        lines = as_prompts(prompts, model, self.prompt_fields, chat=self.chat)
        items, new = self._items(model, lines, store, progress)
        sequences, lengths = [item.sequence for item in items], [item.prompt_length for item in items]
        activations = capture(model, sequences, self.needs(model), store, prompt_lengths=lengths, progress=progress)
        masked: Masked | None = None
        if self.mode == "skip":
            masked = run_masked(model, items, {alpha: self._gate(alpha) for alpha in self.alpha}, self.seed)
        trace = masked.trace if masked else self._trace(activations, items)
        frame = token_frame(model, lines, items)
        kept = frame["phase"].isin(self.phases).to_numpy()
        tables = {
            "activity": voids_tables.activity(frame[kept], trace.of(kept)),
            "usage": voids_tables.usage(frame, trace, self.phases, self.first_token, self.seed),
            "void_rate": voids_tables.void_rate(frame[kept], trace.of(kept), self.seed),
        }
        if self.mode != "measure":
            hidden = masked.last if masked else {}
            reader = Reader(model, activations, items, frame, trace, self._row_reducer, hidden, self.seed)
            tables |= self._read(reader, lines)
        counts = {"responses_written": len(new)}
        done = (masked.forwards if masked else 0) + (sum(map(len, new)) if self._gated else 0)
        return Measured(lines, tables, activations, self._notes(model), counts, done)

    def _read(self, reader: Reader, prompts: Sequence[Prompt]) -> dict[str, pd.DataFrame]:
        tokens, model = self._scored(reader), reader.model
        frame, variants = reader.frame.iloc[tokens], reader.variants(tokens)
        used = reader.trace.active.float().mean(dim=0).numpy()[tokens]
        ends = reader.prompt_ends()
        rows = {}
        for item, whole, part in zip(reader.items, reader.full(ends), reader.read(ends), strict=True):
            rows[item.alpha, item.prompt, "full"] = whole
            rows[item.alpha, item.prompt, RELEASED_NAMES[self.mode]] = part
        responses = [(item.alpha, item.prompt, item.sequence[item.prompt_length :]) for item in reader.items]
        return {
            "readout": voids_tables.exits_table(frame, reader.exits(tokens), variants["voids"], model),
            "controls": voids_tables.controls(frame, used, variants, self.seed),
            **score_choices(model, prompts, rows, responses if self._responds else None, RELEASED_NAMES[self.mode]),
        }

    def _scored(self, reader: Reader) -> Tokens:
        """Every response token, and the last or all prompt tokens."""
        prompt = (reader.frame["phase"] == "prompt").to_numpy()
        scored = np.zeros(len(prompt), dtype=bool)
        if self.readout_positions == "all":
            scored |= prompt
        scored[reader.prompt_ends()] = True
        return np.flatnonzero(scored & ("prompt" in self.phases) | ~prompt)

    def _items(
        self, model: Model, prompts: Sequence[Prompt], store: ActivationStore, progress: Progress
    ) -> tuple[list[Item], list[tuple[int, ...]]]:
        """(every prompt with its response at every alpha, the responses that were written now)."""
        sequences = [prompt.tokens for prompt in prompts]
        decoding = Decoding(self.max_new_tokens, self.temperature, self.top_p, self.seed)
        items: list[Item] = []
        written: list[tuple[int, ...]] = []
        for alpha in self.alpha:
            responses: list[tuple[int, ...]] = [()] * len(sequences)
            if self._responds:
                edits: list[Edit] = [self._gate(alpha)] if self._gated else []
                responses, new = respond(model, sequences, decoding, store, edits=edits, progress=progress)
                written += new
            items += [
                Item(alpha, i, (*sequence, *response), len(sequence))
                for i, (sequence, response) in enumerate(zip(sequences, responses, strict=True))
            ]
        return items, written

    def _gate(self, alpha: float) -> NormGate:
        mode: Literal["skip", "early_exit"] = "skip" if self.mode == "skip" else "early_exit"
        return NormGate(alpha, mode, self.delta, self.first_layers)

    def _trace(self, activations: Activations, items: Sequence[Item]) -> Trace:
        layers = [Address("resid_pre", 0), *(Address("resid_post", i) for i in range(activations.model.shape.n_layers))]
        if self.delta in ("norm_of_diff", "cosine"):
            before, norms, steps = activations.packed(layers[0]), [], []
            for address in layers[1:]:
                after = activations.packed(address)
                norms.append(after.float().norm(dim=-1))
                steps.append(step_size(before, after, self.delta))
                before = after
            stacked, sizes = torch.stack(norms), torch.stack(steps)
        else:
            dtype = getattr(torch, self.norm_dtype)
            stream = torch.stack([activations.packed(address, NORM) for address in layers]).to(dtype)
            sizes = stream[1:] - stream[:-1]
            sizes = (sizes / stream[:-1] if self.delta == "rel_norm_diff" else sizes).float()
            stacked = stream[1:].float()
        alpha = torch.cat([torch.full((len(item.sequence),), item.alpha) for item in items])
        threshold0 = batch_threshold(sizes[0], items) if self.batch_layer0_threshold else None
        active, thresholds = apply_rule(sizes, alpha, self.first_layers, threshold0)
        return Trace(stacked, sizes, thresholds, active)

    def _notes(self, model: Model) -> tuple[str, ...]:
        notes = []
        if self.mode == "early_exit":
            notes.append(
                "Under `early_exit` every block still runs: usage is not a compute saving, only the layer that is read changes."
            )
        if self.response_from == "model" and self._responds:
            notes.append(
                "Responses were written by the plain model; `response_from=gated_model` lets the gated model write them."
            )
        if not model.shape.causal:
            notes.append("This model is not causal: a token's norms depend on the tokens after it.")
        return tuple(notes)
