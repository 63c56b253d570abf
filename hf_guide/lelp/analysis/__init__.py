"""Analysis of pseudo-subclasses: features, a report, and an estimate of their gain before training."""
