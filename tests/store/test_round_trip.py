"""What is put is what is read, for every dtype and shape, without copies and without padding."""

from __future__ import annotations

import pickle
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from store_makers import CONTEXT, FEATURES, check_rows, expected, make, numbered, shard_files

from probes.errors import StoreError
from probes.store import ActivationStore, MissingRows, Packet, Ragged
from probes.store.layout import BLOCK, codes, encode


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(tuple)
    sequences = draw(st.lists(ids, min_size=1, max_size=5, unique=True))
    features = {}
    for j, dtype in enumerate(draw(st.lists(st.sampled_from(list(codes())), min_size=1, max_size=4))):
        counts = draw(st.lists(st.integers(0, 4), min_size=len(sequences), max_size=len(sequences)))
        width = draw(st.sampled_from([(), (1,), (3,), (2, 3), (0,)]))
        n_bytes = sum(counts) * torch.Size(width).numel() * dtype.itemsize
        data = torch.randint(0, 2 if dtype is torch.bool else 256, (n_bytes,), dtype=torch.uint8)
        features[f"f{j}/é {dtype}"] = Ragged(data.view(dtype).reshape(sum(counts), *width), tuple(counts))
    return Packet(CONTEXT, tuple(sequences), features)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(packets())
def test_any_packet_comes_back_bit_for_bit(packet: Packet) -> None:
    with tempfile.TemporaryDirectory() as root:
        put = ActivationStore(root).put(packet)
        store = ActivationStore(root)
        assert put.rows_written == len(packet.sequences) * len(packet.features)
        assert store.contains(CONTEXT, packet.sequences, list(packet.features)).all()
        for name, rows in packet.features.items():
            for got, want in zip(store.read(CONTEXT, packet.sequences, name), rows.split(), strict=True):
                assert same(got, want)
        assert store.verify().damaged == ()
        assert store.bytes_held() == put.bytes_written == sum(f.stat().st_size for f in store.root.glob("shards/*/*"))
        (path,) = store.root.glob("shards/*/*")
        plain = load_file(path)
        assert all(same(plain[name], rows.values) for name, rows in packet.features.items())


@pytest.mark.parametrize(
    "rows", [torch.zeros(4, 6).half()[:, ::2], torch.ones(3, 4).T, torch.ones(5)[2:3], torch.ones(1).expand(4)]
)
def test_strides_do_not_matter(store: ActivationStore, rows: torch.Tensor) -> None:
    store.put(Packet(CONTEXT, (numbered(0),), {"f": Ragged(rows, (len(rows),))}))
    assert same(store.read(CONTEXT, [numbered(0)], "f")[0], rows)


def test_equal_packets_give_equal_files_whatever_the_order_of_their_features() -> None:
    packet = make([numbered(0), numbered(1)])
    turned = Packet(dict(reversed(packet.context.items())), packet.sequences, dict(reversed(packet.features.items())))
    assert encode(packet).header == encode(turned).header
    other = make([numbered(0), numbered(1)], weights="w1")
    assert encode(packet).entry.digest != encode(other).entry.digest


def test_rows_come_in_the_order_asked_with_repeats(store: ActivationStore) -> None:
    store.put(make([numbered(0), numbered(1, 5)]))
    store.put(make([numbered(2, 1)]))
    check_rows(store, [numbered(2, 1), numbered(1, 5), numbered(0), numbered(1, 5)])


def test_a_sequence_given_twice_is_stored_once(store: ActivationStore) -> None:
    put = store.put(make([numbered(0), numbered(1), numbered(0)]))
    assert put.rows_written == 2 * len(FEATURES)
    with safe_open(store.root.glob("shards/*/*").__next__(), "pt") as file:
        assert file.get_tensor("sequences/ids").tolist() == [*numbered(0), *numbered(1)]


def test_read_gives_views_of_one_mapping_and_writing_to_them_spares_the_file(store: ActivationStore) -> None:
    sequences = [numbered(0), numbered(1)]
    store.put(make(sequences))
    first, second = store.read(CONTEXT, sequences, FEATURES[0])
    assert second.data_ptr() - first.data_ptr() == first.nbytes
    first.zero_()
    assert store.verify().damaged == ()
    check_rows(ActivationStore(store.root), sequences)


def test_positions_pick_rows_from_either_end(store: ActivationStore) -> None:
    sequences = [numbered(0, 6), numbered(1, 2), numbered(2, 3)]
    store.put(make(sequences))
    positions = [[5, 0, -2], [-1], []]
    got = store.read_positions(CONTEXT, sequences, FEATURES[0], positions)
    for tokens, rows, at in zip(sequences, got, positions, strict=True):
        assert same(rows, expected(tokens, FEATURES[0])[at])
    with pytest.raises(StoreError, match=r"position 2 .* 2 rows .*sequence 1"):
        store.read_positions(CONTEXT, sequences, FEATURES[0], [[0], [2], [0]])
    with pytest.raises(StoreError, match="1 lists of positions for 3"):
        store.read_positions(CONTEXT, sequences, FEATURES[0], [[0]])


def test_blocks_longer_than_one_checksum_round_trip(store: ActivationStore) -> None:
    rows = torch.arange(3 * BLOCK // 4 + 5, dtype=torch.float32)[:, None]
    store.put(Packet(CONTEXT, (numbered(0), numbered(1)), {"f": Ragged(rows, (7, len(rows) - 7))}))
    first, second = store.read(CONTEXT, [numbered(0), numbered(1)], "f")
    assert same(torch.cat([first, second]), rows)
    assert store.read_positions(CONTEXT, [numbered(1)], "f", [[-1]])[0].item() == len(rows) - 1


def test_missing_rows_are_named_and_counted(store: ActivationStore) -> None:
    store.put(make([numbered(0)], FEATURES[:1]))
    with pytest.raises(MissingRows, match=r"2 of 3 sequences have no 'resid_post.0/rows'") as refusal:
        store.read(CONTEXT, [numbered(0), numbered(1), numbered(2)], FEATURES[0])
    assert (refusal.value.missing, refusal.value.feature) == (2, FEATURES[0])


@pytest.mark.parametrize("name", ["", "sequences/ids", "__metadata__"])
def test_reserved_feature_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="empty or reserved"):
        Packet(CONTEXT, (), {name: Ragged(torch.zeros(0, 1), ())})


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not add up"):
        Ragged(torch.zeros(3, 1), (1, 1))
    with pytest.raises(ValueError, match="1 counts for 2 sequences"):
        Packet(CONTEXT, (numbered(0), numbered(1)), {"f": Ragged(torch.zeros(3, 1), (3,))})


def test_the_store_travels_to_other_processes_by_pickle(store: ActivationStore) -> None:
    store.put(make([numbered(0)]))
    check_rows(pickle.loads(pickle.dumps(store)), [numbered(0)])


def test_rows_are_copied_out_when_descriptors_run_short(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [numbered(i) for i in range(12)]
    for tokens in sequences:
        store.put(make([tokens]))
    assert len(shard_files(store)) == 12
    monkeypatch.setattr("resource.getrlimit", lambda _: (16, 16))
    rows = store.read(CONTEXT, sequences, FEATURES[0])
    assert len(store._backing._maps) <= 5
    assert all(same(got, expected(tokens, FEATURES[0])) for tokens, got in zip(sequences, rows, strict=True))
