"""Models whose blocks are read one at a time: the same rows, the same keys, each block read once."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import gguf
import pytest
import torch
from checkpoints import llama_gguf
from conformance import addresses, close, read
from families import FAMILIES, make, prompt
from safetensors.torch import load_file, save_file
from tiny import PROMPTS
from torch import Tensor, nn

from analyses.cli import main
from analyses.concept_depth import ConceptDepth
from analyses.logit_lens import LogitLens
from analyses.voids import Voids
from probes.blocks.rerouting import module_of
from probes.capture import forward as sizing
from probes.capture import layer_major as scheduling
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.edits import Scale
from probes.errors import ModelError, OptionError, PointError, PromptError
from probes.models import load_model, weights_digest
from probes.models.backends.streamed import StreamedModel
from probes.models.protocol import Forward, LayerMajor, Model
from probes.models.sources.gguf import read_gguf
from probes.models.sources.locate import locate
from probes.points import POINTS, Address
from probes.reducers import Reducer
from probes.shelf import Shelf
from probes.store import ActivationStore


def folder_of(family: str, path: Path, **config: Any) -> str:
    module = make(family, **config)
    module.save_pretrained(path)
    return str(path)


def both(folder: str, **how: Any) -> tuple[Model, StreamedModel]:
    streamed = load_model(folder, device="cpu", streamed=True, **how)
    assert isinstance(streamed, StreamedModel)
    return load_model(folder, device="cpu", **how), streamed


def attention_for(family: str) -> str:
    # Gemma 2 caps its attention scores, which sdpa cannot.
    return "eager" if family == "gemma2" else "sdpa"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of("llama", tmp_path_factory.mktemp("streamed") / "model")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_of_every_family_is_that_of_an_ordinary_load(family: str, tmp_path: Path) -> None:
    model, streamed = both(folder_of(family, tmp_path / "model"), attention=attention_for(family))
    assert streamed.context == model.context
    assert streamed.shape == model.shape
    assert streamed.faithfulness.refused == model.faithfulness.refused
    assert {i.name for i in streamed.faithfulness.identities} == {i.name for i in model.faithfulness.identities}
    readable = [a for name in POINTS for a in addresses(name, model) if model.refusal(a) is None]
    right = read(model, readable, prompt(rows=2))
    streamed.blocks.ledger.blocks.clear()
    rows = read(streamed, readable, prompt(rows=2))
    assert set(streamed.blocks.ledger.blocks.values()) == {1}
    for address in readable:
        close(rows[address], right[address])


def test_a_capture_reads_each_block_once_for_the_whole_prompt_set(llama: str, tmp_path: Path) -> None:
    model, streamed = both(llama)
    needs = [
        Need("resid_post.*"),
        Need("embed"),
        Need("pattern.1"),
        Need("final_norm", Reducer(positions="last")),
        Need("resid_post.1", Reducer("lens_top", top_k=3, positions="last")),
    ]
    ordinary = capture(model, PROMPTS, needs, ActivationStore(tmp_path / "a"))
    streamed.blocks.ledger.blocks.clear()
    # Four batches of different sizes.
    rows = capture(streamed, PROMPTS, needs, ActivationStore(tmp_path / "b"), batch_tokens=4)
    assert dict(streamed.blocks.ledger.blocks) == {0: 1, 1: 1, 2: 1}
    assert rows.done.forwards == len(PROMPTS)
    for point in ("resid_post.0", "resid_post.1", "resid_post.2", "embed", "pattern.1"):
        for a, b in zip(rows.get(point), ordinary.get(point), strict=True):
            close(a, b)
    last = Reducer(positions="last")
    close(rows.packed("final_norm", last), ordinary.packed("final_norm", last))


def test_an_ordinary_load_finds_streamed_rows_and_the_other_way_round(llama: str, store: ActivationStore) -> None:
    model, streamed = both(llama)
    needs = [Need("resid_post.*")]
    assert capture(streamed, PROMPTS[:2], needs, store).done.forwards == 2
    assert capture(model, PROMPTS[:3], needs, store).done.forwards == 1
    assert capture(streamed, PROMPTS, needs, store).done.forwards == 1


def test_only_the_blocks_up_to_the_last_point_are_read(llama: str, store: ActivationStore) -> None:
    _, streamed = both(llama)
    streamed.blocks.ledger.blocks.clear()
    capture(streamed, PROMPTS, [Need("resid_post.1")], store)
    assert dict(streamed.blocks.ledger.blocks) == {0: 1, 1: 1}


def test_the_blocks_hold_nothing_before_and_after(llama: str) -> None:
    _, streamed = both(llama)

    def in_memory() -> set[str]:
        return {n for n, p in streamed.module.named_parameters() if not p.is_meta and ".layers." in n and p.dim() > 1}

    assert in_memory() == set()
    inside: list[set[str]] = []
    streamed.run(prompt(), {Address("resid_post", 1): lambda _: inside.append(in_memory())})
    assert inside[0]
    assert all(".layers.1." in name for name in inside[0])
    with pytest.raises(ZeroDivisionError):
        streamed.run(prompt(), {Address("resid_post", 1): lambda _: 1 / 0})  # type: ignore[arg-type, return-value]
    assert in_memory() == set()
    assert all("forward" not in vars(block) for block in streamed._runner.blocks)


def test_never_more_than_two_blocks_are_in_memory(llama: str, monkeypatch: Any) -> None:
    """The block at work and the one being read; a third is not begun before the first is let go."""
    _, streamed = both(llama)
    alive: set[int] = set()
    most: list[int] = []
    plain = streamed.blocks.read

    def watched(layer: int) -> dict[str, Tensor]:
        alive.add(layer)
        most.append(len(alive))
        # A parameter is put in place as it is, so it lives as long as the block's weights do.
        tensors: dict[str, Tensor] = {
            name: nn.Parameter(tensor, requires_grad=False) for name, tensor in plain(layer).items()
        }
        weakref.finalize(tensors[f"model.layers.{layer}.mlp.down_proj.weight"], alive.discard, layer)
        return tensors

    monkeypatch.setattr(streamed.blocks, "read", watched)
    streamed.run(prompt(), {Address("logits"): lambda _: None})
    assert len(most) == 3
    assert max(most) <= 2
    assert alive == set()


def test_writes_go_with_the_stream_to_later_blocks(llama: str) -> None:
    model, streamed = both(llama)
    sites = [Address("resid_post", 2), Address("resid_mid", 1), Address("logits")]
    edits = {
        Address("resid_post", 0): lambda old: old * 2,
        Address("attn_out", 1): lambda old: old.roll(1, -1),
        Address("pattern", 2): lambda old: old.flip(1),
        Address("embed"): lambda old: old + 0.5,
    }
    right, rows = (read(m, sites, prompt(rows=2), edits) for m in (model, streamed))
    clean = read(model, sites, prompt(rows=2))
    for address in sites:
        close(rows[address], right[address])
        assert not torch.allclose(clean[address], right[address], atol=1e-3)


def test_edits_enter_the_key_of_streamed_rows(llama: str, store: ActivationStore) -> None:
    model, streamed = both(llama)
    edit = Scale(address=Address("mlp_out", 1), factor=0.0)
    rows = capture(streamed, PROMPTS, [Need("resid_post.2")], store, edits=[edit])
    assert capture(model, PROMPTS, [Need("resid_post.2")], store, edits=[edit]).done.forwards == 0
    clean = capture(model, PROMPTS, [Need("resid_post.2")], store)
    assert clean.done.forwards == len(PROMPTS)
    assert not torch.allclose(rows.packed("resid_post.2"), clean.packed("resid_post.2"), atol=1e-3)


def test_forwards_that_end_at_different_depths_go_together(llama: str) -> None:
    model, streamed = both(llama)
    ends = [Address("embed"), Address("resid_post", 0), Address("logits"), Address("z", 1)]
    rows: dict[int, Tensor] = {}
    forwards = [
        Forward(prompt(seed=i), {address: lambda t, i=i: rows.__setitem__(i, t.clone())})
        for i, address in enumerate(ends)
    ]
    assert isinstance(streamed, LayerMajor)
    steps = list(streamed.run_all(forwards))
    assert [steps.count(i) for i in range(4)] == [1, 1, 4, 2]
    for i, address in enumerate(ends):
        close(rows[i], read(model, [address], prompt(seed=i))[address])


def test_a_small_spill_file_means_more_sweeps_not_other_rows(llama: str, tmp_path: Path) -> None:
    model, streamed = both(llama)
    ordinary = capture(model, PROMPTS, [Need("resid_post.*")], ActivationStore(tmp_path / "a"))
    # Room for 8 rows of 32 float32 values: [20, 9-10], [5-8] and [11-17] go apart.
    streamed.kept_bytes = 8 * 32 * 4
    streamed.blocks.ledger.blocks.clear()
    rows = capture(streamed, PROMPTS, [Need("resid_post.*")], ActivationStore(tmp_path / "b"), batch_tokens=4)
    assert set(streamed.blocks.ledger.blocks.values()) == {2}
    for layer in range(3):
        close(rows.packed(f"resid_post.{layer}"), ordinary.packed(f"resid_post.{layer}"))


def test_packets_are_written_while_the_sweep_goes_on(llama: str, store: ActivationStore, monkeypatch: Any) -> None:
    model, streamed = both(llama)
    for module in (scheduling, sizing):
        monkeypatch.setattr(module, "PACKET_BYTES", 1)
    capture(streamed, PROMPTS, [Need("resid_post.*")], store)
    assert int(store.ls()["shards"].sum()) >= 3 * len(PROMPTS)
    assert capture(model, PROMPTS, [Need("resid_post.*")], store).done.forwards == 0


def test_after_a_break_the_committed_rows_stay(llama: str, store: ActivationStore, monkeypatch: Any) -> None:
    _, streamed = both(llama)
    for module in (scheduling, sizing):
        monkeypatch.setattr(module, "PACKET_BYTES", 1)
    read = streamed.blocks.read

    def breaks(layer: int) -> dict[str, Tensor]:
        if layer == 2:
            raise KeyboardInterrupt
        return read(layer)

    with monkeypatch.context() as patch:
        patch.setattr(streamed.blocks, "read", breaks)
        with pytest.raises(KeyboardInterrupt):
            capture(streamed, PROMPTS, [Need("resid_post.*")], store)
    again = capture(streamed, PROMPTS, [Need("resid_post.*")], store)
    assert again.done.plan.rows == sum(map(len, PROMPTS)), "only the last block's rows were missing"
    assert all(not torch.isnan(t).any() for t in again.get("resid_post.2"))


def test_the_digest_is_that_of_the_whole_module_in_either_dtype(llama: str) -> None:
    for dtype in ("float32", "bfloat16"):
        model, streamed = both(llama, dtype=dtype)
        assert streamed.context.weights == model.context.weights == weights_digest(model.module)  # type: ignore[attr-defined]


def test_a_changed_weight_in_a_block_changes_the_digest(llama: str, tmp_path: Path) -> None:
    changed = folder_of("llama", tmp_path / "other")
    file = Path(changed) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    first, second = (load_model(f, device="cpu", streamed=True).context.weights for f in (llama, changed))
    assert first != second


def test_shards_with_an_index_are_read(llama: str, tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    make("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    whole, sharded = (load_model(str(f), device="cpu", streamed=True) for f in (folder, tmp_path / "sharded"))
    assert sharded.context == whole.context


def test_buffers_that_no_checkpoint_holds_are_computed(tmp_path: Path) -> None:
    """GPT-J keeps its rotary table inside each block's attention."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "model")
    model, streamed = both(str(tmp_path / "model"), attention="eager")
    sites = [Address("resid_post", 2)]
    close(read(streamed, sites, prompt())[sites[0]], read(model, sites, prompt())[sites[0]])


