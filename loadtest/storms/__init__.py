"""What a server must outlast, each with a verdict: `python -m loadtest.storms NAME [--short] [--json FILE]`."""
