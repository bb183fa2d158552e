"""Request models in vLLM's dialect, one module per endpoint."""
