"""From a reference to files on disk: hub ids, folders, GGUF files and bundled models, and the digest of their weights.

Imported by the rest of `probes.models`.
"""
