"""Contextual decomposition: what part of an activation comes from chosen heads, MLPs or tokens. Imported by analyses only."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
