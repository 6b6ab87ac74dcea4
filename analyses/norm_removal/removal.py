"""Removal from start to end: trainings, exact norm-free models, the exported folder, and the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from analyses.norm_removal.evaluation import divergence_table, loss_table, predict, training_table
from analyses.norm_removal.schedule import Schedule, get_schedule
from analyses.norm_removal.text import Blocks, make_blocks
from analyses.norm_removal.training import Setting, Trained, copy_of, train
from analyses.options import option
from probes.anatomy import Anatomy
from probes.blocks.rerouting import module_of
from probes.errors import OptionError, TrainingError
from probes.models.backends.native import NativeModel
from probes.models.protocol import Model
from probes.models.silence_loggers import silence_loggers
from probes.models.sources.digest import weights_digest
from probes.norms import Scale, Switches, absorb, make_constant, make_large_eps
from probes.progress import Progress

EXPORT_TOLERANCE = 1e-5
"""How far the exported folder's logits may be from the folded model's, relative to a row's largest."""


TRAINED, COMPARED = "training sequences", "comparisons"
VARIANTS = ("control", "norm_free")
"""Trained models that are diagnosed beside the original."""


@dataclass(frozen=True)
class Plan(Setting):
    """The options of `NormRemoval` that say what is trained; it has them among its own."""

    schedule: str = option(
        "", "Removes the norms: proportional, at_once, small, medium, large, xl, small_2024 or FILE.toml."
    )
    text: str = option(
        "", "What to train on: a file, a folder, or a data set of the hub as owner/name[:split].", flag="train-on"
    )
    steps: int = option(0, "Training steps; 0 takes the schedule's own.", low=0)
    block: int = option(256, "Tokens of a training sequence.", low=2)
    learning_rate: float = option(0.0, "Highest learning rate; 0 takes the schedule's own.", low=0)
    aux_weight: float = option(-1.0, "Weight of the loss on the final norm's input scale; negative is the schedule's.")
    at_once: bool = option(False, "Also train with all norms frozen at the first step of the schedule.")
    eval_blocks: int = option(
        256, "Held-out blocks on which the models are compared, at most.", low=1, aliases=("evaluated",)
    )
    export: str = option("", "Folder for the norm-free model, in a form that plain transformers loads.")


@dataclass(frozen=True, eq=False)
class Removal:
    """The models, tables and notes of a removal."""

    models: Mapping[str, Model]
    """The control and the norm-free model, by variant."""
    tables: Mapping[str, pd.DataFrame]
    notes: tuple[str, ...]
    forwards: Mapping[str, int]
    """Sequences trained on, and read to compare the models, by what is done."""


def planned(plan: Plan, switches: Switches) -> Schedule:
    """Return the schedule, with what the options set in place of its own.

    Raises:
        OptionError: an unknown schedule, or one that names a missing site or leaves one out.
    """
    schedule = get_schedule(plan.schedule, switches.sites, plan.steps)
    if plan.learning_rate > 0:
        least = plan.learning_rate * schedule.min_learning_rate / max(schedule.learning_rate, 1e-30)
        schedule = replace(schedule, learning_rate=plan.learning_rate, min_learning_rate=least)
    if plan.aux_weight >= 0:
        schedule = replace(schedule, aux_weight=plan.aux_weight)
    frozen = {site for event in schedule.events(switches.sites) for site in event.sites}
    if left := [site for site in switches.sites if site not in frozen]:
        raise OptionError(
            f"schedule {schedule.name!r} leaves {len(left)} sites with their norms, first {left[0]}; a norm-free model needs all"
        )
    return schedule


def remove(model: Model, plan: Plan, progress: Progress) -> Removal:
    """Train the removal and its control, make the norm-free model exact, export it and compare all of them.

    Raises:
        OptionError, PromptError, TrainingError: see `planned`, `make_blocks` and `train`.
    """
    with module_of(model) as (_, anatomy):
        if plan.block > model.shape.n_ctx:
            raise OptionError(
                f"option block is {plan.block}, but the context window of {model.ref} is {model.shape.n_ctx}"
            )
        schedule = planned(plan, Switches(anatomy))
        enough = (schedule.steps * plan.batch + plan.eval_blocks) * plan.block * 10 // 9 + plan.block
        blocks = make_blocks(plan.text, model.tokenizer, plan.block, enough)
        runs = {"norm_free": train(anatomy, blocks, schedule, plan, progress)}
        runs["control"] = train(anatomy, blocks, schedule.control, plan, progress)
        if plan.at_once:
            runs["at_once"] = train(anatomy, blocks, schedule.at_once, plan, progress)
        return _finish(model, anatomy, blocks, runs, plan)


