"""Instruments: everything that touches a model or an activation. They know no analysis and no screen."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
