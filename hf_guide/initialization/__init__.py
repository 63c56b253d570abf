"""Initialization of a student from the weights of its teacher: configuration, plan, transfer, report."""
