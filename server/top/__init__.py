"""`nvfp4 top`: a terminal view of a running server."""
