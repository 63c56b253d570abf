"""Layouts: what the axes of the parameters of a family mean."""
