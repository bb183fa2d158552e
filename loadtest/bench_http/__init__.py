"""What the HTTP layer costs: `python -m loadtest.bench_http`."""
