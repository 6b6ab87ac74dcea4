"""Communication channels: low-rank subspaces through which an attention head writes what a later head reads."""

from analyses.communication_channels.analysis import CommunicationChannels

__all__ = ["CommunicationChannels"]
