"""`bathyscope batch`: every cell of a study, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from analyses.cli.console import ConsoleProgress, say
from analyses.cli.imports import importing
from analyses.cli.store_flag import StoreDir
from probes.cache_folder import expanded
from probes.errors import OptionError
from probes.html_card import count
from probes.store import ActivationStore, default_root

if TYPE_CHECKING:
    from analyses.studies.cells import Cell
    from analyses.studies.definition import Study
    from analyses.studies.study_run import Engine, StudyRun

CELLS_FAILED = 3
"""Exit code of a study of which some cells failed; the others are done."""


def batch(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study.")],
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Worker processes here, or a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="ray: the cluster's address; a new one here by default.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="local: worker processes, one per CUDA device by default, else one; 0 uses none."),
    ] = None,
    store: StoreDir = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the study; default runs/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what every cell would cost, and stop.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print a SLURM array script of the study, and stop.")] = False,
    unit: Annotated[
        int | None, typer.Option(min=0, help="Run one unit of the study only, as a task of the SLURM script does.")
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(help="Also write ANALYSIS.TABLE of all cells as one CSV and one LaTeX table; repeatable."),
    ] = None,
) -> None:
    """Run the cells of a study that have no result yet; then its index, tables and report."""
    with importing():
        from analyses.studies.study_file import read_study
    read = read_study(study)
    with importing():
        import pandas as pd

        from analyses.studies.cells import expand
        from analyses.studies.export import export_table
        from analyses.studies.local_engine import processors
        from analyses.studies.scheduling import units
        from analyses.studies.slurm import script
        from analyses.studies.study_run import run_study
    folder = out or Path("runs") / read.name
    if dry_run or slurm or unit is not None:
        cells = expand(read)
        if unit is not None and unit >= len(units(cells)):
            raise OptionError(f"--unit {unit}: this study has the units 0 to {len(units(cells)) - 1}")
        if dry_run:
            _print_costs(cells, folder, store)
            return
        if slurm:
            say(script(units(cells), study, folder, store, processors()))
            return
    progress = ConsoleProgress()
    try:
        run = run_study(read, folder, _engine(engine, store, workers, address), unit=unit, progress=progress)
    finally:
        progress.stop()
    _tell(read, run, unit)
    for name in export or ():
        for path in export_table(folder, pd.read_parquet(run.folder.index), name):
            say(f"table: {path}")
    if run.failed:
        raise typer.Exit(CELLS_FAILED)


def _engine(engine: str, store: Path | None, workers: int | None, address: str | None) -> Engine:
    root = expanded(store or default_root()).absolute()
    if engine == "ray":
        from analyses.studies.ray_engine import run_ray

        return lambda work, folder: run_ray(work, folder, root, address)
    from analyses.studies.local_engine import run_local

    return lambda work, folder: run_local(work, folder, root, workers)


def _print_costs(cells: Sequence[Cell], out: Path, store: Path | None) -> None:
    from analyses.studies.dry_run import costs, table
    from analyses.studies.scheduling import units
    from analyses.studies.study_folder import StudyFolder

    folder = StudyFolder(out)
    folder.check()
    missing = [cell for cell in cells if not folder.done(cell.name)]
    say(*table(list(costs(units(missing), ActivationStore(store))), len(cells) - len(missing)))


def _tell(study: Study, run: StudyRun, unit: int | None) -> None:
    if not (run.ran or run.failed or run.elsewhere):
        say(f"study {study.name}: {count(run.cells, 'cell')}, all done; nothing to run")
    else:
        counts = [f"{count(len(run.ran), 'cell')} run", count(run.forwards, "forward pass")]
        counts += [f"{len(run.failed):,} failed"] if run.failed else []
        counts += [f"{len(run.elsewhere):,} left to another process that is running them"] if run.elsewhere else []
        say(f"study {study.name}: {', '.join(counts)}")
    if unit is None:
        say(f"report: {run.folder.report}")
