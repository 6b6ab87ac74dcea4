"""PROTOCOL.md is what the code does: its example is encoded and read back byte for byte."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import xxhash

import probes.store
from probes.store import PROTOCOL, ActivationStore, Packet, Ragged
from probes.store.catalogue import SCHEMA
from probes.store.layout import BLOCK, DTYPES, encode
from probes.store.values import sequence_digest

PAGE = (Path(probes.store.__file__).parent / "PROTOCOL.md").read_text()
BLOCKS = {kind: body.strip() for kind, body in re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)}
HEADER = BLOCKS["json"]
SEQUENCES = tuple(tuple(tokens) for tokens in json.loads(re.search(r"Two sequences, `(.*?)`", PAGE)[1]))
NAME = re.search(r"`shards/(..)/(\w{32}).safetensors`", PAGE)[2]
PACKET = Packet(
    json.loads(json.loads(HEADER)["__metadata__"]["context"]),
    SEQUENCES,
    {
        "resid_post.0/norm": Ragged(torch.arange(1.0, 6.0), (3, 2)),
        "resid_post.0/last": Ragged(torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16), (1, 1)),
    },
)


def test_the_example_is_what_the_code_writes() -> None:
    encoded = encode(PACKET)
    assert encoded.header[8:].decode("ascii").rstrip(" ") == HEADER
    assert encoded.header[:8].hex() == re.search(r"first 8 bytes are `(\w+)`", PAGE)[1]
    assert b"".join(data.tobytes() for data in encoded.buffers).hex() == BLOCKS["hex"].replace("\n", "")
    assert encoded.entry.digest == NAME
    assert encoded.entry.nbytes == int(re.search(r"and the file, (\d+) bytes", PAGE)[1])
    assert [sequence_digest(tokens).hex() for tokens in SEQUENCES] == BLOCKS["digests"].split("\n")


def test_the_example_built_from_the_page_alone_is_read_by_the_store(tmp_path: Path) -> None:
    text = HEADER.encode("ascii")
    text += b" " * (-(8 + len(text)) % 64)
    header = len(text).to_bytes(8, "little") + text
    name = xxhash.xxh3_128_hexdigest(header)
    path = tmp_path / "shards" / name[:2] / f"{name}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(header + bytes.fromhex(BLOCKS["hex"]))
    store = ActivationStore(tmp_path)
    for feature, rows in PACKET.features.items():
        for got, want in zip(store.read(PACKET.context, SEQUENCES, feature), rows.split(), strict=True):
            assert got.dtype == want.dtype
            assert got.equal(want)
    assert store.verify().checked == 1


def test_the_numbers_and_names_on_the_page_are_the_code_s(tmp_path: Path) -> None:
    assert f"protocol {PROTOCOL}\n" in PAGE
    assert f"blocks of {BLOCK} bytes" in PAGE
    assert re.search(r"Dtypes: `(.*?)`", PAGE)[1].split() == list(DTYPES.values())
    assert BLOCKS["sql"] == SCHEMA.strip()
    marker = json.loads(re.search(r"^store.json +(.*)$", PAGE, flags=re.MULTILINE)[1])
    root = ActivationStore(tmp_path / "store").root
    assert json.loads((root / "store.json").read_text()) == marker
    for entry in root.iterdir():
        assert re.search(rf"^{re.escape(entry.name)}\b", PAGE, flags=re.MULTILINE)
