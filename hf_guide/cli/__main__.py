"""`python -m hf_guide.cli`: the command line, as `hf-guide`."""

from hf_guide.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
