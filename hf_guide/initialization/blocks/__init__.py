"""Blocks of a student: which of the teacher they come from, and the fields of a config that number them."""
