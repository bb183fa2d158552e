"""One NVIDIA GPU measured in one call: `make bench-gpu`. See __main__.py."""
