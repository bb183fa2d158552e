"""Decoders that have no implementation of ours, run by transformers' own module with our weights, kernels and cache.

The module is built without weights; its linear layers and experts become ours, its attention reads our paged cache.
"""
