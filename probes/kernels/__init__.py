"""Kernels that reduce captured tensors: the reference in plain torch, and fused ones in Triton, chosen by the tensor's
device. Imported by capture and by models/verify; knows no backend.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
