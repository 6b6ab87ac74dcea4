"""The activation store: safetensors shards named by content, and a catalogue rebuilt from them; knows no model and no point."""

from probes.store.append_only import AppendOnlyWriter
from probes.store.layout import PROTOCOL
from probes.store.maintenance import GcReport, VerifyReport
from probes.store.row_store import RowStore
from probes.store.store import ActivationStore, default_root
from probes.store.values import Context, DamagedShard, MissingRows, Packet, Put, Ragged

__all__ = [
    "PROTOCOL",
    "ActivationStore",
    "AppendOnlyWriter",
    "Context",
    "DamagedShard",
    "GcReport",
    "MissingRows",
    "Packet",
    "Put",
    "Ragged",
    "RowStore",
    "VerifyReport",
    "default_root",
]
