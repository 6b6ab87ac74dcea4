"""Capturing rows into the store: what is wanted, what is missing, the forwards that fill it, and reading rows back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
