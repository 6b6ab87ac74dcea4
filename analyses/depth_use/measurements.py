"""Run every measurement on the blocks, chunk by chunk, and make the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import get_args

import numpy as np
import pandas as pd
import torch

from analyses.depth_use.ablations import ChunkAblations
from analyses.depth_use.bits_frontier import frontier
from analyses.depth_use.contributions import PARTS, Contributions
from analyses.depth_use.effective_depth import effective_depth_note, effective_depths
from analyses.depth_use.forwards import measured, per_token, removed, skipped
from analyses.depth_use.generation import Generation, Tokens, steps
from analyses.depth_use.generation_tables import PROXIES, written_tables
from analyses.depth_use.greedy import (
    REMEASURED,
    SUBLAYERS,
    SimilarityAgain,
    drop_blocks,
    drop_table,
    greedy_removal,
    orders,
)
from analyses.depth_use.outputs import Outputs
from analyses.depth_use.proxies import agreement_table, proxy_tables
from analyses.depth_use.settings import Settings
from analyses.depth_use.skips import (
    Effects,
    Variant,
    depth_scores,
    effect_table,
    future_effects,
    left_out_at,
    local_effects,
    output_table,
    split,
)
from analyses.depth_use.tokens import StreamMeans, erasure, integrated_gradients
from analyses.depth_use.weights import NormScales, z_share_of
from analyses.depth_use.windows import window_columns, windows_table
from analyses.results.per_prompt import PerPrompt, interval
from probes.blocks.batch import Blocks, Chunk, Part, on_blocks
from probes.blocks.rerouting import block_access, module_of
from probes.capture.activations import Activations
from probes.capture.padded import chunks
from probes.linear.probing import probe_layers
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Prompt
from probes.reducers import Reducer

Tables = dict[str, pd.DataFrame]
LAST = Reducer(positions="last")


def measure_blocks(
    activations: Activations,
    prompts: Sequence[Prompt],
    responses: Sequence[Tokens],
    settings: Settings,
    progress: Progress,
) -> tuple[Tables, list[str], int]:
    """Return all tables but the linear maps, notes for the reader, and how many forwards were run with something changed.

    Args:
        responses: what the plain model writes after the first prompts.
    """
    run = _Run(activations, prompts, settings, progress)
    run.measure()
    tables = run.generation_tables(responses)
    tables |= run.proxy_tables()
    tables["contributions"] = run.contributions.table(settings.seed)
    run.skips()
    tables |= run.skip_tables()
    tables |= run.removal_tables(tables["proxies"])
    tables |= run.token_tables()
    return tables, run.notes, run.forwards


class _Run:
    """One run over all prompts; `measure_blocks` calls its methods in order."""

    def __init__(
        self, activations: Activations, prompts: Sequence[Prompt], settings: Settings, progress: Progress
    ) -> None:
        self.activations, self.model, self.prompts = activations, activations.model, prompts
        self.settings, self.progress = settings, progress
        self.n_layers, n = self.model.shape.n_layers, len(prompts)
        self.layers = settings.swept(self.n_layers)
        names = [f"{name}_{part}" for name in ("relative_norm", "cosine", "similarity") for part in PARTS]
        names += [f"{name}_{part}" for name in ("delta_ce", "jsd") for part in PARTS]
        names += ["lim", "delta_ce_frozen_norm", "lens_kl", "lens_overlap"]
        names += [f"delta_ce_int{n_bits}" for n_bits in settings.bits]
        names += window_columns(settings)
        if settings.generate_prompts:
            answered = any("answer" in prompt.fields for prompt in prompts[: settings.generate_prompts])
            names += [f"{name}_{part}" for name in PROXIES[: 2 + answered] for part in settings.generate_parts]
        self.columns = {name: PerPrompt(n, self.n_layers) for name in names}
        self.effects: dict[tuple[Variant, Part], Effects] = {
            (variant, part): Effects.empty(n, self.n_layers) for variant in get_args(Variant) for part in settings.parts
        }
        with module_of(self.model) as (_, anatomy):
            parallel = anatomy.parallel
            self.scales = NormScales(anatomy)
            blocks = [anatomy.component("block", layer) for layer in range(self.n_layers)]
            self.zd = np.array([z_share_of(block) for block in blocks])
        self.contributions = Contributions(self.n_layers, parallel, settings.first_token)
        self.means = StreamMeans()
        self.loss = PerPrompt(n, 1)
        self.notes: list[str] = []
        self.forwards = 0

    def _tick(self, forwards: int) -> None:
        self.forwards += forwards
        self.progress.advance(forwards)

    def _on(self, chunk: Chunk, work: Callable[[ChunkAblations], None]) -> None:
        counted = chunk.counted(self.settings.first_token)

        def on_these(blocks: Blocks) -> None:
            work(ChunkAblations(blocks, chunk, Outputs(self.model, chunk), counted))

        on_blocks(self.model, chunk.tokens, on_these)

    def _each(self, work: Callable[[ChunkAblations], None]) -> None:
        for chunk in chunks(self.activations, range(len(self.prompts))):
            self._on(chunk, work)

    def measure(self) -> None:
        """Measure what enters the proxies, over all prompts."""
        for chunk in chunks(self.activations, range(len(self.prompts))):
            self.contributions.add(chunk, self.columns)
            self.scales.add(chunk)
            self.means.add(chunk, chunk.counted(self.settings.first_token))
        self.progress.start(sum(measured(self.model, len(self.prompts), self.settings).values()), "changed forward")
        self._each(self._measure)

    def _measure(self, ablations: ChunkAblations) -> None:
        current = {part: self.effects["current", part] for part in self.settings.parts}
        everywhere = self.settings.skip_rule == "everywhere"
        among = ablations.counted[ablations.outputs.where]
        self.loss.add(0, ablations.outputs.prompt[among], ablations.outputs.ce[among])
        at = left_out_at(ablations.chunk, self.settings.skip_rule)
        for layer in self.layers:
            changes = [
                ablations.removals(self.columns, current if everywhere else {}, [layer]),
                ablations.skips({} if everywhere else current, at, [layer]),
                ablations.coarser(self.columns, self.settings.bits, [layer]),
                ablations.frozen(self.columns, self.scales, [layer]),
                ablations.windows(self.columns, self.settings.windows, [layer], self.settings.window_pairs),
            ]
            ablations.run(chain.from_iterable(changes), self._tick)
        ablations.read(self.columns, self.layers)

    def generation_tables(self, responses: Sequence[Tokens]) -> Tables:
        """Return the tables `generation` and `generation_layers`, where there are responses, and enter their proxies."""
        if not responses:
            return {}
        most, before = sum(steps(len(responses), self.settings, self.n_layers).values()), self.forwards
        self.progress.start(most, "step of writing")
        written = Generation(block_access(self.model), self.prompts, responses, self.settings, self._tick).texts()
        self.progress.advance(most - (self.forwards - before))  # texts that ended early
        return written_tables(written, self.model.tokenizer, self.columns, self.settings.seed)

    def skips(self) -> None:
        """Measure future and local skip effects, on the first prompts that are long enough."""
        chosen = self.settings.split_prompts(self.prompts)
        if len(chosen) < min(self.settings.skip_prompts, len(self.prompts)):
            self.notes.append(
                f"future and local skip effects: {len(chosen)} prompts have the 4 tokens that a split needs"
            )
        if not chosen:
            return
        self.progress.start(sum(skipped(self.model, self.prompts, self.settings).values()), "skip")
        for chunk in chunks(self.activations, chosen):
            on_blocks(self.model, chunk.tokens, lambda blocks, c=chunk: self._local(blocks, c))  # type: ignore[misc]
            halves = split(chunk, self.settings.split_positions, self.settings.seed, self.settings.skip_rule)
            assert halves is not None, "every prompt of these has a token to split at"
            outputs = Outputs(self.model, halves.chunk, halves.after)
            for part in self.settings.parts:
                effects = self.effects["future", part]
                future = partial(
                    future_effects,
                    effects,
                    halves=halves,
                    part=part,
                    outputs=outputs,
                    layers=self.layers,
                    tick=self._tick,
                )
                on_blocks(self.model, halves.chunk.tokens, future)

    def _local(self, blocks: Blocks, chunk: Chunk) -> None:
        at, where = left_out_at(chunk, self.settings.skip_rule), chunk.counted(self.settings.first_token)
        for part in self.settings.parts:
            local_effects(self.effects["local", part], blocks, chunk, part, at, where, self.layers, self._tick)

    def proxy_tables(self) -> Tables:
        """Return the tables `proxies`, `proxy_intervals`, `agreement`, `windows`, `effective_depth`, `loss`."""
        measured = {
            name: c for name, c in self.columns.items() if name.rpartition("_")[0] not in ("angular", "euclidean")
        }
        later = PerPrompt(len(self.prompts), self.n_layers)
        effects = self.effects["current", self.settings.parts[0]].mean
        for layer in range(self.n_layers - 1):
            rows = torch.from_numpy(effects[:, layer, layer + 1 :].mean(axis=1))
            later.add(layer, range(len(rows)), rows)
        measured[f"skip_effect_{self.settings.parts[0]}"] = later
        measured |= self._probed()
        tables = proxy_tables(measured, {"zd": self.zd}, self.settings.seed)
        control = {"zd": self.zd, "layer_index": np.arange(self.n_layers, dtype=np.float64)}
        tables["agreement"] = agreement_table(measured, control, self.settings.seed)
        tables["windows"] = windows_table(self.columns, self.settings, self.n_layers)
        tables["effective_depth"] = effective_depths(self.columns, self.settings.seed)
        self.notes.append(effective_depth_note(tables["effective_depth"]))
        mean, low, high = interval(self.loss, self.settings.seed)
        tables["loss"] = pd.DataFrame(
            {"loss": mean, "ci_low": low, "ci_high": high, "tokens": self.loss.counts.sum().item()}
        )
        return tables

    def _probed(self) -> dict[str, PerPrompt]:
        """Return the accuracy of a linear probe for the prompts' labels on each layer's stream at the last token, where there are labels."""
        labelled = [i for i, prompt in enumerate(self.prompts) if "label" in prompt.fields]
        if not labelled:
            return {}
        labels = [int(self.prompts[i].fields["label"]) for i in labelled]
        rows = (
            [self.activations.get(Address("resid_post", n), LAST)[i][0] for i in labelled] for n in range(self.n_layers)
        )
        accuracy = PerPrompt(len(self.prompts), self.n_layers)
        for layer, scored in enumerate(probe_layers((torch.stack(r).float().numpy() for r in rows), labels)):
            accuracy.add(layer, [labelled[int(i)] for i in scored.row], torch.from_numpy(scored.correct))
        return {"probe_accuracy": accuracy}

    def skip_tables(self) -> Tables:
        """Return the tables `skip_effect`, `output_effect`, `depth_score`."""
        seed, measured = self.settings.seed, [(k, e) for k, e in self.effects.items() if not np.isnan(e.mean).all()]
        groups = [str(prompt.fields.get("group", "")) for prompt in self.prompts]
        with_output = [(k, e) for k, e in measured if not np.isnan(e.output).all()]
        tables = {
            "skip_effect": [effect_table(e, *key, seed) for key, e in measured],
            "output_effect": [output_table(e, *key, seed) for key, e in with_output],
            "depth_score": [depth_scores(e, *key, groups, seed) for key, e in measured],
        }
        rule = self.settings.skip_rule
        return {name: pd.concat(frames, ignore_index=True).assign(rule=rule) for name, frames in tables.items()}

    def removal_tables(self, proxies: pd.DataFrame) -> Tables:
        """Return the tables `greedy`, `drop_curve` and `bits_frontier`, as the options say."""
        tables: Tables = {}
        planned = removed(self.model, self.prompts, self.settings)
        if self.settings.drop_blocks:
            order = orders(proxies[proxies["layer"].isin(self.layers)], self.settings.seed)
            n_drop = self.settings.dropped(self.n_layers)
            columns = {name: PerPrompt(len(self.prompts), n_drop) for name in order}
            self.progress.start(planned["removal curves"], "removal")
            self._each(lambda ablations: drop_blocks(ablations, order, columns, self._tick))
            columns[REMEASURED] = self._similarity_again(proxies, n_drop)
            tables["drop_curve"] = drop_table(columns, self.settings.seed)
        if self.settings.frontier_points:
            self.progress.start(planned["widths"], "rounded forward")
            swept = proxies[proxies["layer"].isin(self.layers)]
            tables["bits_frontier"] = frontier(
                self.model, swept, self.settings, len(self.prompts), self._each, self._tick
            )
        if self.settings.greedy_steps:
            self.progress.start(planned["greedy removals"], "greedy removal")
            tables["greedy"] = self._greedy()
        return tables

    def _similarity_again(self, proxies: pd.DataFrame, n_drop: int) -> PerPrompt:
        column = PerPrompt(len(self.prompts), n_drop)
        similarity = dict(zip(proxies["layer"].astype(int), proxies["similarity_block"].astype(float), strict=True))
        order = SimilarityAgain(self.layers, similarity)
        while True:
            self._each(lambda ablations: order.measure(ablations, column, self._tick))
            if len(order.gone) == n_drop:
                return column
            order.drop()

    def _greedy(self) -> pd.DataFrame:
        s = self.settings
        first = s.first(s.greedy_prompts, self.prompts)
        (chunk,) = chunks(self.activations, first, together=True)
        known = None
        if s.greedy_distance == "jsd":
            known = {(part, layer): self._mean_jsd(part, layer, first) for part in SUBLAYERS for layer in self.layers}
        args = (s.greedy_rounds(self.n_layers), s.greedy_distance, self.layers, self._tick, known, s.seed)
        tables: list[pd.DataFrame] = []
        self._on(chunk, lambda ablations: tables.append(greedy_removal(ablations, *args)))
        return tables[0]

    def _mean_jsd(self, part: Part, layer: int, prompts: Sequence[int]) -> float:
        column = self.columns[f"jsd_{part}"]
        return float(column.sums[prompts, layer].sum() / column.counts[prompts, layer].sum())

    def token_tables(self) -> Tables:
        """Return the tables `erasure` and `attribution`, as the options say."""
        s, tables = self.settings, Tables()
        planned = per_token(self.model, self.prompts, s)
        if s.erasure_prompts:
            self.progress.start(planned["erased tokens"], "erased token")
            frames = [
                erasure(self.model, self._alone(i), self.means, self.layers, self._tick)
                for i in s.first(s.erasure_prompts, self.prompts)
            ]
            tables["erasure"] = pd.concat(frames, ignore_index=True)
        if s.gradient_prompts:
            self.progress.start(planned["gradients"], "gradient")
            along = (s.parts, s.gradient_steps, s.gradient_rule, self.layers, self._tick)
            frames = [
                integrated_gradients(self.model, self._alone(i), self.prompts[i], *along)
                for i in s.first(s.gradient_prompts, self.prompts)
            ]
            tables["attribution"] = pd.concat(frames, ignore_index=True)
        return tables

    def _alone(self, index: int) -> Chunk:
        (chunk,) = chunks(self.activations, [index])
        return chunk
