"""Everything that is measured on one model without training, and the tables it makes."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analyses.interventions import swept
from analyses.norm_removal.attribution import attribution_tables
from analyses.norm_removal.freezing import FirstScale, FreezeEffects, Source, mean_scales, sweep
from analyses.norm_removal.measured import Measured, has
from analyses.norm_removal.neurons import Ablations, candidates, rank
from analyses.norm_removal.scale_tables import scale_table, sink_table, stream_table
from analyses.options import option
from probes.capture.activations import Activations
from probes.errors import PointError
from probes.norms import NormSite, Scale
from probes.progress import Progress

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Settings:
    """The options of `NormRemoval` that the diagnostics follow; it has them among its own."""

    scale_source: Source = option("mean", "What a frozen norm divides by: its mean scale, or one for each position.")
    first_scale: FirstScale = option("own", "Whether position 0, whose norm is often massive, has a mean of its own.")
    split_paths: bool = option(True, "Also freeze the queries' and keys' use of a norm apart from the values'.")
    neurons: int = option(8, "Confidence neurons ablated, beside as many random ones; 0 leaves them out.", low=0)
    sinks: bool = option(True, "Measure attention sinks, which captures attention patterns.")
    layers: tuple[int, ...] = option(
        (), "Layers whose norms are frozen by themselves and whose heads are read; none: every stride-th.", low=0
    )
    stride: int = option(1, "Every how many layers one is swept, where layers names none.", low=1)
    first_token: bool = option(False, "Whether a prompt's first token counts in statistics of losses and attribution.")
    seed: int = option(0, "Seed of the training order, random neurons and intervals.")

    def swept(self, n_layers: int) -> list[int]:
        """Return the layers whose norms are frozen by themselves and whose heads are read."""
        return swept(n_layers, self.layers, self.stride)


def diagnose(
    activations: Activations, variant: str, settings: Settings, progress: Progress
) -> tuple[Tables, list[str], int]:
    """Return (all diagnostic tables of a model called `variant`, notes for the reader, sequences restarted under a frozen norm)."""
    measured = Measured(activations, settings.first_token)
    notes: list[str] = []
    tables: Tables = {}
    layers, forwards = settings.swept(measured.n_layers), 0
    if measured.switches is not None:
        frozen, forwards = _frozen(measured, variant, settings, progress, notes)
        tables |= frozen
    tables["stream"] = stream_table(measured, settings.seed)
    if settings.sinks and has(measured.model, "pattern"):
        tables["sinks"] = sink_table(measured, layers, settings.seed)
    if has(measured.model, "z"):
        tables["attribution_error"], tables["attribution_total"] = attribution_tables(measured, layers, settings.seed)
    else:
        notes.append(f"{variant}: no attribution error, because {measured.model.ref} has no point z")
    if settings.neurons:
        try:
            tables["neurons"] = _neurons(measured, settings, progress)
        except PointError as error:
            notes.append(f"{variant}: no neuron ablation: {error}")
    return {name: table.assign(variant=variant) for name, table in tables.items()}, notes, forwards


def _frozen(
    measured: Measured, variant: str, settings: Settings, progress: Progress, notes: list[str]
) -> tuple[Tables, int]:
    assert measured.switches is not None
    site_scales = measured.scales(measured.switches.sites)
    scales: dict[NormSite, Scale] = mean_scales(site_scales, settings.scale_source, settings.first_scale)
    frozen = sweep(measured.switches, settings.split_paths, settings.swept(measured.n_layers))
    effects = FreezeEffects(measured, frozen, scales)
    effects.measure(progress)
    alone, joint = effects.tables(settings.seed)
    most = f"by at most {effects.control:.1g} nat" if effects.control else "of no token"
    notes.append(
        f"{variant}: freezing every norm at each row's own scale, the control, changes the loss {most}; "
        f"the loss without freezing is {float(effects.clean.mean()[0]):.4f} nat"
    )
    for table in (alone, joint.assign(layer=-1)):
        lost = table[table["diverged"] > 0]
        for site, layer, share in zip(lost["site"], lost["layer"].astype(int), lost["diverged"], strict=True):
            where = "" if layer < 0 else f" of layer {layer}"
            notes.append(
                f"{variant}: freezing {site}{where} leaves {share:.0%} of tokens without a finite loss (float32 overflows), "
                "so its change of loss is infinite"
            )
    tables = {
        "scales": scale_table(measured, site_scales, settings.seed),
        "freeze_effect": alone,
        "freeze_together": joint,
    }
    return tables, effects.forwards


def _neurons(measured: Measured, settings: Settings, progress: Progress) -> pd.DataFrame:
    if not has(measured.model, f"mlp_post.{measured.n_layers - 1}".partition(".")[0]):
        raise PointError(f"{measured.model.ref} has no point mlp_post")
    ranking = rank(measured)
    ablations = Ablations(measured, ranking, candidates(ranking, settings.neurons, settings.seed))
    ablations.measure(progress)
    return ablations.table(settings.seed)
