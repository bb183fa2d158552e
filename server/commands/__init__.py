"""The sub-commands of `nvfp4` that compute: each adds its parser and runs it. Heavy imports stay inside `run`."""
