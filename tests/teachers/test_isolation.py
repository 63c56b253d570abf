"""A teacher is apart from its student: the two share no parameter, whatever is wrapped around them, or it is an error."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_guide import DistillationTrainer, capture_teacher
from hf_guide.errors import HfGuideError, OptionError, TeacherError
from hf_guide.modeling import from_teacher
from tests.distillation.small import collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of second adapters and of tied embeddings

TIED = {"tie_word_embeddings": True, "attention_dropout": 0.1}


def lora(model: Any, name: str = "default") -> Any:
    return peft.get_peft_model(model, lora_config(), adapter_name=name)


def lora_config() -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def itself() -> tuple[Any, Any, Any]:
    model = llama(1, **TIED)
    return model, model, None


def its_base_before_the_adapter() -> tuple[Any, Any, Any]:
    model = llama(1, **TIED)
    return model, model, lora_config()


def its_base() -> tuple[Any, Any, Any]:
    model = llama(1, **TIED)
    return lora(model), model, None


def an_adapter_on_it() -> tuple[Any, Any, Any]:
    model = llama(1, **TIED)
    return model, lora(model), None


def two_adapters_on_one_base() -> tuple[Any, Any, Any]:
    model = llama(1, **TIED)
    return lora(model, "student"), lora(model, "teacher"), None


def its_embeddings() -> tuple[Any, Any, Any]:
    student, teacher = llama(1, **TIED), llama(2, **TIED)
    student.set_input_embeddings(teacher.get_input_embeddings())
    return student, teacher, None


def a_view_of_its_weight() -> tuple[Any, Any, Any]:
    student, teacher = llama(1), llama(2)
    teacher.lm_head.weight.data = student.lm_head.weight.data[:]
    return student, teacher, None


def one_of_its_blocks() -> tuple[Any, Any, Any]:
    student, teacher = llama(1), llama(2)
    teacher.model.layers[1] = student.model.layers[0]
    return student, teacher, None


def in_a_list() -> tuple[Any, Any, Any]:
    model = llama(1, **TIED)
    return model, [llama(2), model], lora_config()


def a_module_without_parameters() -> tuple[Any, Any, Any]:
    student, teacher = llama(1), llama(2)
    student.dropout = teacher.dropout = nn.Dropout()
    return student, teacher, None


SHARED = [
    itself,
    its_base_before_the_adapter,
    its_base,
    an_adapter_on_it,
    two_adapters_on_one_base,
    its_embeddings,
    a_view_of_its_weight,
    one_of_its_blocks,
    in_a_list,
    a_module_without_parameters,
]


def state_of(model: nn.Module) -> list[Any]:
    """Return what a trainer could change of a model without a word."""
    return [
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [(name, module.training) for name, module in model.named_modules()],
    ]


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.__name__)
@pytest.mark.parametrize("by", ["model", "model_init"])
def test_a_teacher_that_shares_a_parameter_with_the_student_is_an_error(
    case: Callable[[], Any], by: str, tmp_path: Path
) -> None:
    student, teacher, adapter = case()
    student.train()
    models = [student, *(teacher if isinstance(teacher, list) else [teacher])]
    before = [state_of(model) for model in models]
    given = {"model": student} if by == "model" else {"model_init": lambda: student}
    with pytest.raises(OptionError, match=r"(the student itself|shares \d+ of its tensors).*copy\.deepcopy"):
        DistillationTrainer(
            **given,
            args=arguments(tmp_path),
            data_collator=collate,
            train_dataset=examples_for("causal-lm"),
            teacher=teacher,
            peft_config=adapter,
        )
    if by == "model" or adapter is None:  # a model that model_init made has its adapter by then
        assert [state_of(model) for model in models] == before


@pytest.mark.parametrize("kind", ["XLM", "Flaubert"])
def test_models_that_call_one_activation_are_apart(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(vocab_size=61, emb_dim=32, n_layers=2, n_heads=4)
    student, teacher = (getattr(transformers, f"{kind}WithLMHeadModel")(config) for _ in range(2))
    assert student.transformer.ffns[0].act is teacher.transformer.ffns[0].act
    data = examples_for("masked-lm", 4)
    args = arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}, max_steps=1)
    trainer = DistillationTrainer(student, args, collate, data, data, teacher=teacher)
    trainer.train()
    assert trainer.evaluate()["eval_kd"] > 0


def test_a_copy_made_before_the_adapter_teaches_the_adapter_alone(tmp_path: Path) -> None:
    model = llama(1, **TIED)
    teacher = copy.deepcopy(model)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = lora(model)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, losses="kd", max_steps=3, learning_rate=0.1),
        collate,
        examples_for("causal-lm"),
        teacher=teacher,
    )
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    start = {name: student.get_parameter(name).detach().clone() for name in trained}
    trainer.train()
    assert all(not torch.equal(student.get_parameter(name), start[name]) for name in trained)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())


def test_each_trial_of_a_search_is_apart_from_the_teacher(tmp_path: Path) -> None:
    teacher = llama(2)
    made = [llama(1), teacher]
    trainer = DistillationTrainer(
        args=arguments(tmp_path),
        data_collator=collate,
        train_dataset=examples_for("causal-lm"),
        model_init=lambda: made.pop(0),
        teacher=teacher,
    )
    with pytest.raises(OptionError, match="the student itself"):
        trainer.model = trainer.call_model_init()
        trainer._setup_objective()


def test_teachers_with_adapters_on_one_base_are_errors_and_teachers_without_may_share(tmp_path: Path) -> None:
    def trainer(*teachers: Any) -> DistillationTrainer:
        data = examples_for("causal-lm")
        return DistillationTrainer(llama(1), arguments(tmp_path), collate, data, teacher=list(teachers))

    base = llama(2)
    twin = llama(3)
    twin.set_input_embeddings(base.get_input_embeddings())
    assert len(trainer(base, twin, base).teachers) == 3
    with pytest.raises(OptionError, match="Two teachers have adapters on one base model"):
        trainer(base, lora(base))
    with pytest.raises(OptionError, match="Two teachers have adapters on one base model"):
        trainer(lora(base, "second"), lora(base, "third"))
    assert len(trainer(lora(llama(2)), lora(llama(2))).teachers) == 2


def frozen(folder: Path) -> Any:
    return llama(1).requires_grad_(False)


def adapter_for_inference(folder: Path) -> Any:
    lora(llama(1)).save_pretrained(folder / "adapter")
    return peft.PeftModel.from_pretrained(llama(1), folder / "adapter")


def compiled(folder: Path) -> Any:
    return torch.compile(llama(1))


def with_a_compiled_block(folder: Path) -> Any:
    model = llama(1)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def in_data_parallel(folder: Path) -> Any:
    return nn.DataParallel(llama(1))


def parametrized(folder: Path) -> Any:
    model = llama(1)
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def spectral(folder: Path) -> Any:
    model = llama(1)
    nn.utils.parametrizations.spectral_norm(model.model.layers[0].mlp.up_proj)
    return lora(model)


UNTRAINABLE = {
    frozen: "No parameter of the student is trainable",
    adapter_for_inference: "is_trainable=True",
    compiled: "torch_compile=True",
    with_a_compiled_block: "model.layers.0 .*torch_compile=True",
    in_data_parallel: "DataParallel.*accelerate launch",
    parametrized: "lm_head.*remove_parametrizations",
    spectral: "up_proj.*remove_parametrizations",
}


@pytest.mark.parametrize("make", UNTRAINABLE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("by", ["model", "model_init"])
def test_a_student_that_cannot_be_trained_as_it_is_is_an_error(
    make: Callable[[Path], Any], by: str, tmp_path: Path
) -> None:
    student = make(tmp_path)
    given = {"model": student} if by == "model" else {"model_init": lambda: student}
    with pytest.raises(OptionError, match=UNTRAINABLE[make]):
        DistillationTrainer(
            **given,
            args=arguments(tmp_path),
            data_collator=collate,
            train_dataset=examples_for("causal-lm"),
            teacher=llama(2),
        )


def test_a_frozen_student_can_be_evaluated(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = DistillationTrainer(
        frozen(tmp_path), args, collate, eval_dataset=examples_for("causal-lm"), teacher=llama(2)
    )
    assert trainer.evaluate()["eval_kd"] > 0


@pytest.mark.parametrize(
    ("make", "reason"), [(compiled, r"its own `compile\(\)`"), (in_data_parallel, "DataParallel")]
)
def test_a_wrapped_teacher_is_an_error(make: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"The teacher is .*{reason}"):
        DistillationTrainer(llama(3), arguments(tmp_path), collate, examples_for("causal-lm"), teacher=make(tmp_path))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_parametrized_teacher_teaches_what_it_computes(norm: str, tmp_path: Path) -> None:
    data, found = examples_for("causal-lm"), []
    for removed in (False, True):
        teacher = llama(2).eval()
        getattr(nn.utils.parametrizations, norm)(teacher.lm_head)
        if removed:
            nn.utils.parametrize.remove_parametrizations(teacher.lm_head, "weight")
        args = arguments(tmp_path, losses="kd")
        trainer = DistillationTrainer(llama(1), args, collate, eval_dataset=data, teacher=teacher)
        found.append(trainer.evaluate()["eval_kd"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def a_second_adapter(folder: Path) -> Any:
    return DistillationTrainer(lora(llama(1)), arguments(folder), collate, teacher=llama(2), peft_config=lora_config())


def a_mapping_as_peft_config(folder: Path) -> Any:
    return DistillationTrainer(llama(1), arguments(folder), collate, teacher=llama(2), peft_config={"r": 2})


def made_of_an_adapted_teacher(folder: Path) -> Any:
    return DistillationTrainer({"num_hidden_layers": 1}, arguments(folder), collate, teacher=lora(llama(2)))


def from_an_adapted_teacher(folder: Path) -> Any:
    return from_teacher(lora(llama(2)), num_hidden_layers=1)


def from_what_an_adapter_was_put_into(folder: Path) -> Any:
    base = llama(2)
    lora(base)
    return from_teacher(base, num_hidden_layers=1)


def from_a_model_with_a_compiled_head(folder: Path) -> Any:
    teacher = llama(2)
    teacher.lm_head = torch.compile(teacher.lm_head)
    return from_teacher(teacher, num_hidden_layers=1)


def from_a_parametrized_model(folder: Path) -> Any:
    return from_teacher(parametrized(folder), num_hidden_layers=1)


def from_virtual_tokens(folder: Path) -> Any:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return from_teacher(peft.get_peft_model(llama(2), config), num_hidden_layers=1)


def prompt_tuned(task: str = "causal-lm") -> Any:
    kind = "SEQ_CLS" if task == "sequence-classification" else "CAUSAL_LM"
    return peft.get_peft_model(model_for(task, 2), peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=3))


def taught_by_virtual_tokens(folder: Path) -> Any:
    return DistillationTrainer(llama(1), arguments(folder), collate, teacher=prompt_tuned())


def embeddings_behind_virtual_tokens(folder: Path) -> Any:
    task = "sequence-classification"
    args = arguments(folder, losses="features")
    return DistillationTrainer(model_for(task, 1), args, collate, teacher=prompt_tuned(task))


def captured_behind_virtual_tokens(folder: Path) -> Any:
    data = examples_for("causal-lm")
    return capture_teacher(prompt_tuned(), data, folder / "capture", data_collator=collate, show_progress=False)


def an_adapter_without_a_base(folder: Path) -> Any:
    lora(llama(2)).save_pretrained(folder / "adapter")
    return DistillationTrainer(llama(1), arguments(folder), collate, teacher=folder / "adapter")


WITH_REASON: dict[Callable[[Path], Any], tuple[type[HfGuideError], str]] = {
    a_second_adapter: (OptionError, "has an adapter already"),
    a_mapping_as_peft_config: (OptionError, "LoraConfig; found dict"),
    made_of_an_adapted_teacher: (TeacherError, "adapter.*merge_and_unload"),
    from_an_adapted_teacher: (TeacherError, "adapter.*merge_and_unload"),
    from_what_an_adapter_was_put_into: (TeacherError, "adapter.*merge_and_unload"),
    from_a_model_with_a_compiled_head: (TeacherError, "lm_head.weight.*torch.compile"),
    from_a_parametrized_model: (TeacherError, "lm_head.*remove_parametrizations"),
    from_virtual_tokens: (TeacherError, "adapter"),
    an_adapter_without_a_base: (TeacherError, "does not name its base model.*PeftModel.from_pretrained"),
    taught_by_virtual_tokens: (OptionError, "PROMPT_TUNING.*the teacher's outputs"),
    embeddings_behind_virtual_tokens: (OptionError, "PROMPT_TUNING.*the teacher's outputs"),
    captured_behind_virtual_tokens: (OptionError, "PROMPT_TUNING.*the teacher's outputs"),
}


@pytest.mark.parametrize("make", WITH_REASON, ids=lambda make: make.__name__)
def test_what_an_adapter_makes_impossible_is_an_error_with_the_reason(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    kind, reason = WITH_REASON[make]
    with pytest.raises(kind, match=reason):
        make(tmp_path)


def test_prefixes_and_a_classifiers_virtual_tokens_teach_what_the_model_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for task, teacher in (
        ("causal-lm", peft.get_peft_model(llama(2), prefix)),
        ("sequence-classification", prompt_tuned("sequence-classification")),
    ):
        data, student = examples_for(task, 8), model_for(task, 1)
        args = arguments(tmp_path, losses="kd")
        trainer = DistillationTrainer(student, args, collate, eval_dataset=data, teacher=teacher)
        found = trainer.evaluate()["eval_kd"]
        batch = collate(data)
        with torch.no_grad():
            q, p = (model(**batch).logits.log_softmax(-1) for model in (student.eval(), teacher.eval()))
        if task == "causal-lm":
            q, p = (each[:, :-1][batch["labels"][:, 1:] != -100] for each in (q, p))
        expected = nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
        assert found == pytest.approx(expected, rel=1e-4)
