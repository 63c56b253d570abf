"""Example scripts, benchmarks and the quickstart; not installed with the package."""
