"""One file a backend: the same points read and written on native, TransformerLens, nnsight, remote and streamed models."""
