"""Analysis of pseudo-subclasses: features, a report, and a probe that decides before training whether they help."""
