"""Reasoning: which part of what a model writes is thought, and which is the answer."""
