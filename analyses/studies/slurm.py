"""A SLURM array script from the same plan: one task per unit, then the report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from analyses.studies.scheduling import Unit
from probes.html_card import count, size

HEADROOM = 3
"""Memory asked for, in sizes of the weights on disk, beside a constant for the libraries."""
LIBRARIES = 4 * 2**30


def script(units: Sequence[Unit], study: Path, out: Path, store: Path | None, processors: int) -> str:
    """Return the script as text, for `sbatch`; every path must lie on a file system that all nodes share.

    Args:
        processors: asked for per task.
    """
    command = ["bathyscope", "batch", str(study.resolve()), "--out", str(out.resolve())]
    command += ["--store", str(store.resolve())] if store else []
    largest = max(unit.model_bytes for unit in units)
    memory = (HEADROOM * largest + LIBRARIES) // 2**20
    cuda = any(unit.model.spec.device.startswith("cuda") for unit in units)
    listed = [f"#   {number}: {unit.label}, {count(len(unit.cells), 'cell')}" for number, unit in enumerate(units)]
    lines = [
        "#!/usr/bin/env bash",
        f"# {len(units)} tasks, one for each model and prompt set; the largest model has {size(largest)} of weights:",
        *listed,
        "# Submit with  sbatch THIS  and, for tables and report once all have ended:",
        f"#   sbatch --dependency=afterany:JOB --wrap {shlex.quote(shlex.join(command))}",
        f"#SBATCH --job-name={shlex.quote('bathyscope-' + study.stem)}",
        f"#SBATCH --array=0-{len(units) - 1}",
        f"#SBATCH --cpus-per-task={processors}",
        f"#SBATCH --mem={memory}M",
        *(["#SBATCH --gres=gpu:1"] if cuda else ["# On GPU nodes add: #SBATCH --gres=gpu:1"]),
        "set -euo pipefail",
        f'{shlex.join(command)} --unit "$SLURM_ARRAY_TASK_ID"',
    ]
    return "\n".join(lines)
