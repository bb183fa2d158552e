"""Several servers, or one model in several precisions, under the same load: speed, memory, quality, and a verdict."""
