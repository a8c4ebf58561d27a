"""Models: configuration, layers, families, sources of weights, and loading. Plain torch, the cache an argument."""
