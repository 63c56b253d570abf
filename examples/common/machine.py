"""Describe what a benchmark ran on, for the lines above its table."""

import os
import sys

import torch
import transformers


def describe_machine() -> str:
    """Return the number of processors and the versions of Python, PyTorch and Transformers."""
    return (
        f"{os.cpu_count()} processors, python {sys.version.split()[0]}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
