"""The legal choices when a model is loaded; imports nothing, so that a command line can list them at once."""

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
