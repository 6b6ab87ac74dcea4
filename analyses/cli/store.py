"""`bathyscope store`: what is held, and keeping it sound."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from analyses.cli.console import say
from analyses.cli.run import StoreDir
from probes.errors import OptionError
from probes.preflight import human
from probes.store import ActivationStore

group = typer.Typer(help="The activation store.", no_args_is_help=True)


@group.command("ls")
def ls(store: StoreDir = None) -> None:
    """What is held, one line per model and setting."""
    held = ActivationStore(store)
    table = held.ls()
    say(f"{held.root}: {human(held.bytes_held())}")
    if len(table):
        say(table.to_string(index=False))


@group.command("verify")
def verify(store: StoreDir = None) -> None:
    """Check every shard; damaged ones are set aside and will be captured again."""
    report = ActivationStore(store).verify()
    for name in report.damaged:
        say(f"damaged, set aside: {name}")
    say(f"checked {report.checked:,} shards ({human(report.bytes)}), {len(report.damaged)} damaged")


@group.command("rebuild")
def rebuild(store: StoreDir = None) -> None:
    """Make the catalogue anew from the shards alone."""
    say(f"catalogue rebuilt from {ActivationStore(store).rebuild():,} shards")


@group.command("gc")
def gc(
    store: StoreDir = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Evict least recently used shards down to this size, such as 20GB.")
    ] = None,
) -> None:
    """Remove leftovers, and least recently used shards above a size."""
    held = ActivationStore(store)
    before = held.bytes_held()
    report = held.gc(None if max_bytes is None else parse_size(max_bytes))
    say(f"{report}".replace("GcReport", "removed"))
    say(f"{human(before)} before, {human(held.bytes_held())} now")


@group.command("export")
def export(
    dest: Annotated[Path, typer.Argument(help="Folder to write to.")],
    store: StoreDir = None,
    format: Annotated[
        Literal["safetensors", "npz", "parquet"], typer.Option(help="What other tool will read it.")
    ] = "safetensors",
    features: Annotated[str, typer.Option(help="Which features, as a glob such as resid_post.*/rows*.")] = "*",
) -> None:
    """Write rows as plain files for other tools."""
    for path in ActivationStore(store).export(dest, format=format, features=features):
        say(str(path))


def parse_size(text: str) -> int:
    """Bytes of a size such as 20GB, 512MiB or 1000000.

    Raises:
        OptionError: not a size.
    """
    units = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "tb": 10**12,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
        "tib": 2**40,
    }
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in units:
        raise OptionError(f"size {text!r}: write a number with a unit such as 20GB or 512MiB")
    return int(float(match[1]) * units[match[2]])
