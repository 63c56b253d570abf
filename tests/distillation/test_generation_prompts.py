"""Generation in evaluation of models without an encoder: the answer of a batch is that of each prompt by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, EvalPrediction

from hf_guide import OptionError, Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from hf_guide.data.image_text import ImageTextCollator
from hf_guide.distillation.generation_prompts import split_prompts
from tests.distillation.small import llama
from tests.examples.local import tokenizer
from tests.small_image_text import FAMILIES, rows

PROMPTS = [[1, 5, 7], [1, 9, 11, 6, 4, 12], [1, 8]]
ANSWERS = [[13, 2], [14, 15, 2], [16, 2]]
SIZE = 6


def text_case() -> tuple[Any, Any, Any, list[Any], list[dict[str, Any]]]:
    """Return a model, its processing class, a collator, examples, and each prompt as the model's inputs."""
    examples = [
        {
            "input_ids": [*prompt, *answer],
            "attention_mask": [1] * len(prompt + answer),
            "labels": [-100] * len(prompt) + answer,
        }
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    alone = [{"input_ids": torch.tensor([prompt])} for prompt in PROMPTS]
    return llama(2), tokenizer(), DataCollatorForSeq2Seq(tokenizer()), examples, alone


def image_case() -> tuple[Any, Any, Any, list[Any], list[dict[str, Any]]]:
    model, processor = FAMILIES["llava"].build()
    collate, examples, alone = ImageTextCollator(processor), rows(3), []
    for example in examples:
        made = collate([example])
        first = int((made["labels"][0] != -100).nonzero()[0])
        alone.append({"input_ids": made["input_ids"][:, :first], "pixel_values": made["pixel_values"]})
    return model, processor, collate, examples, alone


@pytest.mark.parametrize("case", [text_case, image_case], ids=["texts", "images"])
def test_the_answers_of_a_batch_are_those_of_each_prompt_by_itself(case: Any, tmp_path: Path) -> None:
    model, processing_class, collator, examples, alone = case()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    found: list[EvalPrediction] = []
    trainer = Seq2SeqDistillationTrainer(
        model,
        Seq2SeqDistillationArguments(
            str(tmp_path),
            losses="ce",
            predict_with_generate=True,
            generation_max_length=SIZE,
            per_device_eval_batch_size=3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        collator,
        eval_dataset=examples,
        processing_class=processing_class,
        compute_metrics=lambda predicted: found.append(predicted) or {},
    )
    metrics = trainer.evaluate()
    for number, inputs in enumerate(alone):
        prompt = inputs["input_ids"].shape[1]
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=SIZE, do_sample=False)[0, prompt:]
        assert found[0].predictions[number].tolist() == made.tolist(), number
    labels = collator(examples)["labels"]
    expected = [row[row != -100].tolist() for row in labels]
    assert [row[row != -100].tolist() for row in found[0].label_ids] == expected
    batch = {name: value for name, value in collator(examples).items()}
    with torch.no_grad():
        assert metrics["eval_ce"] == pytest.approx(model(**batch).loss.item(), rel=1e-4)


def test_the_last_answer_of_a_conversation_is_generated_and_what_has_no_prompt_is_an_error() -> None:
    ids = torch.arange(1, 9)[None]
    labels = torch.tensor([[-100, 2, 3, -100, -100, 6, 7, -100]])
    prompts = split_prompts({"input_ids": ids, "labels": labels, "pixel_values": torch.ones(1)}, llama(1))
    assert prompts is not None and prompts.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert prompts.inputs["labels"].tolist() == [[6, 7]] and "pixel_values" in prompts.inputs
    unlabeled = split_prompts({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])}, llama(1))
    assert unlabeled is not None and unlabeled.inputs["input_ids"].tolist() == [[1, 2, 3]]
    with pytest.raises(OptionError, match="every token of a row is a target"):
        split_prompts({"input_ids": ids, "labels": ids}, llama(1))
    with pytest.raises(OptionError, match="the rows have position_ids, as packed ones do"):
        split_prompts({"input_ids": ids, "labels": labels, "position_ids": ids}, llama(1))
