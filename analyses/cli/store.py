"""`bathyscope store`: what is held, and keeping it sound."""

from __future__ import annotations

import re
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from analyses.cli.console import PLAIN, JsonLines, say
from analyses.cli.store_flag import StoreDir
from probes.errors import OptionError
from probes.html_card import aligned, count, size
from probes.input_files import kind_of
from probes.store import ActivationStore

LISTED = ("model", "weights", "run by", "sequences", "features", "shards", "size", "last used (UTC)", "edits")
WIDEST = 40
"""Characters of a context's edits."""
DIGITS = 12
"""Of a digest of weights, which is 32 long."""

group = typer.Typer(help="The activation store.", no_args_is_help=True, **PLAIN)


@group.command("ls")
def ls(
    store: StoreDir = None,
    json: JsonLines = False,
) -> None:
    """What is held, one line per model and setting."""
    activations = ActivationStore(store)
    contexts = activations.contexts()
    if json:
        for context in contexts:
            say(dumps(context, default=str))
        return
    shards = count(sum(context["shards"] for context in contexts), "shard")
    say(f"{activations.root}: {size(activations.bytes_held())} in {shards}")
    say(*(aligned(LISTED, [_listed(context) for context in contexts]) if contexts else ()))


def _listed(row: Mapping[str, Any]) -> tuple[object, ...]:
    settings = " · ".join(str(row[name]) for name in ("backend", "dtype", "attention"))
    edits = "" if row["edits"] in ("", "none") else str(row["edits"])
    if len(edits) > WIDEST:
        edits = edits[: WIDEST - 1] + "…"
    amounts = f"{row['sequences']:,}", f"{row['features']:,}", f"{row['shards']:,}", size(row["bytes"])
    weights = str(row["weights"])
    known = weights if weights.startswith("foreign:") else weights[:DIGITS]
    return row["model"] or "(no name)", known, settings, *amounts, f"{row['last_used']:%Y-%m-%d %H:%M}", edits


@group.command("verify")
def verify(store: StoreDir = None) -> None:
    """Check every shard; damaged ones are set aside and will be captured again."""
    report = ActivationStore(store).verify()
    for name in report.damaged:
        say(f"damaged, set aside: {name}")
    say(f"checked {count(report.checked, 'shard')} ({size(report.bytes)}), {len(report.damaged)} damaged")


@group.command("rebuild")
def rebuild(store: StoreDir = None) -> None:
    """Make the catalogue anew from the shards alone."""
    say(f"catalogue rebuilt from {count(ActivationStore(store).rebuild(), 'shard')}")


@group.command("gc")
def gc(
    store: StoreDir = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Evict least recently used shards down to this size, such as 20GB.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also name every shard that was evicted.")] = False,
) -> None:
    """Remove leftovers, and least recently used shards above a size."""
    activations = ActivationStore(store)
    before = activations.bytes_held()
    report = activations.gc(None if max_bytes is None else parse_size(max_bytes))
    for name in report.evicted if verbose else ():
        say(f"evicted: {name}")
    say(
        f"removed {count(len(report.evicted), 'shard')} least recently used, "
        f"{count(report.quarantined, 'damaged shard')} and {count(report.temporary, 'leftover file')}: "
        f"{size(report.bytes_freed)} freed"
    )
    say(f"{size(before)} before, {size(activations.bytes_held())} now")


@group.command("export")
def export(
    dest: Annotated[Path, typer.Argument(help="Folder to write to.")],
    store: StoreDir = None,
    format: Annotated[
        Literal["safetensors", "npz", "parquet", "datasets"], typer.Option(help="What other tool will read it.")
    ] = "safetensors",
    features: Annotated[str, typer.Option(help="Which features, as a glob such as resid_post.*/rows*.")] = "*",
) -> None:
    """Write rows as plain files for other tools."""
    if kind_of(dest) not in ("folder", "nothing"):
        raise OptionError(f"{str(dest)!r} is a {kind_of(dest)}: give a folder to write to")
    for path in ActivationStore(store).export(dest, format=format, features=features):
        say(str(path))


@group.command("import")
def import_rows(
    tool: Annotated[Literal["vllm", "datasets"], typer.Argument(help="What wrote the rows; SAELens writes datasets.")],
    path: Annotated[Path, typer.Argument(help="A file or folder of vLLM's, or the folder of a data set.")],
    of: Annotated[str, typer.Option("--of", help="The model that was run, as the rows shall be known.")],
    store: StoreDir = None,
    layers: Annotated[
        str | None, typer.Option(help="vllm: the layer ids it was given, in their order, such as 1,2,3.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help='datasets: JSON lines {"tokens": […]}, one a row, where it has no token ids.')
    ] = None,
) -> None:
    """Read rows another tool computed; they are marked as foreign and never stand in for captured ones."""
    if tool == "vllm" and tokens is not None:
        raise OptionError("--tokens is for datasets; vLLM's files hold their token ids")
    if tool == "datasets" and layers is not None:
        raise OptionError("--layers is for vllm; a data set names its points by its columns")
    ids = parse_layers(layers) if tool == "vllm" else []
    if kind_of(path) == "nothing":
        raise OptionError(f"{str(path)!r} does not exist: give what {tool} wrote")
    activations = ActivationStore(store)
    from probes.foreign import import_datasets, import_vllm

    if tool == "vllm":
        done = import_vllm(path, activations, model=of, layers=ids)
    else:
        done = import_datasets(path, activations, model=of, tokens=tokens)
    say(f"{count(done.sequences, 'sequence')}, {count(len(done.features), 'point')}: {', '.join(done.features)}")
    say(
        f"{done.rows_written:,} written ({size(done.bytes_written)}) as {done.context['weights']} to {activations.root}"
    )


def parse_layers(text: str | None) -> list[int]:
    """Layer ids from text such as 1,2,3.

    Raises:
        OptionError: none given, or text of another form.
    """
    parts = [part.strip() for part in (text or "").split(",")]
    if not all(part.isdecimal() for part in parts):
        raise OptionError(f"layers {text!r}: give --layers 1,2,3, the ids in eagle_aux_hidden_state_layer_ids")
    return [int(part) for part in parts]


def parse_size(text: str) -> int:
    """Bytes of a size such as 20GB, 512MiB or 1000000.

    Raises:
        OptionError: not a size.
    """
    units = {"": 1, "b": 1}
    for power, prefix in enumerate("kmgt", 1):
        units |= {f"{prefix}b": 1000**power, f"{prefix}ib": 1024**power}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in units:
        raise OptionError(f"size {text!r}: write a number with a unit such as 20GB or 512MiB")
    return int(float(match[1]) * units[match[2]])
