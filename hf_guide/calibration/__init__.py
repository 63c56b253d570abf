"""Calibration: collect the activations of a teacher, rank and rotate its axes by them, and refit the weights of a student."""
