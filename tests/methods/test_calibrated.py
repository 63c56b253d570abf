"""What `calibrated` guarantees in addition to its laws: the same bits again, a refit that helps, and errors that help."""

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import PartialState
from transformers import LlamaForCausalLM

from hf_guide import HfGuideError, InitializationConfig, InitializationReport, OptionError, from_teacher
from hf_guide.calibration import collection
from hf_guide.calibration.data import default_num_tokens
from hf_guide.calibration.modules import find_modules
from hf_guide.calibration.statistics import mlp_width
from hf_guide.cli.main import main
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.utils.distributed import default_device
from tests.calibration.small_students import SHALLOWER, SMALLER, kind_batches, make_student, token_batches
from tests.tiny import KINDS, logits, same_bits


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return KINDS["llama"].teacher()


@pytest.fixture(scope="module")
def tied() -> LlamaForCausalLM:
    return KINDS["llama tied"].teacher()


def test_the_same_call_gives_the_same_bits_from_memory_and_from_disk(
    teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "default_device", lambda: torch.device("cpu"))  # where the one in memory is
    teacher.save_pretrained(tmp_path)
    first = make_student(teacher)
    assert same_bits(first, make_student(teacher)) and same_bits(first, make_student(tmp_path))


def test_a_teacher_of_a_folder_runs_on_this_processes_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[torch.device] = []
    collect = collection.collect_statistics
    monkeypatch.setattr(
        collection,
        "collect_statistics",
        lambda model, *rest, **more: ran.append(model.device) or collect(model, *rest, **more),
    )
    loaded = KINDS["llama"].teacher()
    loaded.save_pretrained(tmp_path)
    students = [make_student(teacher) for teacher in (tmp_path, loaded)]
    assert [device.type for device in ran] == ["cuda" if torch.cuda.is_available() else "cpu", "cpu"]
    assert [student.device.type for student in students] == ["cpu", "cpu"]
    one, other = (torch.cat([weight.flatten() for weight in student.parameters()]) for student in students)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_loaded_teacher_runs_where_it_is(teacher: Any) -> None:
    expected, student = make_student(teacher), make_student(copy.deepcopy(teacher).cuda())
    assert student.device.type == "cpu"
    for one, other in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-2)


def test_accelerates_choice_of_a_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    assert default_device() == torch.device("cuda", 1)
    for chosen, expected in (("cuda:0", "cuda:0"), ("cpu", "cpu"), ("mps", "cpu")):
        monkeypatch.setattr(PartialState, "_shared_state", {"device": torch.device(chosen)})
        assert default_device() == torch.device(expected)


def test_a_dataset_of_ids_is_batches_of_them(teacher: Any) -> None:
    rows = datasets.Dataset.from_dict(
        {"input_ids": torch.cat([batch["input_ids"] for batch in token_batches()]).tolist()}
    )
    assert same_bits(make_student(teacher), make_student(teacher, rows, calibration_batch_size=4))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_rows_longer_than_the_table_of_positions_are_an_error(name: str) -> None:
    teacher = KINDS[name].teacher()
    positions = teacher.config.max_position_embeddings
    rows = torch.randint(3, 90, (2, positions + 1))
    with pytest.raises(
        OptionError, match=f"rows of {positions + 1} tokens in input_ids, and {type(teacher).__name__} has {positions}"
    ):
        from_teacher(teacher, method="calibrated", calibration_dataset=[{"input_ids": rows}], show_progress=False)


def test_no_more_than_calibration_tokens_is_read(teacher: Any) -> None:
    rows = iter(token_batches(count=50))
    report = make_student(teacher, rows, calibration_tokens=100).initialization_report
    assert report.calibration["tokens"] == 108 and len(list(rows)) == 47


@pytest.mark.parametrize(("neurons", "tokens"), [(192, 8192), (1536, 30720), (3276, 65520), (14336, 65536)])
def test_a_wider_mlp_takes_more_tokens(neurons: int, tokens: int) -> None:
    assert default_num_tokens(neurons) == tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_neurons_of_an_mlp_are_counted(name: str) -> None:
    model = KINDS[name].teacher()
    layout = layout_for(model.config, type(model))
    assert mlp_width(find_modules(model, layout), layout, model) == 64


