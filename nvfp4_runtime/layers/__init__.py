"""Decoder layers, built from a Checkpoint and backends, called with a batch."""
