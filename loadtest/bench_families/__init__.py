"""Decode of mixtures, hybrids and latent attention as a share of the memory they touch."""
