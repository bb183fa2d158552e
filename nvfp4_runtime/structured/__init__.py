"""Structured output: grammars that a request's tokens must follow. Torch-free; the library is imported when first needed."""
