"""Interventions as data: frozen values that any backend applies and that enter a store key. Imported by capture and analyses."""

from probes.edits.attention import KnockOut
from probes.edits.block_order import BlockPath, repeat, skip
from probes.edits.edit import Edit, Scope, altered, decoding_writes, generate, logits, read, resolve, writes_of
from probes.edits.points import Add, Coefficients, PointEdit, Replace, Scale, project_out
from probes.edits.programs import Program
from probes.edits.values import Source, Values
from probes.edits.weights import HeadWriteEdit

__all__ = [
    "Add",
    "BlockPath",
    "Coefficients",
    "Edit",
    "HeadWriteEdit",
    "KnockOut",
    "PointEdit",
    "Program",
    "Replace",
    "Scale",
    "Scope",
    "Source",
    "Values",
    "altered",
    "decoding_writes",
    "generate",
    "logits",
    "project_out",
    "read",
    "repeat",
    "resolve",
    "skip",
    "writes_of",
]
