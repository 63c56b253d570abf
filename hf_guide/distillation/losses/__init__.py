"""Losses of a student: the built-in ones are registered here."""

from hf_guide.distillation.losses import divergences, features, similarity  # noqa: F401
