"""Every planted task by id, built on demand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module

from probes.errors import ModelError, shown
from probes.planted.record import Disguise, Tier
from probes.planted.task import PlantedTask

PREFIX = "planted:"
_FAMILIES = {
    "facts": "A1 A2 A3 A4 A5", "two_hops": "B1 B2 C1 C2 C3 C4", "void_blocks": "D1 D2 D3 D4 D5 D6", "channels": "E1 E2 E3 E4",
    "pivots": "F1 F2 F3 F4", "redundancy": "G1 G2 G3 G4", "unused": "H1 H2 H3 H4", "nonlinear": "I1 I2 I3",
    "norm_effects": "J1 J2", "induction": "K1 K2 K3", "late_correction": "L1 L2", "order": "M1 M2", "nothing_there": "N1 N2",
    "shared_subspace": "O1",
}  # fmt: skip
TASKS: Mapping[str, str] = {
    **{task: f"probes.planted.families.{family}" for family, ids in _FAMILIES.items() for task in ids.split()},
    **{f"T{number}": "probes.planted.trained" for number in range(1, 9)},
}
"""Id to the module of `build(id, seed)`."""
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
    built: PlantedTask = import_module(TASKS[base]).build(name, seed)
    return built


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
