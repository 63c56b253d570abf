"""Layouts of encoder-decoders. Nothing but tables: `layouts.py` says how they are read."""
