"""The commands of `hf-guide`, a module each.

Each has its one line of HELP, a DESCRIPTION, an EXAMPLE, `add_arguments(parser)` and `run(args)`, which returns the exit code.
They are light, so that `hf-guide --help` answers at once: what is heavy is imported where it is used.
"""
