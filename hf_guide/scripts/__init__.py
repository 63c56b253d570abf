"""Scripts behind the commands of `hf-guide`."""
