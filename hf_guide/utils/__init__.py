"""Utilities without knowledge of models: files, checksums, processes, labels, deprecation."""
