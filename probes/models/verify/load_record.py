"""What an earlier load of a folder established, and the file that keeps it: enough to find rows and read them by a lens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from probes.cache_folder import cache_root
from probes.locked_files import replacing
from probes.models.fingerprint.checksum import combined
from probes.models.protocol import Canary, Context, Faithfulness, Identity, Model, Shape
from probes.models.sources.checkpoint import Loading
from probes.models.sources.checkpoint_tensors import SafetensorsFolder
from probes.models.sources.digest import byte_parts
from probes.models.sources.fast_tokenizer import FastTokenizer
from probes.models.verify.lens_tensors import LensTensors
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
            stats = [(path.name, path.stat()) for path in sorted(folder.resolve().iterdir())]
            rows = _some_rows(folder)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        facts = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        versions = [version("bathyscope"), torch.__version__, version("transformers")]
        state = combined(map(repr, (_FORMAT, versions, facts, rows)))
        return cls(cache_root() / "loads" / f"{combined([str(folder.resolve()), repr(how)])}.safetensors", state)

    def read(self) -> LoadRecord | None:
        """Return the record, or None where there is none of the folder as it is."""
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
                tokens, values, letters = (file.get_tensor(name) for name in ("tokens", "values", "tokenizer"))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as draft:
                save_file(tensors, draft, metadata={"facts": json.dumps(facts)})
        except OSError:
            return


def _some_rows(folder: Path) -> str:
    """A hash of one row of every weight, which a file changed under the same inode, size and time would change."""
    checkpoint, state = SafetensorsFolder(folder), xxhash.xxh3_128()
    for row in checkpoint.rows(checkpoint.names):
        for part in byte_parts(row):
            state.update(part)
    return str(state.hexdigest())
