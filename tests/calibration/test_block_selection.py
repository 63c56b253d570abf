"""Blocks chosen as a set, by a local search or by greedy removal: never worse than by influence alone, and resumable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_guide import OptionError, from_teacher
from hf_guide.calibration import block_selection
from hf_guide.calibration.importance import BlockSelection
from hf_guide.calibration.reconstruction import BlockReconstructor
from tests.calibration.test_output_comparison import teacher_of
from tests.tiny import KINDS, same_bits

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


@pytest.mark.parametrize("selection", ["local_search", "greedy"])
def test_a_teacher_of_files_loses_the_same_blocks(selection: str, tmp_path: Path) -> None:
    teacher = KINDS["llama"].teacher()
    teacher.save_pretrained(tmp_path)
    reports = [student(each, selection).initialization_report for each in (teacher, tmp_path)]
    assert reports[0].blocks == reports[1].blocks
    for name in ("removed_blocks", "exchanged_blocks"):
        assert reports[0].calibration.get(name) == reports[1].calibration.get(name)


def misleading(depth: int) -> PreTrainedModel:
    """Return a Llama whose blocks of most influence, the second and the fourth, cancel each other."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 8, "vocab_size": 96}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=depth, tie_word_embeddings=False)).eval()
    for block in teacher.model.layers:
        block.mlp.down_proj.weight.data.mul_(30.0)
        block.self_attn.o_proj.weight.data.zero_()
    first, second = teacher.model.layers[1], teacher.model.layers[3]
    for name, parameter in first.named_parameters():
        second.get_parameter(name).data.copy_(parameter)
    first.mlp.down_proj.weight.data.mul_(4.0)
    second.mlp.down_proj.weight.data.mul_(-4.0)
    return teacher


def test_blocks_are_exchanged_while_the_loss_falls() -> None:
    """Every exchange that is recorded is that of a student, lowers the loss, and is the best of those tried."""
    teacher = misleading(8)
    options = {"calibration_dataset": batches(), "show_progress": False, "num_hidden_layers": 4}

    def made(selection: Any) -> PreTrainedModel:
        return from_teacher(teacher, method=EXACT | {"layer_selection": selection}, **options)

    chosen, by_influence = made("local_search"), made("block_influence")
    report = chosen.initialization_report
    exchanged, losses = report.calibration["exchanged_blocks"]["layers"], [loss(by_influence)]
    kept = list(by_influence.initialization_report.blocks["layers"])
    assert exchanged
    for out, taken, recorded in exchanged:
        kept = sorted({*kept, taken} - {out})
        losses.append(loss(made(kept)))
        assert losses[-1] == pytest.approx(recorded, abs=1e-4) and losses[-1] < losses[-2]
    assert report.blocks["layers"] == kept


def test_a_killed_search_ends_with_the_same_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, refit = misleading(8), BlockReconstructor.refit
    method = {"method": "calibrated", "fit_logit_scale": False, "layer_selection": "local_search"}
    options = {"calibration_dataset": batches(), "show_progress": False, "num_hidden_layers": 4}
    whole = from_teacher(teacher, method=method, **options)

    def stop(self: BlockReconstructor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockReconstructor, "refit", stop)
    with pytest.raises(KeyboardInterrupt):
        from_teacher(teacher, method=method, calibration_cache_dir=tmp_path, **options)
    monkeypatch.setattr(BlockReconstructor, "refit", refit)
    monkeypatch.setattr(block_selection._Search, "_loss", None)  # nothing is evaluated again
    resumed = from_teacher(teacher, method=method, calibration_cache_dir=tmp_path, **options)
    assert same_bits(resumed, whole)
    assert resumed.initialization_report.calibration["exchanged_blocks"]


def test_a_killed_removal_goes_on_with_what_it_had_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, remove = KINDS["llama"].teacher(), block_selection._Search._remove
    whole = student(teacher, "greedy").initialization_report.calibration["removed_blocks"]

    def stop_at_second(search: Any, block: int) -> None:
        if len(search.kept) == 3:
            raise KeyboardInterrupt
        remove(search, block)

    monkeypatch.setattr(block_selection._Search, "_remove", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        student(teacher, "greedy", calibration_cache_dir=tmp_path)
    removals: list[int] = []
    monkeypatch.setattr(
        block_selection._Search, "_remove", lambda search, block: removals.append(block) or remove(search, block)
    )
    resumed = student(teacher, "greedy", calibration_cache_dir=tmp_path).initialization_report
    assert resumed.calibration["removed_blocks"] == whole and removals == [whole["layers"][1][0]]


def test_the_set_of_greatest_influence_is_kept_where_its_loss_is_lower() -> None:
    removal = BlockSelection([(1, 2.0), (2, 3.0)], kept=[1, 3])
    scores = removal.scores(torch.tensor([0.1, 0.4, 0.3, 0.2]))
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
    searched = from_teacher(teacher, method=EXACT | {"layer_selection": "local_search"}, **options)
    (kept,) = searched.initialization_report.blocks.values()
    exchanged = searched.initialization_report.calibration.get("exchanged_blocks", {})
    assert len(kept) == 2 and all(loss > 0 for each in exchanged.values() for *_, loss in each)


def test_a_single_embedding_is_an_error() -> None:
    teacher, data = teacher_of("feature-extraction")
    one = [{"input_ids": data[0]["input_ids"][:1]}]
    with pytest.raises(OptionError, match="Sets of blocks .* has 1 for it: pass more data"):
        from_teacher(
            teacher,
            method=EXACT | {"layer_selection": "greedy"},
            calibration_dataset=one,
            show_progress=False,
            num_hidden_layers=2,
        )


@pytest.mark.parametrize("selection", ["local_search", "greedy"])
def test_a_model_of_several_stacks_is_an_error(selection: str) -> None:
    kind = KINDS["t5"]
    with pytest.raises(OptionError, match="models of one stack.*layer_selection='block_influence'"):
        from_teacher(
            kind.teacher(),
            method=EXACT | {"layer_selection": selection},
            calibration_dataset=batches(),
            show_progress=False,
            **kind.smaller,
        )
