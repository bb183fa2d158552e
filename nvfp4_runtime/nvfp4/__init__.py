"""The NVFP4 number format: codec, canonical weights, scale layouts."""
