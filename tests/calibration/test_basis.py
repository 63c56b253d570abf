"""Where blocks normalise the residual stream itself its channels are selected: norm weights stay exact."""

from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedModel

from examples.common.data import read_documents
from examples.common.teachers import default_encoder
from hf_guide import OptionError, ShapeError, from_teacher
from hf_guide.initialization import transfer
from hf_guide.initialization.basis import fit_channel_selection
from tests.calibration.small_students import kind_batches
from tests.tiny import KINDS


@pytest.mark.parametrize(("name", "needed"), [("llama", 0), ("llama tied", 1)])
def test_the_tables_second_moment_is_computed_where_a_tied_gain_needs_it(
    name: str, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[list[str]] = []
    whole = transfer.embedding_second_moments
    monkeypatch.setattr(
        transfer, "embedding_second_moments", lambda plan, axes: computed.append(axes) or whole(plan, axes)
    )
    kind = KINDS[name]
    from_teacher(
        kind.teacher(),
        method={"method": "calibrated", "refit": "none"},
        calibration_dataset=kind_batches(kind),
        show_progress=False,
        **kind.smaller,
    )
    assert len(computed) == needed
    from_teacher(kind.teacher(), method="guide", show_progress=False, **kind.smaller)
    assert len(computed) == needed + 1


def texts(count: int) -> list[str]:
    try:
        default_encoder()
        found = [text for text, _ in zip(read_documents("wikipedia"), range(count), strict=False)]
    except OptionError as missing:
        pytest.skip(str(missing))
    return found


def similarities(model: PreTrainedModel, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return (vectors @ vectors.T)[first, second]


@pytest.mark.slow
def test_a_real_encoder_of_half_the_width_keeps_its_teachers_similarities() -> None:
    found = texts(180)
    tokenizer, teacher = AutoTokenizer.from_pretrained(default_encoder()), AutoModel.from_pretrained(default_encoder())
    few: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 48, "return_tensors": "pt"}
    held_out, batches = (
        tokenizer(found[:60], **few),
        [dict(tokenizer(found[i : i + 30], **few)) for i in range(60, 180, 30)],
    )
    goal, kept = similarities(teacher, held_out), {}
    for method in ("calibrated", "uniform"):
        student = from_teacher(
            teacher,
            hidden_size=192,
            method=method,
            calibration_dataset=batches if method == "calibrated" else None,
            show_progress=False,
        )
        kept[method] = torch.corrcoef(torch.stack([similarities(student, held_out), goal]))[0, 1].item()
    assert type(student) is BertModel
    assert kept["calibrated"] > 0.6 and kept["calibrated"] > kept["uniform"] + 0.2, kept


def test_norm_weights_are_those_of_the_selected_channels() -> None:
    kind = KINDS["bert"]
    teacher = kind.teacher()
    student = from_teacher(
        teacher,
        method={"method": "calibrated", "refit": "none"},
        calibration_dataset=kind_batches(kind),
        hidden_size=24,
        show_progress=False,
    )
    own, had = (dict(model.named_parameters()) for model in (student, teacher))
    name = next(name for name in own if name.endswith("embeddings.word_embeddings.weight"))
    places = [next(p for p in range(48) if torch.equal(had[name][:, p], column)) for column in own[name].T]
    gain = name.replace("word_embeddings", "LayerNorm")
    shares = own[gain] / had[gain][places]
    torch.testing.assert_close(shares, shares[:1].expand_as(shares))
    report = student.initialization_report
    assert "channels 48 -> 24" in str(report) and not any(
        "LayerNorm" in note and "tied" not in note for note in report.approximations
    )


def test_channels_are_those_with_the_largest_second_moment() -> None:
    moment = torch.diag(torch.tensor([1.0, 5, 2, 4, 0]))
    found = fit_channel_selection(moment, 2)
    torch.testing.assert_close(found.matrix, torch.eye(5, dtype=torch.float64)[:, [1, 3]])
    assert found.explained == pytest.approx(9 / 12)
    with pytest.raises(ShapeError, match="6 channels"):
        fit_channel_selection(moment, 6)


class StrictEncoder(BertModel):
    """A model of the user's own, whose forward takes what it names and nothing else."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_a_class_whose_forward_takes_no_other_arguments_is_calibrated() -> None:
    kind = KINDS["bert"]
    teacher = kind.teacher()
    strict = StrictEncoder(teacher.config)
    strict.load_state_dict(teacher.base_model.state_dict(), strict=False)
    batches = [{"input_ids": torch.randint(3, 90, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}] * 2
    student = from_teacher(
        strict,
        hidden_size=24,
        num_attention_heads=2,
        method="calibrated",
        calibration_dataset=batches,
        show_progress=False,
    )
    assert type(student) is StrictEncoder and student.initialization_report.calibration["tokens"] == 96
