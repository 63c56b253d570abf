"""Chat data become examples that all have targets, the same packed or not; what is left out is counted in a warning."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BloomConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from hf_guide import DistillationArguments, DistillationTrainer
from hf_guide.chat.packing import split_packed
from hf_guide.data.arguments import DataArguments
from hf_guide.data.chat import set_chat_template
from hf_guide.data.preprocessing import ProcessedData, preprocess
from hf_guide.errors import OptionError
from hf_guide.tasks import Task
from tests.chat.small import (
    CONVERSATIONS,
    MARKED,
    PLAIN,
    TOOLS,
    VOCABULARY,
    WORDS,
    message,
    messages_reference,
    tokenizer,
)

END = WORDS.index("</s>")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers_logging.disable_propagation()


def options(**changes: Any) -> DataArguments:
    return DataArguments(**({"dataset_name": "some/data", "max_length": 24} | changes))


def processed(columns: dict[str, list[Any]], tok: Any = None, **changes: Any) -> ProcessedData:
    tok = tokenizer(PLAIN) if tok is None else tok
    return preprocess(Task.CAUSAL_LM, datasets.Dataset.from_dict(columns), None, tok, options(**changes))


def rows_of(data: Any) -> list[tuple[list[int], list[int]]]:
    """Return tokens and labels of the examples, in any order; the first label is never a target."""
    rows = [part for row in data for part in (split_packed(row) if "position_ids" in row else [row])]
    return sorted((list(row["input_ids"]), [-100, *row["labels"][1:]]) for row in rows)


PROMPTS = [
    [each for each in messages[: -1 if messages[-1]["role"] == "assistant" else -2]] for messages in CONVERSATIONS
]
COMPLETIONS = [messages[len(prompt) :] for messages, prompt in zip(CONVERSATIONS, PROMPTS, strict=True)]
FORMATS: dict[str, dict[str, list[Any]]] = {
    "messages": {"messages": CONVERSATIONS, "tools": TOOLS},
    "prompt-completion": {"prompt": PROMPTS, "completion": COMPLETIONS, "tools": TOOLS},
    "texts": {"prompt": ["w1", "w2 w3"] * 3, "completion": [" w4 w5 w6", " w7"] * 3},
    "instruction": {"instruction": ["w1", "w2"] * 3, "input": ["w3", None] * 3, "output": ["w4 w5", "w6"] * 3},
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "markers"])
def test_examples_are_the_turns_with_their_targets(template: str, assistant_only: bool, packing: bool) -> None:
    expected = {"messages": [], "prompt-completion": []}  # type: dict[str, list[Any]]
    for messages, prompt, tools in zip(CONVERSATIONS, PROMPTS, TOOLS, strict=True):
        expected["messages"].append(messages_reference(messages, tools, assistant_only=assistant_only))
        expected["prompt-completion"].append(
            messages_reference(messages, tools, assistant_only=assistant_only, first_completion=len(prompt))
        )
    for name, rows in expected.items():
        found = processed(FORMATS[name], tokenizer(template), assistant_only_loss=assistant_only, packing=packing)
        assert rows_of(found.train) == sorted((ids, [-100, *labels[1:]]) for ids, labels in rows)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("max_length", [3, 5, 8, 24])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FORMATS)
def test_packed_and_unpacked_examples_are_the_same_and_all_have_targets(name: str, side: str, max_length: int) -> None:
    tok = tokenizer(PLAIN, truncation_side=side)
    assistant_only = name == "messages"
    results = []
    for packing in (False, True):
        try:
            data = processed(
                FORMATS[name], tok, packing=packing, max_length=max_length, assistant_only_loss=assistant_only
            )
        except OptionError as error:  # none has a target
            assert "whose targets are beyond max_length" in str(error) and max_length <= 5
            results.append([])
            continue
        results.append(rows_of(data.train))
        assert all(len(row["input_ids"]) <= max_length for row in data.train)
    assert results[0] == results[1]
    assert all(any(label != -100 for label in labels) for _, labels in results[0])


def test_what_is_left_out_is_counted_with_its_first_row(log: pytest.LogCaptureFixture) -> None:
    rows = [CONVERSATIONS[0], [message("user", "w1")], CONVERSATIONS[1], [message("user", "w2")], CONVERSATIONS[0]]
    long = [message("user", " ".join(["w3"] * 30)), message("assistant", "w4")]
    data = processed({"messages": [*rows, long]}, assistant_only_loss=True)
    assert len(rows_of(data.train)) == 3
    (record,) = [record.message for record in log.records if "left out" in record.message]
    assert record == (
        "some/data: 3 of 6 examples of the training split are left out: 2 without a target, such as row 1; 1 whose targets "
        "are beyond max_length=24 tokens, such as row 5."
    )


def test_data_without_any_target_are_an_error() -> None:
    with pytest.raises(
        OptionError, match="no example of the training split has a target: 2 without a target, such as row 0"
    ):
        processed({"messages": [[message("user", "w1")]] * 2}, assistant_only_loss=True)


def test_merged_tokens_and_missing_ends_are_warnings(log: pytest.LogCaptureFixture) -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "ab": 1, "b": 2, "<p>": 3}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<p>")
    data = processed({"prompt": ["b a", "b "], "completion": ["b", "a"]}, tok, packing=False).train
    assert data["labels"][:] == [[-100, 1], [-100, 0]]
    messages = [record.message for record in log.records]
    assert any(
        "in 1 of 2 examples of the training split, such as row 0, a token has the end of a prompt" in text
        for text in messages
    )
    assert any("the student is not taught to stop" in text for text in messages)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_have_what_keeps_examples_apart(packing: bool) -> None:
    data = processed(FORMATS["messages"], packing=packing)
    batch = data.collator([data.train[index] for index in range(2)])
    assert set(batch) == {"input_ids", "labels", "position_ids" if packing else "attention_mask"}
    assert (batch["labels"] != -100).any() and batch["labels"].shape == batch["input_ids"].shape


def test_models_that_would_mix_packed_examples_are_an_error() -> None:
    rows, tok = datasets.Dataset.from_dict(FORMATS["messages"]), tokenizer(PLAIN)
    with pytest.raises(OptionError, match="BloomForCausalLM takes no position_ids.*packing to false"):
        preprocess(Task.CAUSAL_LM, rows, None, tok, options(), config=[None, BloomConfig()])
    preprocess(Task.CAUSAL_LM, rows, None, tok, options(packing=False), config=[None, BloomConfig()])
    texts = datasets.Dataset.from_dict({"text": ["w1 w2 w3 w4"] * 9})
    preprocess(
        Task.CAUSAL_LM, texts, None, tok, options(), config=[None, BloomConfig()]
    )  # blocks of texts mix them anyway


@pytest.mark.parametrize("packing", [False, True])
def test_the_objective_is_that_of_the_unpacked_examples(packing: bool, tmp_path: Path) -> None:
    """The mean over the items, in evaluation and in a step of training, truncated examples included."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    teacher, student = (LlamaForCausalLM(config) for _ in range(2))
    for parameter in (*teacher.parameters(), *student.parameters()):
        parameter.data.mul_(4)
    results = []
    for is_packed in (False, packing):
        data = processed(FORMATS["messages"], packing=is_packed, assistant_only_loss=True, max_length=9)
        args = DistillationArguments(
            str(tmp_path),
            losses={"ce": 0.5, "kd": 0.5},
            per_device_eval_batch_size=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            student, args, data.collator, None, data.train, tokenizer(PLAIN), teacher=teacher
        )
        metrics = trainer.evaluate()
        results.append([metrics["eval_ce"], metrics["eval_kd"], metrics["eval_objective"]])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


