"""Every planted task by id, built on demand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module

from probes.errors import ModelError, shown
from probes.planted.record import Disguise, Tier
from probes.planted.task import PlantedTask

PREFIX = "planted:"
_FACTS = "probes.planted.families.facts:build"
_VOIDS = "probes.planted.families.void_blocks:build"
_CHANNELS = "probes.planted.families.channels:build"
_PIVOTS = "probes.planted.families.pivots:build"
_NORMS = "probes.planted.families.norm_effects:build"
_LATE = "probes.planted.families.late_correction:build"
_ORDER = "probes.planted.families.order:build"
_NOTHING = "probes.planted.families.nothing_there:build"
_SUBSPACE = "probes.planted.families.shared_subspace:build"
_TRAINED = "probes.planted.trained:build"
_TWO_HOPS = "probes.planted.families.two_hops:build"
_REDUNDANCY = "probes.planted.families.redundancy:build"
_UNUSED = "probes.planted.families.unused:build"
_INDUCTION = "probes.planted.families.induction:build"
_NONLINEAR = "probes.planted.families.nonlinear:build"

TASKS: Mapping[str, str] = {
    "A1": _FACTS, "A2": _FACTS, "A3": _FACTS, "A4": _FACTS, "A5": _FACTS,
    "B1": _TWO_HOPS, "B2": _TWO_HOPS, "C1": _TWO_HOPS, "C2": _TWO_HOPS, "C3": _TWO_HOPS, "C4": _TWO_HOPS,
    "D1": _VOIDS, "D2": _VOIDS, "D3": _VOIDS, "D4": _VOIDS, "D5": _VOIDS, "D6": _VOIDS,
    "E1": _CHANNELS, "E2": _CHANNELS, "E3": _CHANNELS, "E4": _CHANNELS,
    "F1": _PIVOTS, "F2": _PIVOTS, "F3": _PIVOTS, "F4": _PIVOTS,
    "G1": _REDUNDANCY, "G2": _REDUNDANCY, "G3": _REDUNDANCY, "G4": _REDUNDANCY,
    "H1": _UNUSED, "H2": _UNUSED, "H3": _UNUSED, "H4": _UNUSED,
    "I1": _NONLINEAR, "I2": _NONLINEAR, "I3": _NONLINEAR,
    "J1": _NORMS, "J2": _NORMS,
    "K1": _INDUCTION, "K2": _INDUCTION, "K3": _INDUCTION,
    "L1": _LATE, "L2": _LATE, "M1": _ORDER, "M2": _ORDER, "N1": _NOTHING, "N2": _NOTHING, "O1": _SUBSPACE,
    **{f"T{number}": _TRAINED for number in range(1, 9)},
}  # fmt: skip
"""Id to the dotted path of `build(id, seed)`."""
SHARP = ("A1", "A2", "A3", "A4", "A5")
"""Tasks that exist as `A2-sharp` too: the same with attention that is saturated. They stand outside the tiers."""
NOISED: tuple[str, ...] = ("A2", "C2", "D1", "E1", "F1", "H1", "I1", "K2")
"""Tasks that exist as `A2-rotated`, `A2-noised` and `A2-superposed` too."""
DISGUISES: tuple[Disguise, ...] = ("rotated", "noised", "superposed")


def tasks(tier: Tier | None = None) -> tuple[str, ...]:
    """Return the ids of a tier, or of all tiers."""
    by_tier = {
        "compiled": tuple(name for name in TASKS if not name.startswith("T")),
        "noised": tuple(f"{name}-{disguise}" for name in NOISED for disguise in DISGUISES),
        "trained": tuple(name for name in TASKS if name.startswith("T")),
    }
    return by_tier[tier] if tier else tuple(name for names in by_tier.values() for name in names)


def task(name: str, seed: int = 0) -> PlantedTask:
    """Return a task with its certificate, which is computed once for each model and kept in the cache folder.

    Raises:
        ModelError: no task of this id, or exhaustive intervention does not give the truth that was built in.
    """
    from probes.planted.certify.certificate import certified

    return certified(build(name, seed))


def build(name: str, seed: int = 0) -> PlantedTask:
    """Return a task without its certificate.

    Raises:
        ModelError: no task of this id, with the legal ones, or a negative seed.
    """
    check(name, seed)
    base, _, variant = name.partition("-")
    if variant in DISGUISES:
        from probes.planted.noise import disguise

        return disguise(build(base, seed), next(kind for kind in DISGUISES if kind == variant))
    return _builder(base)(name, seed)


def parse(ref: str) -> tuple[str, int]:
    """Return the id and the seed of `planted:A2@0`; without a seed it is 0.

    Raises:
        ModelError: another form, or an unknown id.
    """
    match = re.fullmatch(rf"{PREFIX}([A-Za-z0-9-]+)(?:@(\d+))?", ref)
    if not match:
        raise ModelError(f"{shown(ref)} is no planted model; write {PREFIX}ID@SEED, such as {PREFIX}A2@0; {_legal()}")
    name, seed = match[1], int(match[2] or 0)
    check(name, seed)
    return name, seed


def check(name: str, seed: int) -> None:
    """Refuse an id that no task has.

    Raises:
        ModelError: with the legal ids.
    """
    legal = (*tasks(), *(f"{base}-sharp" for base in SHARP))
    if name not in legal:
        close = get_close_matches(name, legal, n=1)
        near = f" Did you mean {close[0]!r}?" if close else ""
        raise ModelError(f"no planted task {shown(name)}.{near} {_legal()}")
    if seed < 0:
        raise ModelError(f"the seed of a planted task is {seed}; legal are whole numbers from 0")


def _legal() -> str:
    variants = f"; {', '.join(NOISED)} also with {', '.join(f'-{name}' for name in DISGUISES)}" if NOISED else ""
    return f"Legal ids: {', '.join(TASKS)}{variants}; {', '.join(SHARP)} also with -sharp"


def _builder(base: str) -> Callable[[str, int], PlantedTask]:
    module, _, function = TASKS[base].partition(":")
    return getattr(import_module(module), function)
