"""NVFP4 on a CPU beside the machine's limits and beside llama.cpp: `make bench-cpu`. See __main__.py."""
