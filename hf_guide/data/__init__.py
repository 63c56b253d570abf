"""Datasets of `hf-guide distill` and `hf-guide capture`: arguments, loading, preprocessing."""
