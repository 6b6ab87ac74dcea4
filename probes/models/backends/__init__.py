"""One file a backend: the same points read and written on native, TransformerLens, nnsight, remote and streamed models.

Imported by `probes.models.interop` and `probes.models.load`; everything else sees the `Model` protocol.
"""
