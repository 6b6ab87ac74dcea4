"""What the checks of a load established, and the file that keeps it for the next load of the same weights."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch

from probes.anatomy import Anatomy, Layout
from probes.cache_folder import cache_root
from probes.models.fingerprint.checksum import combined
from probes.models.fingerprint.fingerprint import Fingerprint
from probes.models.protocol import Canary, Faithfulness, Identity
from probes.models.verify.identities import Verified
from probes.models.verify.record_file import read_record, write_record

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Checked:
    """A model that passed its checks."""

    verified: Verified
    canary: Canary
    weights: str
    """Digest of its weights."""
    block_outputs: tuple[int | None, ...] = ()
    """The length of the tuple that each block returns; None where it returns a bare tensor."""


@dataclass(frozen=True)
class CheckRecord:
    """The file of one model's checks, in the cache. Another fingerprint, file or library version has another file."""

    path: Path
    canary_rows: str
    """Hash of some rows of the weights on disk, which a file changed under the same inode, size and time would change."""

    @classmethod
    def of(cls, state: Fingerprint, canary_rows: str) -> CheckRecord:
        """Return the record of a module that is in this state."""
        import transformers

        parts = [*map(repr, astuple(state)), torch.__version__, transformers.__version__, str(_FORMAT)]
        return cls(cache_root() / "checks" / f"{combined(parts)}.safetensors", canary_rows)

    def read(self, guess: Anatomy) -> Checked | None:
        """Return what was established for this model, or None where nothing is or the canary rows differ."""
        if (kept := read_record(self.path)) is None:
            return None
        facts, tensors = kept
        if facts["canary_rows"] != self.canary_rows:
            return None
        layout = Layout(facts["layout"], *(tensors[name] for name in "qkv")) if facts["layout"] else None
        identities = tuple(Identity(**identity) for identity in facts["identities"])
        verified = Verified(
            replace(guess, kind=facts["kind"], layout=layout, refused=facts["refused"]),
            Faithfulness(identities, facts["refused_points"]),
            facts["causal"],
            facts["d_mlp"],
        )
        canary = Canary(tensors["tokens"], tensors["values"], facts["tolerance"])
        return Checked(verified, canary, facts["weights"], tuple(facts["block_outputs"]))

    def write(self, checked: Checked) -> None:
        """Keep what was established; a cache that cannot be written is left alone."""
        verified, canary, anatomy = checked.verified, checked.canary, checked.verified.anatomy
        tensors = {"tokens": canary.tokens, "values": canary.values}
        if anatomy.layout:
            tensors |= {name: getattr(anatomy.layout, name).contiguous() for name in "qkv"}
        facts = {
            "canary_rows": self.canary_rows, "weights": checked.weights, "block_outputs": checked.block_outputs,
            "kind": anatomy.kind, "layout": anatomy.layout and anatomy.layout.name, "refused": dict(anatomy.refused),
            "identities": [asdict(identity) for identity in verified.faithfulness.identities],
            "refused_points": dict(verified.faithfulness.refused), "causal": verified.causal, "d_mlp": verified.d_mlp,
            "tolerance": canary.tolerance,
        }  # fmt: skip
        write_record(self.path, facts, tensors)
