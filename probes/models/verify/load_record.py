"""What an earlier load of a folder established, and the file that keeps it: enough to find rows and read them by a lens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

from probes.cache_folder import cache_root
from probes.file_state import file_states
from probes.models.fingerprint.checksum import combined
from probes.models.protocol import Canary, Context, Faithfulness, Identity, Model, Shape
from probes.models.sources.checkpoint import Loading
from probes.models.sources.checkpoint_tensors import SafetensorsFolder
from probes.models.sources.digest import rows_digest
from probes.models.sources.fast_tokenizer import FastTokenizer
from probes.models.verify.lens_tensors import LensTensors
from probes.models.verify.record_file import read_record, write_record
from probes.points import every_address

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class LoadRecord:
    """A model that an ordinary load has checked."""

    shape: Shape
    context: Context
    faithfulness: Faithfulness
    canary: Canary
    device: str
    refusals: Mapping[str, str]
    """Why an address cannot be read, for each that cannot."""
    lens: LensTensors | None
    """Where its final norm and unembedding lie; None where they are not put together from tensors of the folder."""
    tokenizer: tuple[str, list[int]] | None
    """What a `FastTokenizer` is made of; None where it would not do."""

    @classmethod
    def of(cls, model: Model, folder: Path) -> LoadRecord:
        """Return the record of a model that was loaded from a folder."""
        reasons = {str(address): model.refusal(address) for address in every_address(model.shape.n_layers)}
        refusals = {address: reason for address, reason in reasons.items() if reason}
        lens = None if "lens" in model.faithfulness.refused else LensTensors.of(model.unembedding(), folder)
        kept = None if model.tokenizer is None else FastTokenizer.of(model.tokenizer)
        return cls(
            model.shape, model.context, model.faithfulness, model.canary, str(model.device), refusals, lens, kept
        )


@dataclass(frozen=True)
class RecordFile:
    """The file of one folder's record, in the cache."""

    path: Path
    state: str
    """Digest of the folder's files (name, inode, size, time of the last change), of a row of every weight, and of versions."""

    @classmethod
    def of(cls, folder: Path, how: Loading) -> RecordFile | None:
        """Return the record's file of a folder that is loaded in this way; None of a damaged folder, which a load refuses."""
        try:
            files, checkpoint = file_states(folder.resolve().iterdir()), SafetensorsFolder(folder)
            rows = rows_digest(checkpoint.rows(checkpoint.names))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        versions = [version("bathyscope"), torch.__version__, version("transformers")]
        state = combined(map(repr, (_FORMAT, versions, files, rows)))
        return cls(cache_root() / "loads" / f"{combined([str(folder.resolve()), repr(how)])}.safetensors", state)

    def read(self) -> LoadRecord | None:
        """Return the record, or None where there is none of the folder as it is."""
        names = ("tokens", "values", "tokenizer")
        if (kept := read_record(self.path, names)) is None:
            return None
        facts, (tokens, values, letters) = kept[0], (kept[1][name] for name in names)
        if facts["state"] != self.state:
            return None
        return LoadRecord(
            Shape(**facts["shape"]),
            Context(**facts["context"]),
            Faithfulness(tuple(Identity(**one) for one in facts["identities"]), facts["refused"]),
            Canary(tokens, values, facts["tolerance"]),
            facts["device"],
            facts["refusals"],
            facts["lens"] and LensTensors(**facts["lens"]),
            (letters.numpy().tobytes().decode(), facts["special"]) if len(letters) else None,
        )

    def write(self, record: LoadRecord) -> None:
        """Keep a record; a cache that cannot be written is left alone."""
        saved, special = record.tokenizer or ("", [])
        facts = {
            "state": self.state, "shape": asdict(record.shape), "context": asdict(record.context), "device": record.device,
            "identities": [asdict(identity) for identity in record.faithfulness.identities],
            "refused": dict(record.faithfulness.refused), "refusals": dict(record.refusals),
            "tolerance": record.canary.tolerance, "lens": record.lens and asdict(record.lens), "special": special,
        }  # fmt: skip
        letters = torch.tensor(list(saved.encode()), dtype=torch.uint8)
        tensors = {"tokens": record.canary.tokens, "values": record.canary.values, "tokenizer": letters}
        write_record(self.path, facts, tensors)
