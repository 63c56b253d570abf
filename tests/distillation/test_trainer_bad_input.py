"""What cannot be distilled is an error before the first step, which states what to do."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_guide import DistillationArguments, DistillationTrainer, capture_teacher
from hf_guide.distillation.losses.registry import register_loss
from hf_guide.errors import CaptureError, HfGuideError, OptionError, TaskError, TeacherError, VocabularyError
from tests.distillation.small import collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments

ARGUMENTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"losses": "kdd"}, ["'kdd'", "Did you mean 'kd'"]),
    ({"losses": {"kd": -1.0}}, ["'kd'", "from 0 to", "-1.0"]),
    ({"losses": {"kd": 0.0, "ce": 0.0}}, ["sum to zero"]),
    ({"losses": '{"kd": 0.5'}, ["not JSON"]),
    ({"losses": {"kd": float("nan")}}, ["'kd'", "nan"]),
    ({"temperature": 0.0}, ["temperature", "from 0.001 to 1000", "0.0"]),
    ({"temperature": -2.0}, ["temperature", "from 0.001 to 1000"]),
    ({"kd_loss_type": "forward-kl"}, ["'forward-kl'", "Did you mean 'forward_kl'?"]),
    ({"kd_loss_type": "jsd", "beta": 1.0}, ["beta", "above 0 and below 1", "reverse_kl"]),
    ({"layer_mapping": "[1, 2]"}, ["layer_mapping", "mapping"]),
    ({"teacher_weights": [0, 0]}, ["sum to zero"]),
    ({"loss_chunk_size": 0}, ["loss_chunk_size", "at least 1"]),
    ({"teacher": "a", "teacher_cache": "b"}, ["teacher and teacher_cache"]),
]


@pytest.mark.parametrize(("wrong", "words"), ARGUMENTS)
def test_options_that_cannot_be(wrong: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        arguments(tmp_path, **wrong)
    assert all(word in str(caught.value) for word in words), caught.value


def lonely(folder: Path) -> Any:
    return DistillationTrainer(llama(1), arguments(folder, losses="kd"), collate, examples_for("causal-lm"))


def itself(folder: Path) -> Any:
    student = llama(1)
    return DistillationTrainer(student, arguments(folder, losses="kd"), collate, teacher=student)


def given(task: str, teacher: Any, **changes: Any) -> Callable[[Path], Any]:
    return lambda folder: DistillationTrainer(
        model_for(task, 1),
        arguments(folder, **({"losses": "kd"} | changes)),
        collate,
        examples_for(task),
        teacher=teacher(),
    )


def several_labels(folder: Path) -> Any:
    student = model_for("sequence-classification", 1)
    student.config.problem_type = "multi_label_classification"
    return DistillationTrainer(student, arguments(folder, losses="dkd"), collate, teacher=copy.deepcopy(student))


def named(folder: Path) -> Any:
    return DistillationTrainer("some/student", arguments(folder), collate, teacher=llama(2))  # type: ignore[arg-type]


def two_classes(folder: Path) -> Any:
    student = model_for("sequence-classification", 1)
    student.config.num_labels = 2
    return DistillationTrainer(student, arguments(folder, losses="dkd"), collate, teacher=copy.deepcopy(student))


def virtual_tokens(folder: Path) -> Any:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return DistillationTrainer(llama(1), arguments(folder), collate, teacher=llama(2), peft_config=config)


def renamed(names: list[str]) -> Any:
    model = model_for("sequence-classification", 2)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    return model


INVALID_CALLS: list[tuple[Callable[[Path], Any], type[HfGuideError], list[str]]] = [
    (lonely, OptionError, ["kd need a teacher"]),
    (itself, OptionError, ["the student itself", "copy.deepcopy"]),
    (named, OptionError, ["'some/student'", "AutoModelFor"]),
    (two_classes, TaskError, ["'dkd'", "has 2", "'kd'"]),
    (virtual_tokens, OptionError, ["PROMPT_TUNING", "virtual tokens", "LORA"]),
    (given("causal-lm", lambda: model_for("masked-lm", 2)), TaskError, ["masked-lm", "causal-lm"]),
    (
        given("sequence-classification", lambda: model_for("image-classification", 2)),
        TaskError,
        ["image-classification"],
    ),
    (given("causal-lm", lambda: llama(2, vocab_size=70)), VocabularyError, ["61", "70"]),
    (given("causal-lm", lambda: llama(2), losses="dkd"), TaskError, ["'dkd'", "causal-lm"]),
    (several_labels, TaskError, ["multi_label_classification", "'dkd'", "use 'kd' or 'features'"]),
    (given("causal-lm", lambda: [llama(2)], teacher_weights=[1, 2]), OptionError, ["2 teacher_weights for 1"]),
    (
        given("causal-lm", lambda: llama(2), losses="hidden_states", layer_mapping={5: 1}),
        OptionError,
        ["layer 5", "0 to 2"],
    ),
    (given("causal-lm", lambda: 7), OptionError, ["found int 7"]),
    (given("causal-lm", lambda: LlamaForCausalLM), OptionError, ["found the class LlamaForCausalLM"]),
    (given("causal-lm", LlamaConfig), OptionError, ["found a LlamaConfig"]),
    (given("causal-lm", list), OptionError, ["no teacher in the sequence"]),
    (given("causal-lm", lambda: "no/such-teacher"), TeacherError, ["no/such-teacher"]),
    (given("causal-lm", lambda: llama(2), use_liger_kernel=True), OptionError, ["use_liger_kernel"]),
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize(("make", "error", "words"), INVALID_CALLS)
def test_trainers_that_cannot_be(
    make: Callable[[Path], Any], error: type[HfGuideError], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        make(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_plain_training_arguments_are_an_error(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(OptionError, match="must be DistillationArguments.*found TrainingArguments"):
        DistillationTrainer(llama(1), TrainingArguments(str(tmp_path)), teacher=llama(2))  # type: ignore[arg-type]


def test_labels_are_aligned_by_name_or_an_error(tmp_path: Path) -> None:
    task, names = "sequence-classification", ["a", "b", "c", "d", "e"]
    student, turned = renamed(names), renamed(names[::-1])
    kept = copy.deepcopy(student)
    examples = examples_for(task)

    def first_loss(teacher: Any) -> float:
        trainer = DistillationTrainer(
            copy.deepcopy(kept), arguments(tmp_path, losses="kd"), collate, examples, teacher=teacher
        )
        trainer.train()
        return trainer.state.log_history[0]["kd"]

    with torch.no_grad():
        same = copy.deepcopy(turned)
        same.classifier.weight.copy_(turned.classifier.weight.flip(0))
        same.classifier.bias.copy_(turned.classifier.bias.flip(0))
    same.config.id2label, same.config.label2id = kept.config.id2label, kept.config.label2id
    assert first_loss(turned) == pytest.approx(first_loss(same), rel=1e-6)
    with pytest.raises(VocabularyError) as caught:
        first_loss(renamed([*names[:4], "f"]))
    assert "[a, b, c, d, e]" in str(caught.value) and "[a, b, c, d, f]" in str(caught.value)


def test_nan_of_a_teacher_is_an_error_with_the_example_and_the_step(tmp_path: Path) -> None:
    teacher = llama(2)
    bad = examples_for("causal-lm")[3]["input_ids"][0]
    with torch.no_grad():
        teacher.model.embed_tokens.weight[bad] = float("nan")
    trainer = DistillationTrainer(
        llama(1), arguments(tmp_path, losses="kd"), collate, examples_for("causal-lm"), teacher=teacher
    )
    with pytest.raises(TeacherError, match=r"NaN or infinity for \d+ of 8 examples at step 0.*begins with the tokens"):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_or_infinity_of_a_classifier_is_an_error(value: float, tmp_path: Path) -> None:
    task = "sequence-classification"
    teacher = model_for(task, 2)

    def spoil(_: Any, __: Any, outputs: Any) -> None:
        outputs.logits[1, 2] = value

    teacher.register_forward_hook(spoil)
    trainer = DistillationTrainer(
        model_for(task, 1), arguments(tmp_path, losses="kd"), collate, examples_for(task), teacher=teacher
    )
    with pytest.raises(TeacherError, match="for 1 of 8 examples at step 0: the first is number 1"):
        trainer.train()


def test_a_teacher_may_rule_classes_out(tmp_path: Path) -> None:
    teacher = model_for("sequence-classification", 2)
    with torch.no_grad():
        teacher.classifier.bias[2] = -math.inf
    trainer = DistillationTrainer(
        model_for("sequence-classification", 1),
        arguments(tmp_path, losses="kd"),
        collate,
        examples_for("sequence-classification"),
        teacher=teacher,
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["kd"])


def test_projections_missing_in_the_users_optimizer_are_an_error(tmp_path: Path) -> None:
    def begun() -> tuple[DistillationTrainer, torch.optim.Optimizer]:
        student = llama(1)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        trainer = DistillationTrainer(
            student,
            arguments(tmp_path, losses="hidden_states"),
            collate,
            examples_for("causal-lm"),
            teacher=llama(2, width=48),
            optimizers=(optimizer, None),
        )
        return trainer, optimizer

    trainer, _ = begun()
    with pytest.raises(OptionError, match="trainer.distillation_objective.projections.parameters"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer, optimizer = begun()
    maps = trainer.distillation_objective.projections
    before = [value.clone() for value in maps.parameters()]
    optimizer.add_param_group({"params": list(maps.parameters())})
    trainer.train()
    assert all(not torch.equal(old, new) for old, new in zip(before, maps.parameters(), strict=True))


def test_arguments_keep_secrets_from_those_who_print_and_report_them(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        hub_token="hf_mine",
        teacher_init_kwargs={"token": "hf_theirs", "dtype": torch.bfloat16},
        student_init_kwargs={"hidden_size": 16, "token": "hf_theirs"},
    )
    for text in (str(args), repr(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_mine" not in text and "hf_theirs" not in text and "bfloat16" in text
    assert args.teacher_init_kwargs == {"token": "hf_theirs", "dtype": torch.bfloat16}


def test_what_trainer_pickles_has_no_token_of_the_teacher(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path / "teacher")
    args = arguments(tmp_path / "run", losses="kd", teacher_init_kwargs={"token": "hf_secret"})
    trainer = DistillationTrainer(
        llama(1), args, collate, examples_for("causal-lm"), teacher=str(tmp_path / "teacher")
    )
    trainer.save_model(str(tmp_path / "student"))
    assert b"hf_secret" not in (tmp_path / "student" / "training_args.bin").read_bytes()
    assert trainer.args.teacher_init_kwargs == {"token": "hf_secret"}, "the run itself keeps it"


def test_a_batch_without_labels_is_an_error_with_the_task_loss(tmp_path: Path) -> None:
    unlabelled = [
        {name: value for name, value in example.items() if name != "labels"} for example in examples_for("causal-lm")
    ]
    trainer = DistillationTrainer(
        llama(1), arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}), collate, unlabelled, teacher=llama(2)
    )
    with pytest.raises(TaskError, match=r"'ce'.*no labels.*DataCollatorForLanguageModeling\(tokenizer, mlm=False\)"):
        trainer.train()
    DistillationTrainer(llama(1), arguments(tmp_path, losses="kd"), collate, unlabelled, teacher=llama(2)).train()


@pytest.mark.parametrize(
    ("task", "names", "dropped", "expected"),
    [
        (
            "causal-lm",
            ["targets"],
            (),
            r"label_names is \['targets'\], but the batch has 'labels'.*Leave label_names out",
        ),
        (
            "causal-lm",
            ["targets"],
            ("labels",),
            r"no targets; it has.*DataCollatorForLang.*, and leave label_names.*'labels'",
        ),
        (
            "sequence-classification",
            ["label"],
            (),
            r"\['label'\], but the batch has 'labels'.*label_names=\['labels'\]",
        ),
    ],
)
def test_the_advice_on_labels_follows_what_the_batch_has(
    task: str, names: list[str], dropped: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    examples = [
        {name: value for name, value in example.items() if name not in dropped} for example in examples_for(task)
    ]
    args = arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}, label_names=names)
    student, teacher = (model_for(task, seed) for seed in (1, 2))
    with pytest.raises(TaskError, match=expected) as raised:
        DistillationTrainer(student, args, collate, examples, teacher=teacher).train()
    assert dropped or "DataCollator" not in str(raised.value), "the batch has labels"


def test_signal_caches_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    examples = examples_for("causal-lm")
    folder = tmp_path / "capture"
    capture = capture_teacher(
        llama(2), examples, folder, data_collator=collate, config={"top_k": 4}, show_progress=False
    )

    def make(**changes: Any) -> DistillationTrainer:
        data = changes.pop("data", examples)
        return DistillationTrainer(
            llama(1), arguments(tmp_path, **({"losses": "kd"} | changes)), collate, data, teacher=capture
        )

    with pytest.raises(CaptureError, match="temperature=3.0 was not captured"):
        make(temperature=3.0)
    with pytest.raises(OptionError, match="The signal cache has no hidden_1"):
        make(losses="hidden_states")
    with pytest.raises(CaptureError, match="not in .*capture.*masked at random"):
        make(data=examples_for("causal-lm", 16, seed=8)).train()
    with pytest.raises(TaskError, match="causal-lm"):
        DistillationTrainer(model_for("masked-lm", 1), arguments(tmp_path, losses="kd"), collate, teacher=capture)
    with pytest.raises(VocabularyError):
        DistillationTrainer(llama(1, vocab_size=70), arguments(tmp_path, losses="kd"), collate, teacher=capture)
    shard = next(folder.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CaptureError, match=shard.name):
        DistillationTrainer(llama(1), arguments(tmp_path, losses="kd", teacher_cache=str(folder)), collate, examples)


def test_a_loss_is_registered_once() -> None:
    with pytest.raises(OptionError, match="A loss 'kd' is registered already"):
        register_loss("kd", requires="logits")
    with pytest.raises(OptionError, match="requires='logit' is not known.*Did you mean 'logits'"):
        register_loss("mine", requires="logit")


def test_arguments_survive_json(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, losses='{"ce": 0.5, "kd": 0.5}', layer_mapping='{"1": 2}', teacher_init_kwargs='{"dtype": "auto"}'
    )
    assert args.loss_weights == {"ce": 0.5, "kd": 0.5} and args.layer_mapping == {1: 2}
    (tmp_path / "args.json").write_text(
        json.dumps({"output_dir": str(tmp_path), "losses": {"kd": 1.0}, "temperature": 2})
    )
    from transformers import HfArgumentParser

    (read,) = HfArgumentParser(DistillationArguments).parse_json_file(str(tmp_path / "args.json"))  # type: ignore[arg-type]
    assert read.loss_weights == {"kd": 1.0} and read.temperature == 2


@pytest.mark.parametrize("named", ["folder", "path", "list", "mapping", "loaded", "link", "file"])
def test_an_output_dir_that_the_student_would_overwrite_is_an_error(named: str, tmp_path: Path) -> None:
    """Saving into the teacher's folder would replace the teacher by its student."""
    folder = tmp_path / "teacher"
    llama(2).save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    teacher: Any = {"path": folder, "list": [str(folder)], "loaded": type(llama(2)).from_pretrained(folder)}.get(
        named, str(folder)
    )
    output, model, words = folder, llama(1), "output_dir .* is the folder of the teacher"
    if named == "mapping":
        teacher, model = llama(3), {"teacher": str(folder), "num_hidden_layers": 1}
    if named == "link":
        output = tmp_path / "link"
        output.symlink_to(folder)
    if named == "file":
        output, words = folder / "config.json", "is a file"
    with pytest.raises(OptionError, match=words):
        DistillationTrainer(model, arguments(output), collate, examples_for("causal-lm"), teacher=teacher)
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_output_dir_within_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        DistillationTrainer(
            llama(1), arguments(tmp_path / "file" / "out"), collate, examples_for("causal-lm"), teacher=llama(2)
        )


def test_an_output_dir_in_the_signal_cache_is_an_error(tmp_path: Path) -> None:
    capture = capture_teacher(
        llama(2), examples_for("causal-lm"), tmp_path / "capture", data_collator=collate, config={"top_k": 4}
    )
    with pytest.raises(OptionError, match="output_dir .* is the folder of the signal cache"):
        DistillationTrainer(llama(1), arguments(capture.folder), collate, examples_for("causal-lm"), teacher=capture)