def _finish(model: Model, anatomy: Anatomy, blocks: Blocks, runs: Mapping[str, Trained], plan: Plan) -> Removal:
    held_out = blocks.held_out[: plan.eval_blocks]
    anatomies = {"original": anatomy} | {name: _constant(run) for name, run in runs.items()}
    untrained = frozen_at_once(runs["control"].anatomy, blocks, plan.batch)
    modules = {name: a.map.module for name, a in anatomies.items()} | {"untrained": untrained.map.module}
    predictions, divergences = predict(modules, held_out)
    folded = copy_of(anatomies["norm_free"])
    notes, tables = (
        [],
        {
            "training": training_table({name: run.history for name, run in runs.items()}),
            "losses": loss_table(predictions, "control", plan.seed),
            "divergence": divergence_table(divergences, plan.seed),
        },
    )
    notes.append(
        "untrained is the control with all norms frozen at once at their measured scales and no training after; losses are on "
        f"{len(held_out)} blocks that no training saw"
    )
    if plan.export:
        tables["export"], note = _export(runs["norm_free"], folded, held_out[:4], plan.export, model)
        notes.append(note)
    models = {name: _loaded(anatomies[name], model, name) for name in VARIANTS}
    trained = sum(run.sequences for run in runs.values())
    return Removal(models, tables, tuple(notes), {TRAINED: trained, COMPARED: len(held_out) * len(modules)})


def most_forwards(model: Model, plan: Plan) -> dict[str, int]:
    """Count the sequences that a removal trains on and compares at most: fewer where it goes on from a checkpoint or text is short.

    Raises:
        OptionError: a schedule that does not fit the model.
    """
    with module_of(model) as (_, anatomy):
        steps = planned(plan, Switches(anatomy)).steps
    runs = 2 + plan.at_once
    # The models compared are those trained, the original, and the control with all norms frozen at once.
    return {TRAINED: runs * steps * plan.batch, COMPARED: plan.eval_blocks * (runs + 2)}


def _constant(run: Trained) -> Anatomy:
    """Return the anatomy of a copy in which frozen norms are linear maps; the control's norms stay."""
    anatomy = copy_of(run.anatomy)
    if run.switches.on:
        make_constant(anatomy, run.switches.on)
    return anatomy


@torch.no_grad()
def frozen_at_once(anatomy: Anatomy, blocks: Blocks, batch: int) -> Anatomy:
    """Return a copy of a model whose norms are linear maps at their mean scale over `batch` training blocks, untrained."""
    frozen = copy_of(anatomy)
    switches = Switches(frozen, blocks.end_of_text)
    sums: dict[str, list[Tensor]] = {norm.path: [] for norm in switches.norms}
    switches.watches.update({path: lambda n, _, scale: sums[n.path].append(scale.mean()) for path in sums})
    device = next(frozen.map.module.parameters()).device
    with switches.attached():
        for rows in torch.split(blocks.training[:batch], 8):
            frozen.map.module(input_ids=rows.to(device), use_cache=False)
    for norm in switches.norms:
        switches.freeze(norm.sites, Scale(float(torch.stack(sums[norm.path]).mean())))
    make_constant(frozen, switches.on)
    return frozen


def _loaded(anatomy: Anatomy, model: Model, variant: str) -> Model:
    module: nn.Module = anatomy.map.module.eval()
    return NativeModel(module, model.tokenizer, ref=f"{model.ref} ({variant})", weights=weights_digest(module))


def _export(run: Trained, folded: Anatomy, rows: Tensor, folder: str, model: Model) -> tuple[pd.DataFrame, str]:
    """Export the model, and measure how far the folder's logits and those of the fully folded model are from each other."""
    exported = copy_of(run.anatomy)
    make_large_eps(exported, run.switches.on)
    module: Any = exported.map.module
    with silence_loggers():
        module.to(torch.float32).save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    try:
        absorb(folded)
        how = "folded into the next linear maps"
    except Exception as error:
        how = f"linear maps in the norms' places ({error})"
    difference = largest_difference(Path(folder), folded.map.module.eval(), rows)
    if not difference <= EXPORT_TOLERANCE:
        raise TrainingError(
            f"the model exported to {folder} differs from the folded one by {difference:.1e} of a row's largest logit, more than "
            f"{EXPORT_TOLERANCE:.0e}: its stream is too large for the large-epsilon form; do not use the folder"
        )
    table = pd.DataFrame([{"folder": folder, "difference": difference, "rows": rows.numel(), "folded": how}])
    return table, (
        f"exported to {folder}: plain transformers gives the folded model's logits to {difference:.1e} of a row's largest; "
        "load it in float32 or bfloat16, since its gains overflow float16"
    )


@torch.no_grad()
def largest_difference(folder: Path, folded: nn.Module, tokens: Tensor) -> float:
    """Compare the logits of what plain transformers loads from `folder` with another model's on tokens [batch, pos].

    Returns:
        The largest deviation in a row of logits, relative to the row's largest.
    """
    from transformers import AutoModelForCausalLM

    with silence_loggers():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    device = next(folded.parameters()).device
    exported = loaded(input_ids=tokens.cpu(), use_cache=False).logits.float()
    expected = folded(input_ids=tokens.to(device), use_cache=False).logits.float().cpu()
    return float(((exported - expected).abs().amax(-1) / expected.abs().amax(-1)).max())
