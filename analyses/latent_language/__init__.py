"""Latent languages: which language the layers between prompt and answer would write."""

from analyses.latent_language.analysis import LatentLanguage

__all__ = ["LatentLanguage"]
