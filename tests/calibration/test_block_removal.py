"""Blocks chosen as a set: the removal is greedy, never worse than the influence of single blocks, and resumable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_guide import OptionError, from_teacher
from hf_guide.calibration import block_removal
from hf_guide.calibration.importance import BlockRemoval
from tests.calibration.test_output_comparison import teacher_of
from tests.tiny import KINDS

FAMILIES = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama tied"))]
EXACT = {"method": "calibrated", "refit": "none", "fit_logit_scale": False}


def batches(count: int = 6, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 90, (count, 4, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": each} for each in ids]


def student(teacher: Any, selection: Any, **options: Any) -> PreTrainedModel:
    depth = {"n_layer": 2} if getattr(teacher, "config", None) and teacher.config.model_type == "gpt2" else {}
    method = EXACT | {"layer_selection": selection}
    return from_teacher(
        teacher,
        method=method,
        calibration_dataset=batches(),
        show_progress=False,
        **(depth or {"num_hidden_layers": 2}),
        **options,
    )


@torch.no_grad()
def loss(model: PreTrainedModel) -> float:
    return sum(model(**each, labels=each["input_ids"]).loss.item() for each in batches()) / len(batches())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_set_is_greedy_and_its_loss_at_most_that_of_the_influence(name: str) -> None:
    teacher = KINDS[name].teacher()
    chosen = student(teacher, "greedy")
    report = chosen.initialization_report
    (removed,) = report.calibration["removed_blocks"].values()
    (kept,) = report.blocks.values()
    assert loss(chosen) <= loss(student(teacher, "block_influence")) + 1e-4
    # Each recorded loss is that of a student without the blocks removed so far, and no other removal would have cost less.
    left = list(range(4))
    for block, recorded in removed:
        depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
        without = {
            other: loss(
                from_teacher(
                    teacher,
                    method=EXACT | {"layer_selection": [each for each in left if each != other]},
                    calibration_dataset=batches(),
                    show_progress=False,
                    **{depth: len(left) - 1},
                )
            )
            for other in left
        }
        assert without[block] == pytest.approx(recorded, abs=1e-4)
        if len(left) == 4:
            assert without[block] == pytest.approx(min(without.values()), abs=1e-4)
        left.remove(block)
    assert kept == left or loss(chosen) <= removed[-1][1] + 1e-4


def test_a_teacher_of_files_loses_the_same_blocks(tmp_path: Path) -> None:
    teacher = KINDS["llama"].teacher()
    teacher.save_pretrained(tmp_path)
    reports = [student(each, "greedy").initialization_report for each in (teacher, tmp_path)]
    assert reports[0].blocks == reports[1].blocks
    assert reports[0].calibration["removed_blocks"] == reports[1].calibration["removed_blocks"]


def test_a_killed_removal_goes_on_with_what_it_had_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, remove = KINDS["llama"].teacher(), block_removal._Search._remove
    whole = student(teacher, "greedy").initialization_report.calibration["removed_blocks"]

    def stop_at_second(search: Any, block: int) -> None:
        if len(search.kept) == 3:
            raise KeyboardInterrupt
        remove(search, block)

    monkeypatch.setattr(block_removal._Search, "_remove", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        student(teacher, "greedy", calibration_cache_dir=tmp_path)
    removals: list[int] = []
    monkeypatch.setattr(
        block_removal._Search, "_remove", lambda search, block: removals.append(block) or remove(search, block)
    )
    resumed = student(teacher, "greedy", calibration_cache_dir=tmp_path).initialization_report
    assert resumed.calibration["removed_blocks"] == whole and removals == [whole["layers"][1][0]]


def test_the_set_of_greatest_influence_is_kept_where_its_loss_is_lower() -> None:
    removal = BlockRemoval([(1, 2.0), (2, 3.0)], kept=[1, 3])
    scores = removal.scores(4)
    assert scores.topk(2).indices.sort().values.tolist() == [1, 3] and scores[2] < scores[1]


@pytest.mark.parametrize(
    "name", ["masked-lm", "sequence-classification", "sequence-classification, regression", "feature-extraction"]
)
def test_encoders_are_scored_by_how_far_they_are_from_the_teacher(name: str) -> None:
    teacher, data = teacher_of(name)
    options = {"calibration_dataset": data, "show_progress": False, "num_hidden_layers": 2}
    report = from_teacher(teacher, method=EXACT | {"layer_selection": "greedy"}, **options).initialization_report
    (removed,) = report.calibration["removed_blocks"].values()
    assert len(removed) == 2 and all(loss > 0 for _, loss in removed)


def test_a_single_embedding_is_an_error() -> None:
    teacher, data = teacher_of("feature-extraction")
    one = [{"input_ids": data[0]["input_ids"][:1]}]
    with pytest.raises(OptionError, match="Removals of blocks .* has 1 for it: pass more data"):
        from_teacher(
            teacher,
            method=EXACT | {"layer_selection": "greedy"},
            calibration_dataset=one,
            show_progress=False,
            num_hidden_layers=2,
        )


def test_a_model_of_several_stacks_is_an_error() -> None:
    kind = KINDS["t5"]
    with pytest.raises(OptionError, match="models of one stack.*layer_selection='block_influence'"):
        from_teacher(
            kind.teacher(),
            method=EXACT | {"layer_selection": "greedy"},
            calibration_dataset=batches(),
            show_progress=False,
            **kind.smaller,
        )
