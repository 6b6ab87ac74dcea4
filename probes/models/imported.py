"""What loading a model imports, for processes that import it ahead; imports nothing itself."""

MODULES = (
    "probes.models.backends.native", "transformers.activations", "transformers.modeling_layers", "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto", "transformer_lens.factories.architecture_adapter_factory",
    "transformer_lens.model_bridge.sources._bridge_builder",
)  # fmt: skip
"""By name; importing them takes longer than a small model itself."""