def test_what_needs_all_blocks_at_once_is_refused_by_name(llama: str) -> None:
    _, streamed = both(llama)
    with pytest.raises(PointError, match="is streamed: its blocks are on disk"), module_of(streamed):
        pass
    with pytest.raises(PromptError, match="token id 97"):
        streamed.run(torch.tensor([[5, 97]]), {Address("logits"): lambda _: None})
    with pytest.raises(PointError, match="layers 0 to 2"):
        streamed.run(prompt(), {Address("resid_post", 3): lambda _: None})


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight' holds NaN"):
        load_model(folder, device="cpu", streamed=True)


def test_a_missing_block_weight_is_refused(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weight.*model\.layers\.2\.mlp\.up_proj"):
        load_model(folder, device="cpu", streamed=True)


def test_blocks_that_pass_each_other_more_than_the_stream_are_refused(llama: str, monkeypatch: Any) -> None:
    """A planted model whose second block adds what the first one kept aside: no schedule by blocks can be true of it."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def with_a_secret(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept: list[Tensor] = []
        hooks = [
            self.layers[0].mlp.register_forward_hook(lambda _, __, out: kept.append(out)),
            self.layers[1].mlp.register_forward_hook(lambda _, __, out: out + (kept[-1] if kept else 0)),
        ]
        try:
            return forward(self, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(LlamaModel, "forward", with_a_secret)
    with pytest.raises(ModelError, match="load it without streaming"):
        load_model(llama, device="cpu", streamed=True)


def test_what_one_block_leaves_behind_for_the_next_is_refused(llama: str, monkeypatch: Any) -> None:
    """As above, but what is kept aside outlives the forward, so that a block run alone finds it."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward, behind = LlamaAttention.forward, dict[int, Tensor]()

    def leaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, *rest = forward(self, *args, **kwargs)
        behind[self.layer_idx] = out
        return (out + behind[0] if self.layer_idx == 1 else out, *rest)

    monkeypatch.setattr(LlamaAttention, "forward", leaking)
    assert load_model(llama, device="cpu").faithfulness.holds
    with pytest.raises(ModelError, match="load it without streaming"):
        load_model(llama, device="cpu", streamed=True)


def test_a_full_disk_is_refused_with_the_bytes_it_lacks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=95))
    with pytest.raises(ModelError, match=r"keeps 96 bytes of activations in .* which has 95 more free"):
        Shelf(tmp_path, 0).keep(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("memory_bytes", [0, 100, None])
def test_a_shelf_gives_back_what_it_was_given(tmp_path: Path, memory_bytes: int | None) -> None:
    shelf = Shelf(tmp_path, memory_bytes)
    tensors = [torch.randn(2, 3, 4), torch.randn(1, 5, 4).bfloat16(), torch.randn(2, 3, 4), torch.randn(0, 4)]
    kept = [shelf.keep(tensor) for tensor in tensors]
    assert all(torch.equal(k.get(shelf), tensor) for k, tensor in zip(kept, tensors, strict=True))
    total = sum(tensor.nbytes for tensor in tensors)
    # The first takes 96 bytes, so that no other one has room beside it.
    assert shelf.in_memory == {0: 0, 100: 96, None: total}[memory_bytes]
    assert shelf.in_memory + shelf.on_disk == total
    assert list(tmp_path.iterdir()) == [], "the file has no name, so a killed process leaves none"
    del kept
    assert (shelf.in_memory, shelf.on_disk) == (0, 0)
    again = shelf.keep(tensors[2])
    assert shelf.most_on_disk <= total, "room that was let go is used again"
    assert torch.equal(again.get(shelf), tensors[2])


def test_a_streamed_model_takes_no_device_map_and_no_other_backend(llama: str) -> None:
    with pytest.raises(OptionError, match="without a device map"):
        load_model(llama, streamed=True, device_map="auto")


def test_analyses_read_a_streamed_model(llama: str, tmp_path: Path) -> None:
    model, streamed = both(llama)
    labelled = [{"tokens": [5 + i, 6, 7 + i % 3, 8], "label": i % 2} for i in range(24)]
    lines = tmp_path / "labelled.jsonl"
    lines.write_text("\n".join(json.dumps(line) for line in labelled))
    for analysis, prompts in (
        (LogitLens(), list(PROMPTS)),
        (Voids(), list(PROMPTS)),
        (ConceptDepth(representation="resid_post"), lines),
    ):
        results = [
            analysis.run(m, prompts, store=ActivationStore(tmp_path / name / analysis.name))  # type: ignore[attr-defined]
            for m, name in ((model, "ordinary"), (streamed, "streamed"))
        ]
        assert [r.provenance["streamed"] for r in results] == [False, True]
        for name, table in results[0].tables.items():
            other = results[1].tables[name]
            assert len(other) == len(table)
            for column in table.select_dtypes("number"):
                assert other[column].to_numpy() == pytest.approx(table[column].to_numpy(), abs=1e-4, nan_ok=True), name


def test_the_command_line_captures_streamed(llama: str, tmp_path: Path, capsys: Any) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(json.dumps({"tokens": list(p)}) for p in PROMPTS))
    common = [
        "--prompts",
        str(lines),
        "--store",
        str(tmp_path / "store"),
        "--device",
        "cpu",
        "--points",
        "resid_post.*",
    ]
    assert main(["capture", "--model", llama, *common, "--streamed"]) == 0
    assert "4 forward passes" in capsys.readouterr().out
    assert main(["capture", "--model", llama, *common]) == 0
    assert "0 forward passes" in capsys.readouterr().out
    assert main(["capture", "--model", llama, *common, "--streamed", "--device-map", "auto"]) == 2
    capsys.readouterr()
    weights_only = ["run", "communication_channels", "--model", llama, "--streamed", "--out", str(tmp_path / "out")]
    assert main([*weights_only, "--device", "cpu", "--store", str(tmp_path / "store")]) == 2
    assert "is streamed: its blocks are on disk" in capsys.readouterr().err


