"""Teachers: loading them, their inputs, and their outputs."""
