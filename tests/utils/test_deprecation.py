"""Old option names are accepted for one release, and the warning states the new one."""

import dataclasses
import pickle
from dataclasses import dataclass

import pytest

from hf_guide.errors import OptionError
from hf_guide.utils.deprecation import RenamedOptions, with_renamed_options, with_renamed_parameters

RENAMED = RenamedOptions(
    names={"heads": "head_importance"},
    values={"head_importance": {"energy": "activation"}},
    removed={"pooling": "all settings came out alike; delete it."},
)


@with_renamed_options(RENAMED)
@dataclass
class Config:
    head_importance: str = "uniform"
    width: int = 3


@with_renamed_parameters(RENAMED)
def configure(width: int = 1, *, head_importance: str = "uniform") -> tuple[int, str]:
    return width, head_importance


def test_new_names_pass_without_a_warning():
    assert Config(head_importance="activation") == Config("activation")
    assert configure(2, head_importance="activation") == (2, "activation")


def test_an_old_name_and_an_old_value_warn_with_the_new_ones():
    with pytest.warns(FutureWarning) as caught:
        config = Config(heads="energy")
    assert config.head_importance == "activation"
    messages = [str(warning.message) for warning in caught]
    assert "'heads' is deprecated; use 'head_importance'" in messages[0]
    assert "head_importance='energy' is deprecated; use 'activation'" in messages[1]
    assert all(warning.filename == __file__ for warning in caught)
    with pytest.warns(FutureWarning, match="use 'head_importance'"):
        assert configure(heads="uniform") == (1, "uniform")


def test_an_old_attribute_can_be_read():
    with pytest.warns(FutureWarning, match="use 'head_importance'"):
        assert Config("even").heads == "even"


def test_an_old_attribute_can_be_set():
    config = Config("uniform")
    with pytest.warns(FutureWarning, match="use 'head_importance'"):
        config.heads = "activation"
    assert config.head_importance == "activation"


def test_an_option_that_became_an_entry_of_another_one_moves_there():
    def move(options, value):
        options["loss_options"] = {"dkd": {"beta": value}}
        return f"loss_options={options['loss_options']}"

    renamed = RenamedOptions(moved={"dkd_beta": move})
    with pytest.warns(
        FutureWarning, match=r"Arguments: 'dkd_beta' is deprecated; use loss_options={'dkd': {'beta': 2.0}}"
    ):
        assert renamed.translate({"dkd_beta": 2.0}, "Arguments") == {"loss_options": {"dkd": {"beta": 2.0}}}


def test_both_names_at_once_and_removed_options_are_errors():
    with pytest.raises(OptionError, match="both given"):
        Config(heads="even", head_importance="even")
    with pytest.raises(OptionError, match="'pooling' was removed: all settings came out alike"):
        Config(pooling="norm")
    with pytest.raises(TypeError, match="hheads"):
        Config(hheads="even")


def test_a_decorated_dataclass_is_still_one():
    config = Config("activation", width=5)
    assert [field.name for field in dataclasses.fields(config)] == ["head_importance", "width"]
    assert dataclasses.replace(config, width=6) == Config("activation", 6)
    assert pickle.loads(pickle.dumps(config)) == config
