"""Raw rows become whole examples that end with their end token, or are an error with column, row and type."""

import io
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from hf_guide.data.arguments import DataArguments
from hf_guide.data.loading import load_splits
from hf_guide.data.preprocessing import preprocess
from hf_guide.errors import OptionError
from hf_guide.tasks import Task

BEGIN, END, PAD = 20, 21, 22
TEXTS = ["t1 t2 t3", "t4", "t5 t6 t7 t8 t9", "", "t1 t2"]
CHAT = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s> {% endfor %}"


def tokenizer(adds: str = "", **changes: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words that adds special tokens by the template `adds`, such as "<s> $A </s>"."""
    words = {f"t{number}": number for number in range(BEGIN)} | {
        "<s>": BEGIN,
        "</s>": END,
        "<pad>": PAD,
        "user": 23,
        "assistant": 24,
    }
    raw = Tokenizer(models.WordLevel(words, unk_token="t0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<pad>")])
    if adds:
        raw.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", BEGIN), ("</s>", END)])
    own = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "t19"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **(own | changes))


def options(**changes: Any) -> DataArguments:
    return DataArguments(**({"dataset_name": "some/data", "packing": False, "max_length": 8} | changes))


def processed(task: Task, columns: dict[str, list[Any]], tok: Any = None, **changes: Any) -> Any:
    data = datasets.Dataset.from_dict(columns)
    return preprocess(task, data, None, tok or tokenizer(), options(**changes)).train


# Options


ROWS = {
    Task.CAUSAL_LM: {"text": TEXTS},
    Task.MASKED_LM: {"text": TEXTS},
    Task.SEQ2SEQ_LM: {"text": TEXTS[:2], "target": TEXTS[:2]},
    Task.SEQUENCE_CLASSIFICATION: {"text": TEXTS[:2], "label": [0, 1]},
    Task.TOKEN_CLASSIFICATION: {"tokens": [["t1", "t2"], ["t3"]], "ner_tags": [[0, 1], [0]]},
    Task.QUESTION_ANSWERING: {
        "question": ["t1 t2"],
        "context": ["t3 t4"],
        "answers": [{"text": ["t4"], "answer_start": [3]}],
    },
    Task.MULTIPLE_CHOICE: {"sent1": ["t1"], "sent2": ["t2"], "ending0": ["t3"], "ending1": ["t4"], "label": [1]},
    Task.FEATURE_EXTRACTION: {"text": TEXTS[:3]},
}
COLUMNS = [f"{role}_column" for role in ("text", "text_pair", "target", "image", "audio", "label")]


@pytest.mark.parametrize("option", COLUMNS)
@pytest.mark.parametrize("task", ROWS, ids=str)
def test_a_column_that_is_not_there_is_an_error_whether_the_task_reads_such_columns_or_not(
    task: Task, option: str
) -> None:
    processed(task, ROWS[task])
    with pytest.raises(OptionError, match=rf"'no such'|{option}.* would be ignored: the task is {task}"):
        processed(task, ROWS[task], **{option: "no such"})


@pytest.mark.parametrize(
    "task,ignored",
    [
        (Task.IMAGE_CLASSIFICATION, "text_column"),
        (Task.AUDIO_CLASSIFICATION, "text_column"),
        (Task.CTC, "label_column"),
        (Task.SPEECH_SEQ2SEQ, "image_column"),
        (Task.IMAGE_TEXT_TO_TEXT, "audio_column"),
        (Task.CTC, "language"),
        (Task.CAUSAL_LM, "source_prefix"),
        (Task.SEQ2SEQ_LM, "speech_task"),
    ],
)
def test_an_option_for_another_task_is_an_error(task: Task, ignored: str) -> None:
    with pytest.raises(OptionError, match=f"{ignored} would be ignored"):
        preprocess(task, datasets.Dataset.from_dict({"a": [1]}), None, None, options(**{ignored: "transcribe"}))


def test_the_working_directory_is_a_dataset_folder_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.csv").write_text("text,label\nt1,0\nt2,1\n")
    monkeypatch.chdir(tmp_path)
    for name in (".", str(tmp_path)):
        loaded = DataArguments(dataset_name=name, validation_split_percentage=0)
        assert load_splits(loaded)[0]["text"][:] == ["t1", "t2"] and loaded.name == tmp_path.name


# Ends


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("adds", ["", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_every_whole_text_ends_once_and_a_cut_one_does_not(adds: str, side: str) -> None:
    tok = tokenizer(adds, truncation_side=side)
    begin = [BEGIN] if "<s>" in adds else []
    rows = processed(Task.CAUSAL_LM, {"text": TEXTS}, tok, max_length=5)["input_ids"][:]
    for text, ids in zip([text for text in TEXTS if text], rows, strict=True):
        whole = [*begin, *(int(word[1:]) for word in text.split()), END]
        cut = whole[:5] if side == "right" else [*begin, *whole[len(begin) - 5 :]]
        assert ids == (whole if len(whole) <= 5 else cut)
        assert (END in ids) == (len(whole) <= 5 or side == "left")


@pytest.mark.parametrize("adds", ["", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_packed_blocks_are_the_unpacked_texts_end_to_end(adds: str) -> None:
    tok = tokenizer(adds)
    alone = [
        token for ids in processed(Task.CAUSAL_LM, {"text": TEXTS}, tok, max_length=99)["input_ids"] for token in ids
    ]
    packed = processed(Task.CAUSAL_LM, {"text": TEXTS}, tok, packing=True, max_length=4)
    assert [token for ids in packed["input_ids"] for token in ids] == alone[: len(alone) // 4 * 4]
    assert packed["labels"][:] == packed["input_ids"][:]


def test_a_tokenizer_without_an_end_adds_none_and_masked_texts_and_sentences_get_none() -> None:
    assert processed(Task.CAUSAL_LM, {"text": ["t1 t2"]}, tokenizer(eos_token=None))["input_ids"][:] == [[1, 2]]
    assert processed(Task.MASKED_LM, {"text": ["t1 t2"]})["input_ids"][:] == [[1, 2]]
    assert processed(Task.SEQUENCE_CLASSIFICATION, {"text": ["t1 t2"], "label": [0]})["input_ids"][:] == [[1, 2]]


# Conversations


def conversation(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("adds", ["", "<s> $A </s>"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_are_the_tokens_of_the_chat_template_and_no_more(column: str, adds: str, pack: bool) -> None:
    tok = tokenizer(adds, chat_template=CHAT)
    rows = [conversation("t1", "t2 t3"), conversation("t4", "t5", "t6")]
    results = processed(Task.CAUSAL_LM, {column: rows, "id": [7, 8]}, tok, packing=pack, max_length=9 if pack else 99)
    expected = [tok.apply_chat_template(row, return_dict=False) for row in rows]
    expected = [tok(tok.apply_chat_template(row, tokenize=False), add_special_tokens=False).input_ids for row in rows]
    assert expected[0] == [BEGIN, 23, 1, END, BEGIN, 24, 2, 3, END]
    if pack:
        assert results["input_ids"][:] == [expected[0], expected[1][:9]]
    else:
        assert results["input_ids"][:] == expected


def test_a_template_that_writes_no_end_gets_one() -> None:
    tok = tokenizer(chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}")
    assert processed(Task.CAUSAL_LM, {"messages": [conversation("t1", "t2")]}, tok)["labels"][:] == [[1, 2, END]]


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        (
            [conversation("t1")],
            None,
            "'messages' contains conversations, and the tokenizer has no chat_template",
        ),
        ([[{"speaker": "human", "words": "t1"}]], CHAT, "'role' and 'content'; row 0 has the keys .*speaker.*words"),
        ([conversation("t1"), [{"role": "user", "content": None}]], CHAT, "row 1 has content of type NoneType"),
        ([["t1", "t2"]], CHAT, "row 0 has a str"),
        ([conversation("t1"), []], CHAT, "empty conversation in row 1"),
        ([conversation("t1"), None], CHAT, "row 1 has None"),
        ([conversation("t1")], "{{ raise_exception('roles must alternate') }}", "row 0: roles must alternate"),
    ],
)
def test_conversations_that_cannot_be_rendered_are_an_error(rows: Any, template: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        processed(Task.CAUSAL_LM, {"messages": rows}, tokenizer(chat_template=template))


# Columns

VALUES: list[tuple[list[Any], str]] = [
    (["t1", None], "row 1 has None"),
    ([1, 2], "row 0 has a value of type int"),
    ([1.5, 2.5], "row 0 has a value of type float"),
    ([{"en": "t1"}, {"en": "t2"}], "row 0 has a value of type dict"),
    ([["t1"], ["t2"]], "row 0 has a"),
]
ROLES = [
    (Task.CAUSAL_LM, "text"),
    (Task.MASKED_LM, "text"),
    (Task.SEQ2SEQ_LM, "text"),
    (Task.SEQ2SEQ_LM, "target"),
    (Task.SEQUENCE_CLASSIFICATION, "text"),
    (Task.SEQUENCE_CLASSIFICATION, "pair"),
    (Task.TOKEN_CLASSIFICATION, "text"),
]


@pytest.mark.parametrize(("values", "message"), VALUES)
@pytest.mark.parametrize(("task", "role"), ROLES)
def test_what_is_no_text_is_an_error_with_its_column_row_and_type(
    task: Task, role: str, values: Any, message: str
) -> None:
    words = task is Task.TOKEN_CLASSIFICATION
    columns: dict[str, list[Any]] = {"text": [["t1"]] * 2 if words else ["t1", "t2"]}
    columns |= {"target": ["t3", "t4"]} if task is Task.SEQ2SEQ_LM else {}
    columns |= (
        {"label": [[0]] * 2 if words else [0, 1]} if task.is_per_token is words and not task.is_language_model else {}
    )
    if role == "pair":
        columns["pair"] = ["t5", "t6"]
    if words:
        message = message.replace("nothing", "NoneType").replace("a value of type ", "")
        values = [[1], [2]] if isinstance(values[0], list) else values
        values = [["t1"], None] if values[1] is None else values
    columns[role] = values
    with pytest.raises(OptionError, match=f"some/data: column '{role}'.*{message}"):
        processed(task, columns, tokenizer(chat_template=CHAT), text_pair_column="pair" if role == "pair" else None)


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        (Task.CAUSAL_LM, ["question", "answer"]),
        (Task.CAUSAL_LM, ["question", "answers"]),
        (Task.CAUSAL_LM, ["prompt", "answer"]),
        (Task.CAUSAL_LM, ["instruction", "answer"]),
        (Task.CAUSAL_LM, ["article", "highlights"]),
        (Task.MASKED_LM, ["document", "summary"]),
        (Task.SEQUENCE_CLASSIFICATION, ["sentence", "question", "label"]),
        (Task.SEQUENCE_CLASSIFICATION, ["premise", "hypothesis", "label"]),
    ],
)
def test_one_of_several_texts_is_never_chosen_without_being_named(task: Task, columns: list[str]) -> None:
    data: dict[str, list[Any]] = {name: [0, 1] if name == "label" else ["t1", "t2"] for name in columns}
    with pytest.raises(OptionError, match="text_column"):
        processed(task, data)
    assert (
        processed(task, data, text_column=columns[0])["input_ids"][:]
        == processed(task, {"text": data[columns[0]]} | data, text_column="text")["input_ids"][:]
    )


@pytest.mark.parametrize("labels", [[0], [0, 1, 1], None])
def test_words_have_a_label_each(labels: Any) -> None:
    with pytest.raises(OptionError, match=r"one label per word of 'tokens'; row 1 has .* for 2 words"):
        processed(Task.TOKEN_CLASSIFICATION, {"tokens": [["t1", "t2"]] * 2, "ner_tags": [[0, 1], labels]})


def test_a_label_is_one_class() -> None:
    with pytest.raises(OptionError, match="'label' must contain one class.*found a list"):
        processed(Task.SEQUENCE_CLASSIFICATION, {"text": ["t1", "t2"], "label": [[0], [1, 0]]})


# Nothing to learn from


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("task", [Task.CAUSAL_LM, Task.MASKED_LM])
def test_texts_that_are_all_empty_are_an_error(task: Task, pack: bool) -> None:
    with pytest.raises(
        OptionError, match="some/data: column 'text' of the training split, 2 rows, contains only empty strings"
    ):
        processed(task, {"text": ["", ""]}, packing=pack)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("task", [Task.CAUSAL_LM, Task.MASKED_LM])
def test_any_number_of_empty_texts_is_skipped(task: Task, pack: bool) -> None:
    empty, text = (
        [""] * 1001,
        "t1 t2 t3" if task is Task.MASKED_LM else "t1 t2",
    )  # a block: what is left over is dropped
    expected = processed(task, {"text": [text] * 2}, packing=pack, max_length=3)
    results = processed(task, {"text": [*empty, text, *empty, text, *empty]}, packing=pack, max_length=3)
    assert results[:] == expected[:]


def test_a_split_that_fills_no_block_is_named() -> None:
    data = datasets.Dataset.from_dict({"text": ["t1 t2 t3 t4"]})
    with pytest.raises(
        OptionError, match="'text' of the evaluation split, 1 rows, does not fill one block of 5 tokens"
    ):
        preprocess(
            Task.CAUSAL_LM,
            data.select([0, 0]),
            data.select([0]).map(lambda _: {"text": "t1"}),
            tokenizer(),
            options(packing=True, max_length=5),
        )


@pytest.mark.parametrize(
    ("task", "columns", "name"),
    [
        (Task.SEQUENCE_CLASSIFICATION, {"text": ["t1", ""], "label": [0, 1]}, "text"),
        (Task.TOKEN_CLASSIFICATION, {"tokens": [["t1"], []], "labels": [[0], []]}, "tokens"),
        (Task.SEQ2SEQ_LM, {"text": ["t1", ""], "target": ["t2", "t3"]}, "text"),
        (Task.SEQ2SEQ_LM, {"text": ["t1", "t2"], "target": ["t2", ""]}, "target"),
    ],
)
def test_an_example_without_a_token_is_an_error_with_its_row(task: Task, columns: Any, name: str) -> None:
    with pytest.raises(OptionError, match=f"column '{name}' has a text without any token in row 1"):
        processed(task, columns)


@pytest.mark.parametrize(
    ("ending", "content"), [("jsonl", ""), ("csv", ""), ("csv", "text\n"), ("txt", ""), ("json", "[]")]
)
def test_files_without_a_row_are_an_error(tmp_path, ending: str, content: str) -> None:
    path = tmp_path / f"empty.{ending}"
    path.write_text(content)
    with pytest.raises(OptionError, match=f"{path.name}"):
        load_splits(DataArguments(data_files=str(path)))


# Images


def test_an_image_that_cannot_be_read_is_named(tmp_path) -> None:
    draw = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(draw, "PNG")
    whole = draw.getvalue()
    for name, content in {"a": whole, "broken": whole[:40], "text": b"no image"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    for name in ("broken", "text"):
        files = [str(tmp_path / "a.png"), str(tmp_path / f"{name}.png")]
        data = datasets.Dataset.from_dict({"image": files, "label": [0, 1]}).cast_column("image", datasets.Image())
        train = preprocess(Task.IMAGE_CLASSIFICATION, data, None, processor, options()).train
        assert train[0]["pixel_values"].shape == (3, 8, 8)
        with pytest.raises(OptionError, match=rf"the image {name}\.png in row 1, column 'image', cannot be read"):
            train[1]