# Templates and options


def test_the_template_of_a_file_or_another_tokenizer_is_set(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(PLAIN)
    tokenizer(MARKED).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "bare")
    for path, template in ((None, None), (tmp_path / "chat.jinja", PLAIN), (tmp_path / "other", MARKED)):
        tok = tokenizer()
        set_chat_template(tok, None if path is None else str(path))
        assert tok.chat_template == template
    with pytest.raises(OptionError, match="has no chat template"):
        set_chat_template(tokenizer(), str(tmp_path / "bare"))
    with pytest.raises(OptionError, match="chat_template_path must be a Jinja file, or a tokenizer's folder"):
        set_chat_template(tokenizer(), str(tmp_path / "nothing.jinja"))


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (Task.CAUSAL_LM, {"assistant_only_loss": True}),
        (Task.CAUSAL_LM, {"completion_only_loss": True}),
        (Task.MASKED_LM, {"assistant_only_loss": True}),
        (Task.SEQ2SEQ_LM, {"completion_only_loss": True}),
    ],
)
def test_options_of_chat_data_for_other_data_are_an_error(task: Task, changes: dict[str, Any]) -> None:
    rows = datasets.Dataset.from_dict({"text": ["w1 w2"] * 9, "target": ["w3"] * 9})
    with pytest.raises(OptionError, match=f"{next(iter(changes))} needs"):
        preprocess(task, rows, None, tokenizer(mask_token="w0"), options(**changes))


# Faults of earlier releases


def test_a_conversation_ends_with_an_end_and_so_does_a_text_that_is_not_packed() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=template)
    rows = [[message("user", "a"), message("assistant", "a")]] * 4
    assert processed({"messages": rows}, tok, packing=False, max_length=8).train["labels"][:] == [[0, 1]] * 4
    texts = {"text": ["w1 w2 w3", "w4 w5 w6"]}
    found = {
        pack: processed(texts, packing=pack, max_length=size).train["labels"][:]
        for pack, size in ((True, 4), (False, 8))
    }
    assert found[True] == found[False] and all(labels[-1] == END for labels in found[False])