@pytest.mark.real
def test_streaming_the_default_model_gives_the_same_rows(real: Model, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.undo()
    texts = ["The capital of France is", "def add(a, b):\n    return a + b", "Water", "One two three four five six"]
    sequences = [tuple(real.tokenizer.encode(text)) for text in texts]
    needs = [Need("resid_post.*"), Need("logits", Reducer(positions="last"))]
    ordinary = capture(real, sequences, needs, ActivationStore(tmp_path / "a"))
    streamed = load_model("smollm2-135m", device=str(real.device), streamed=True)
    assert isinstance(streamed, StreamedModel)
    assert streamed.context == real.context
    streamed.blocks.ledger.blocks.clear()
    rows = capture(streamed, sequences, needs, ActivationStore(tmp_path / "b"))
    assert set(streamed.blocks.ledger.blocks.values()) == {1}
    for layer in range(real.shape.n_layers):
        close(rows.packed(f"resid_post.{layer}"), ordinary.packed(f"resid_post.{layer}"))
    last = Reducer(positions="last")
    close(rows.packed("logits", last), ordinary.packed("logits", last))
    assert streamed.faithfulness.holds


class TestGguf:
    """Weights that stay quantised in their file, each dequantised when its block passes."""

    @pytest.fixture(params=["F32", "F16", "Q8_0", "Q5_1", "Q4_0"])
    def path(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        kind = gguf.GGMLQuantizationType[request.param]
        return llama_gguf(
            tmp_path / "tiny.gguf", model=make("llama", num_key_value_heads=2, intermediate_size=64), kind=kind
        )

    def test_rows_and_keys_are_those_of_the_converted_folder(self, path: Path, store: ActivationStore) -> None:
        plain, streamed = both(str(path))
        assert streamed.context == plain.context
        needs = [Need("resid_post.*")]
        rows = capture(streamed, PROMPTS, needs, store)
        assert capture(plain, PROMPTS, needs, store).done.forwards == 0
        for address in (Address("resid_post", 0), Address("resid_post", 2)):
            own = capture(plain, PROMPTS, needs, ActivationStore(path.parent / "other"))
            close(rows.packed(address), own.packed(address))

    def test_a_pass_reads_quantised_bytes_and_writes_none(self, path: Path) -> None:
        streamed = load_model(str(path), device="cpu", streamed=True)
        assert isinstance(streamed, StreamedModel)
        assert not list(locate(str(path), keep_quantised=True).folder.glob("*.safetensors"))
        ledger = streamed.blocks.ledger
        ledger.bytes = 0
        streamed.run(prompt(), {Address("resid_post", 2): lambda _: None})
        reader = read_gguf(path)
        blocks = sum(int(t.n_bytes) for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) > 1)
        assert ledger.bytes == blocks

    def test_a_file_that_changed_has_rows_of_its_own(self, path: Path) -> None:
        before = load_model(str(path), device="cpu", streamed=True).context
        llama_gguf(path, model=make("llama", seed=5, num_key_value_heads=2, intermediate_size=64))
        assert load_model(str(path), device="cpu", streamed=True).context != before

    def test_a_missing_weight_and_a_cut_file_are_named(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ModelError, match="truncated"):
            load_model(str(path), device="cpu", streamed=True)
        names = checkpoints._gguf_names(3, True)
        del names["model.layers.1.mlp.down_proj.weight"]
        monkeypatch.setattr(checkpoints, "_gguf_names", lambda *_: names)
        llama_gguf(path, model=make("llama", num_key_value_heads=2, intermediate_size=64))
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
            load_model(str(path), device="cpu", streamed=True)
