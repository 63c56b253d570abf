"""Layouts of image encoders. Nothing but tables: `layouts.py` says how they are read."""
