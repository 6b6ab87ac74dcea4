"""Communication channels: low-rank subspaces through which an attention head writes what a later head reads.

The registry imports this method by name; no other method does.
"""

from analyses.communication_channels.analysis import CommunicationChannels

__all__ = ["CommunicationChannels"]
