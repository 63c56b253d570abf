"""The commands of `hf-guide`, one thin module each; the work is in `scripts/` or in the packages.

Each module has HELP (one line), DESCRIPTION, EXAMPLE, `add_arguments(parser)` and `run(args)`, which returns the exit code,
and RENAMED_FLAGS if flags of the previous release have new names. Heavy modules are imported in `run`, so that --help is
fast.
"""
