"""Passage use: where a passage enters the answer, and where the read-out is changed by what the model stores.

The registry imports this method by name; no other method does.
"""

from analyses.passage_use.analysis import PassageUse

__all__ = ["PassageUse"]
