"""Distillation: the trainer, its arguments, its losses and their scaling."""
