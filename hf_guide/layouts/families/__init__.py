"""The built-in layouts: importing this package registers them."""

import importlib

FILES = (
    "llama",
    "gemma",
    "glm",
    "olmo",
    "phi",
    "cohere",
    "stablelm",
    "gpt2",
    "gpt_neox",
    "bloom_falcon",
    "opt",
    "moe",
    "bert",
    "modernbert",
    "deberta",
    "t5",
    "bart",
    "audio",
    "vision",
    "segformer",
    "clip",
    "block_rules",
)
"""In this order: a family may be `like` one of a file before its own."""

for _file in FILES:
    importlib.import_module(f"{__name__}.{_file}")
