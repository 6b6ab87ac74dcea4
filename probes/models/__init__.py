"""Loaded models behind one interface, and where they come from. Imported by everything above `points`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
