"""The arithmetic: op contracts, backends, and the choice between them."""
