"""Sampling: parameters, logit processing, token choice. Pure functions of logits, params and seed."""
