"""hf_guide: small Transformers models made out of big ones."""

__version__ = "0.1.0"
