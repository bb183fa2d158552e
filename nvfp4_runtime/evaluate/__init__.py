"""What a checkpoint's numerics cost: perplexity, and the KL divergence to a teacher, through the engine that serves."""
