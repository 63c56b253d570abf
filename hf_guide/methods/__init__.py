"""The initialization methods. Importing this package registers the four built-in ones; see `register_method` for another."""

from hf_guide.calibration.config import CalibratedConfig
from hf_guide.initialization.config import InitializationConfig, renamed_options_of_method
from hf_guide.initialization.registry import (
    InitializationMethod,
    MethodOption,
    StudentSetup,
    list_methods,
    make_method,
    register_method,
)
from hf_guide.methods.calibrated import CalibratedMethod
from hf_guide.methods.guide import GuideConfig, GuideMethod
from hf_guide.methods.random import RandomConfig, RandomMethod
from hf_guide.methods.uniform import UniformConfig, UniformMethod

__all__ = [
    "CalibratedConfig",
    "CalibratedMethod",
    "GuideConfig",
    "GuideMethod",
    "InitializationConfig",
    "InitializationMethod",
    "MethodOption",
    "RandomConfig",
    "RandomMethod",
    "StudentSetup",
    "UniformConfig",
    "UniformMethod",
    "list_methods",
    "make_method",
    "register_method",
    "renamed_options_of_method",
]

register_method("guide", GuideConfig, GuideMethod)
register_method("calibrated", CalibratedConfig, CalibratedMethod)
register_method("uniform", UniformConfig, UniformMethod)
register_method("random", RandomConfig, RandomMethod)
