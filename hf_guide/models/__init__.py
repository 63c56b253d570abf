"""Parts and properties of a model: heads, layers, adapters, files, tiny models."""
