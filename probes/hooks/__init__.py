"""How tensors of a running module are read and replaced: forward hooks, and the attention function for its probabilities.

Imported by `probes.blocks`, `probes.models` and everything above them.
"""
