"""Structured output: grammars that a request's tokens must follow. Torch-free; llguidance is imported when needed."""
