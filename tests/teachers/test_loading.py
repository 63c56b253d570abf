"""A named teacher is of the class that its config names, where a family has several for a task."""

import pytest
import torch
import transformers
from transformers import AutoConfig

from hf_guide.errors import TeacherError
from hf_guide.tasks import Task
from hf_guide.teachers.loading import load_teachers

SIZES = {"vocab_size": 16, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 16}


@pytest.mark.parametrize("name", ["XLNetForQuestionAnswering", "XLNetForQuestionAnsweringSimple"])
def test_a_named_teacher_has_the_class_of_its_config(name, tmp_path):
    torch.manual_seed(0)
    model = getattr(transformers, name)(AutoConfig.for_model("xlnet", **SIZES))
    model.save_pretrained(tmp_path)
    teacher = load_teachers(str(tmp_path), Task.QUESTION_ANSWERING)[0]
    assert type(teacher).__name__ == name
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_of_another_class_is_still_loaded_for_the_task(tmp_path):
    """Its head is not there, and the error states what a teacher is."""
    transformers.XLNetLMHeadModel(AutoConfig.for_model("xlnet", **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="must be trained for question"):
        load_teachers(str(tmp_path), Task.QUESTION_ANSWERING)
