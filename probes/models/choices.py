"""The legal choices when a model is loaded; imports nothing heavy, so that a command line can list them at once."""

from __future__ import annotations

from probes.errors import OptionError

BACKENDS = {
    "native": "probes.models.backends.native:NativeModel",
    "transformer_lens": "probes.models.backends.transformer_lens:TransformerLensModel",
    "nnsight": "probes.models.backends.nnsight:NnsightModel",
}
"""Backend to the dotted path of its class, imported on demand.

Each is called as `Backend(module, tokenizer, ref=…, weights=…, revision=…)` with the Hugging Face module.
"""
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def check_streaming(streamed: bool, backend: str, device_map: object, stream_memory: object) -> None:
    """Refuse choices that do not go with reading a model's blocks one at a time, or only with that.

    Raises:
        OptionError: says which.
    """
    if streamed and (backend != "native" or device_map is not None):
        raise OptionError("a streamed model runs on backend native, without a device map: it holds one block at a time")
    if stream_memory is not None and not streamed:
        raise OptionError("stream_memory says what a streamed model keeps in memory: load it streamed, or leave it out")


def parse_max_memory(text: str) -> dict[int | str, str]:
    """Parse sizes by device from text such as `0=20GiB,cpu=60GiB`.

    Raises:
        OptionError: text of another form.
    """
    sizes: dict[int | str, str] = {}
    for part in text.split(","):
        place, sign, size = (piece.strip() for piece in part.partition("="))
        if not sign or not (place.isdecimal() or place == "cpu"):
            raise OptionError(
                f"max memory {text!r}: write a GPU's number or cpu with its size, such as 0=20GiB,cpu=60GiB"
            )
        sizes[int(place) if place.isdecimal() else place] = size
    return sizes
