"""Files to canonical weights: safetensors shards, one reader per dialect, and the `Checkpoint` that layers ask."""
