"""A configuration file and the flags over it accept the names of the previous release, with a warning."""

from pathlib import Path

import pytest

from hf_guide.errors import OptionError
from hf_guide.scripts.config_file import read_options
from hf_guide.scripts.distill import DATACLASSES, read_config


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(f"output_dir: {folder / 'out'}\nuse_cpu: true\nreport_to: none\n{text}")
    return path


def test_old_keys_of_a_file_warn_with_the_new_ones(tmp_path):
    path = write(tmp_path, "dataset: org/data\nvalidation_share: 2e-1\npack: false\nobjective: kd\n")
    with pytest.warns(FutureWarning) as caught:
        config = read_config(path)
    messages = " ".join(str(warning.message) for warning in caught)
    for new in ("dataset_name", "validation_split_percentage", "packing", "losses"):
        assert f"use {new!r}" in messages
    assert config.data.dataset_name == "org/data" and config.data.validation_split_percentage == 20.0
    assert config.data.packing is False and config.training.loss_weights == {"kd": 1.0}


@pytest.mark.parametrize("words", [["--max_train_examples", "7"], ["--max-train-examples=7"]])
def test_an_old_flag_overrides_the_file_and_warns(tmp_path, words):
    path = write(tmp_path, "dataset_name: org/data\nmax_train_samples: 3\n")
    with pytest.warns(FutureWarning, match="use 'max_train_samples'"):
        assert read_config(path, words).data.max_train_samples == 7
    with pytest.warns(FutureWarning, match="use 'packing'"):
        assert read_config(path, ["--no_pack"]).data.packing is False


def test_options_are_read_without_building_them_and_a_misspelt_key_names_the_nearest(tmp_path):
    assert read_options(write(tmp_path, "max_steps: 3\n"), DATACLASSES)["max_steps"] == 3
    with pytest.raises(OptionError, match="unknown key 'max_train_sample'. Did you mean 'max_train_samples'"):
        read_options(write(tmp_path, "max_train_sample: 3\n"), DATACLASSES)