def test_by_default_no_more_is_read_than_a_small_mlp_needs(teacher: Any) -> None:
    rows = iter(token_batches(count=40, rows=32))
    found = make_student(teacher, rows).initialization_report.calibration["tokens"]
    assert found == -(-8192 // 9) * 9  # of examples of 9 tokens
    assert len(list(rows)) == 11


def test_the_report_states_what_was_selected(teacher: Any, tmp_path: Path) -> None:
    report = make_student(teacher, shape=SHALLOWER).initialization_report
    report.save(tmp_path)
    calibration = InitializationReport.load(tmp_path).calibration
    assert calibration["tokens"] == 288 and len(calibration["block_influence"]["layers"]) == 4
    strongest = torch.tensor(calibration["block_influence"]["layers"]).topk(2).indices.tolist()
    exchanged = calibration["exchanged_blocks"]["layers"]
    kept = sorted({*strongest, *exchanged["kept"]} - {*exchanged["dropped"]})
    assert report.blocks == {"layers": kept} and report.options["layer_selection"] == "local_search"
    assert len(calibration["selected"]["layers.1.mlp.down_proj.weight"]["mlp"]) == 40
    assert len(calibration["residual_error"]["layers"]) == 2 and calibration["logit_scale"] > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_of_model_becomes_itself_or_smaller(name: str) -> None:
    kind = KINDS[name]
    teacher = kind.teacher()
    expected = logits(teacher, kind)
    options = {"method": "calibrated", "calibration_dataset": kind_batches(kind), "show_progress": False}
    same = logits(from_teacher(teacher, **options), kind)
    assert (same - expected).abs().max() <= 1e-4 * expected.abs().max()
    smaller = from_teacher(teacher, **options, **kind.smaller)
    assert logits(smaller, kind).isfinite().all()
    assert torch.equal(logits(teacher, kind), expected)


def error_of(student: Any, teacher: Any) -> float:
    kind = KINDS["llama"]
    return ((logits(student, kind) - logits(teacher, kind)).abs().max() / logits(teacher, kind).abs().max()).item()


def test_neurons_that_repeat_others_cost_nothing_once_refitted(teacher: Any) -> None:
    """24 of 64 neurons are copies of selected ones, with smaller outputs: the refit adds those to the selected ones."""
    doubled = KINDS["llama"].teacher().double()
    with torch.no_grad():
        for block in doubled.model.layers:
            for read in (block.mlp.gate_proj, block.mlp.up_proj):
                read.weight[40:] = read.weight[:24]
            block.mlp.down_proj.weight[:, 40:] = 1e-2 * block.mlp.down_proj.weight[:, 40:]
    errors = {}
    for refit in ("output_projections", "none"):
        method = {"method": "calibrated", "refit": refit, "ridge": 1e-12 if refit == "output_projections" else None}
        student = from_teacher(
            doubled, method=method, calibration_dataset=token_batches(20), show_progress=False, intermediate_size=40
        )
        assert student.initialization_report.calibration["selected"]["layers.0.mlp.down_proj.weight"]["mlp"] == [
            *range(40)
        ]
        errors[refit] = error_of(student, doubled)
    assert errors["output_projections"] < 1e-6 < 1e-3 < errors["none"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "change",
    [
        {"basis": "embeddings"},
        {"basis": "channels"},
        {"layer_selection": "first"},
        {"refit": "output_projections"},
        {"refit": "none"},
        {"ridge": 0.3},
        {"fit_logit_scale": False},
    ],
    ids=str,
)
def test_each_option_changes_the_student(tied: Any, change: dict[str, Any]) -> None:
    plain = {"method": "calibrated", "layer_selection": [0, 2]}
    shape = SMALLER | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 6}

    def make(method: dict[str, Any]) -> Any:
        return from_teacher(tied, method=method, calibration_dataset=token_batches(), show_progress=False, **shape)

    one, other = make(plain), make(plain | change)
    assert all(parameter.isfinite().all() for parameter in other.parameters())
    assert not same_bits(one, other)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (None, ["no calibration_dataset was given", "method='guide'"]),
        ([], ["empty"]),
        ("file.txt", ["found 'file.txt'"]),
        ([{"label": 3}], ["['label']", "input_ids, text, messages, pixel_values"]),
        ([3], ["yields a int"]),
        (["a text"], ["no tokenizer that loads", "input_ids"]),
        ([{"pixel_values": torch.zeros(1, 3, 4, 4)}], ["['pixel_values']", "LlamaForCausalLM"]),
        ([{"pixel_values": torch.zeros(3, 4, size)} for size in (4, 5)], ["(3, 4, 4) and (3, 4, 5)", "the same"]),
        ([{"input_ids": [3, 96]}], ["token id 96", "0 to 95"]),
        ([{"input_ids": torch.tensor([[3, -100]])}], ["token id -100", "0 to 95"]),
        ([{"input_ids": []}, {"input_ids": None}], ["not one token"]),
        ([{"input_ids": [3, 4], "attention_mask": [1]}], ["2 input_ids", "attention_mask of 1"]),
        (token_batches(1, rows=1), ["9 tokens", "24 wide", "at least 24"]),
    ],
    ids=str,
)
def test_data_that_make_no_batches_are_an_error(teacher: Any, dataset: Any, words: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        from_teacher(teacher, method="calibrated", calibration_dataset=dataset, show_progress=False, **SMALLER)
    assert all(word in str(error.value) for word in words), error.value


def test_an_impossible_shape_is_an_error_before_data_are_read(teacher: Any) -> None:
    rows = iter(token_batches())
    with pytest.raises(HfGuideError, match="wider than its teacher"):
        from_teacher(teacher, method="calibrated", calibration_dataset=rows, show_progress=False, hidden_size=96)
    assert len(list(rows)) == 8


@pytest.mark.parametrize(
    "options",
    [
        {"method": "guide", "ridge": 0.1},
        {"method": "guide", "layer_selection": "block_influence"},
        {"method": "uniform", "calibration_tokens": 5},
        {"method": "calibrated", "subsequent_layers": "uniform"},
        {"method": "calibrated", "centered": True},
        {"method": "calibrated", "pooling": "block"},
        {"method": "calibrated", "refit": "none", "ridge": 0.1},
        {"method": "calibrated", "ridge": 0.0},
        {"method": "calibrated", "calibration_tokens": 0},
        {"method": "calibrated", "refit": "some"},
    ],
    ids=str,
)
def test_options_that_contradict_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        InitializationConfig(**options)


def test_infinite_activations_are_named() -> None:
    teacher = KINDS["llama"].teacher()
    with torch.no_grad():
        teacher.model.layers[2].mlp.down_proj.weight.mul_(1e38)
    with pytest.raises(
        HfGuideError,
        match=r"not finite on the calibration dataset, first in the output of layers.2, for \d+ of the 36 tokens "
        r"of batch 0, the first in row 0 at position \d. Its weights are, in torch.float32. Check them",
    ):
        make_student(teacher)


@pytest.mark.parametrize(
    ("weight", "location"),
    [
        ("model.layers.1.mlp.up_proj.weight", "first in the output of layers.1"),
        ("model.embed_tokens.weight", "first in the input of layers.0"),
    ],
)
def test_weights_that_are_not_finite_are_named_at_the_first_batch(weight: str, location: str) -> None:
    broken, forwards = KINDS["llama"].teacher(), []
    broken.get_parameter(weight).data.fill_(torch.nan)
    broken.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(HfGuideError) as error:
        make_student(broken)
    assert location in str(error.value) and weight in str(error.value) and not forwards


def test_the_command_line_takes_text_files(teacher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0} | {f"w{number}": number for number in range(1, 96)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path / "teacher")
    teacher.save_pretrained(tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{(7 * i + j) % 95 + 1}" for j in range(20)) for i in range(40)))
    command = ["init", str(tmp_path / "teacher"), "-o", str(tmp_path / "out"), "--hidden-size", "24", "--no-progress"]
    command += ["--head-dim", "12", "--method", "calibrated", "--option", "calibration_seq_length=10"]
    assert main(command) == 2 and "calibration_dataset" in capsys.readouterr().err
    assert main([*command, "--calibration-dataset", str(text)]) == 0
    assert InitializationReport.load(tmp_path / "out").calibration["tokens"] == 800
