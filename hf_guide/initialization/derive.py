"""Layouts of families that are not in the table: derived where that is certain, refused where it is not."""

from transformers import PreTrainedConfig

from hf_guide.errors import LayoutError, did_you_mean
from hf_guide.initialization.layouts import Layout, registered_layouts, variant_for


def layout_for(config: PreTrainedConfig) -> Layout:
    """Return the layout of a config's family.

    Raises:
        LayoutError: the family is not registered and cannot be derived with certainty.
    """
    layouts = registered_layouts()
    if config.model_type in layouts:
        return variant_for(layouts[config.model_type], config)
    raise LayoutError(f"No layout is known for {config.model_type!r}.{did_you_mean(config.model_type, layouts)} Add one with hf_guide.register_layout.")
