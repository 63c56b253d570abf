"""Options about models and data are checked, and the names of the previous release are accepted with a warning."""

import pytest

from hf_guide.data.arguments import DataArguments, ModelArguments
from hf_guide.errors import OptionError


@pytest.mark.parametrize(
    "old, value, new, expected",
    [
        ("dataset", "org/data", "dataset_name", "org/data"),
        ("train_split", "train[:10]", "dataset_train_split", "train[:10]"),
        ("eval_split", "test", "dataset_test_split", "test"),
        ("validation_share", 0.2, "validation_split_percentage", 20.0),
        ("validation_share", "5e-2", "validation_split_percentage", 5.0),
        ("validation_seed", 3, "validation_split_seed", 3),
        ("pack", False, "packing", False),
        ("mask_once", True, "static_masking", True),
        ("max_train_examples", 5, "max_train_samples", 5),
        ("max_eval_examples", 6, "max_eval_samples", 6),
    ],
)
def test_an_old_option_warns_with_the_new_name(old, value, new, expected):
    dataset = {} if old == "dataset" else {"dataset_name": "org/data"}
    with pytest.warns(FutureWarning, match=f"'{old}' is deprecated; use '{new}'"):
        assert getattr(DataArguments(**dataset, **{old: value}), new) == expected


def test_the_old_name_of_the_processing_class_warns_with_the_new_one():
    with pytest.warns(FutureWarning, match="use 'processing_class_name_or_path'"):
        assert ModelArguments(processor_name_or_path="org/model").processing_class_name_or_path == "org/model"


def test_an_option_under_both_names_is_an_error():
    with pytest.raises(OptionError, match="both given; keep 'dataset_name'"):
        DataArguments(dataset="a", dataset_name="b")


@pytest.mark.parametrize("percentage", [5, 5.0, 20, 25, 0.1])
def test_a_percentage_is_the_fraction_that_its_old_option_was(percentage):
    with pytest.warns(FutureWarning):
        old = DataArguments("org/data", validation_share=percentage / 100)
    assert old.validation_split_percentage == percentage


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'causal-lm'"):
        ModelArguments(task="causal_lm")


@pytest.mark.parametrize("option", ["packing", "assistant_only_loss", "completion_only_loss"])
def test_an_option_that_is_no_truth_value_is_an_error(option):
    with pytest.raises(OptionError, match=f"{option} must be True or False; found 'false'"):
        DataArguments("org/data", **{option: "false"})
