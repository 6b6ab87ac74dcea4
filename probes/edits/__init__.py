"""Interventions as data: frozen values that any backend applies and that enter a store key. Imported by capture and analyses."""

from probes.edits.block_order import BlockPath, RepeatBlocks, SkipBlocks, repeat, skip
from probes.edits.directions import Difference, Direction, FileDirection, RunDirection, TokenDirection
from probes.edits.edit import (
    Edit,
    Scope,
    altered,
    check_edits,
    composed,
    decoding_writes,
    generate,
    legal_forms,
    logits,
    parse_edits,
    read,
    resolve,
    writes_of,
)
from probes.edits.edited_model import EditedModel
from probes.edits.head_write import HeadWriteEdit
from probes.edits.knock_out import KnockOut
from probes.edits.line import EditError
from probes.edits.norm_freezing import FreezeNorm
from probes.edits.other_prompt import Other
from probes.edits.point_edit import PointEdit
from probes.edits.points import Add, Coefficients, Mean, ProjectOut, Replace, Scale, project_out
from probes.edits.positions import At, Texts, TokenText
from probes.edits.programs import Program
from probes.edits.values import Source, Values

__all__ = [
    "Add",
    "At",
    "BlockPath",
    "Coefficients",
    "Difference",
    "Direction",
    "Edit",
    "EditError",
    "EditedModel",
    "FileDirection",
    "FreezeNorm",
    "HeadWriteEdit",
    "KnockOut",
    "Mean",
    "Other",
    "PointEdit",
    "Program",
    "ProjectOut",
    "RepeatBlocks",
    "Replace",
    "RunDirection",
    "Scale",
    "Scope",
    "SkipBlocks",
    "Source",
    "Texts",
    "TokenDirection",
    "TokenText",
    "Values",
    "altered",
    "check_edits",
    "composed",
    "decoding_writes",
    "generate",
    "legal_forms",
    "logits",
    "parse_edits",
    "project_out",
    "read",
    "repeat",
    "resolve",
    "skip",
    "writes_of",
]
