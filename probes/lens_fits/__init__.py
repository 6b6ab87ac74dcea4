"""Lenses that need the model's blocks: the Jacobian lens's estimator and its fit over many texts, and Patchscopes."""
