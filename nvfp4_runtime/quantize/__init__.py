"""Making NVFP4 checkpoints: recipes, calibration, quantising, export, and the embedded default model."""
