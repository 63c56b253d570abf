"""Splitters: how the examples of a class are divided into pseudo-subclasses."""
