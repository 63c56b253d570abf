"""Blocks chosen as a set, by a local search or by greedy removal: never worse than by influence alone, and resumable."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_guide import OptionError, from_teacher
from hf_guide.calibration import block_selection
from hf_guide.calibration.importance import BlockSelection
from hf_guide.calibration.output_comparison import divergence
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


@torch.no_grad()
def divergence_from(teacher: PreTrainedModel, model: PreTrainedModel) -> float:
    """Return the mean divergence from the teacher on the sample of a local search, 256 tokens or more of whole rows."""
    ids = torch.cat([each["input_ids"] for each in batches()])[: -(-block_selection.SEARCH_TOKENS // 12)]
    return divergence(model(ids).logits, teacher(ids).logits).mean().item()


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


def test_of_the_blocks_nearest_to_the_threshold_those_nearest_to_the_teacher_are_kept() -> None:
    """Of all sets that are tried the best is kept, and the losses are those of the students that have these blocks."""
    teacher = misleading(8)
    options = {"calibration_dataset": batches(), "show_progress": False, "num_hidden_layers": 4}

    def made(selection: Any) -> PreTrainedModel:
        return from_teacher(teacher, method=EXACT | {"layer_selection": selection}, **options)

    report, by_influence = made("local_search").initialization_report, made("block_influence").initialization_report
    (influence,) = by_influence.calibration["block_influence"].values()
    order = sorted(range(8), key=lambda block: -influence[block])
    sets = [sorted([order[0], *chosen]) for chosen in itertools.combinations(order[1:7], 3)]
    losses = {tuple(kept): divergence_from(teacher, made(kept)) for kept in sets}
    found, kept = report.calibration["exchanged_blocks"]["layers"], tuple(report.blocks["layers"])
    strongest = tuple(by_influence.blocks["layers"])
    assert losses[kept] == min(losses.values()) < losses[strongest]
    assert (found["loss"], found["influence_loss"]) == pytest.approx((losses[kept], losses[strongest]), rel=1e-4)
    assert (set(found["dropped"]), set(found["kept"])) == ({*strongest} - {*kept}, {*kept} - {*strongest})


def test_a_set_that_is_hardly_nearer_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"calibration_dataset": batches(), "show_progress": False, "num_hidden_layers": 4}
    chosen = []
    for gain in (0.0, 0.5):
        monkeypatch.setattr(block_selection, "MIN_GAIN", gain)
        report = from_teacher(misleading(8), method=EXACT, **options).initialization_report
        chosen.append((report.blocks["layers"], report.calibration["exchanged_blocks"]["layers"]))
    (taken, found), (kept, unchanged) = chosen
    assert taken != kept and not unchanged["dropped"] and unchanged["loss"] == unchanged["influence_loss"]
    assert found["influence_loss"] == unchanged["influence_loss"] > found["loss"] > 0.5 * unchanged["loss"]


def test_blocks_that_change_nothing_are_not_exchanged() -> None:
    """A set of greatest influence that computes the teacher's own function is kept."""
    teacher = KINDS["llama"].teacher()
    for block in (1, 2):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            teacher.model.layers[block].get_submodule(name).weight.data.zero_()
    report = student(teacher, "local_search").initialization_report
    found = report.calibration["exchanged_blocks"]["layers"]
    assert report.blocks["layers"] == [0, 3] and not found["dropped"] and not found["kept"]
    assert found["loss"] == found["influence_loss"] == pytest.approx(0, abs=1e-6)


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
    monkeypatch.setattr(block_selection._Search, "_divergences", None)  # nothing is evaluated again
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
    (exchanged,) = searched.initialization_report.calibration["exchanged_blocks"].values()
    assert len(kept) == 2 and 0 < exchanged["loss"] <= exchanged["influence_loss"]


def test_the_sample_is_few_tokens_or_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    sample = block_selection._sample

    def measured(*args: Any) -> Any:
        found = sample(*args)
        sizes.append(sum(len(next(iter(batch.values()))) for batch in found.batches))
        return found

    monkeypatch.setattr(block_selection, "_sample", measured)
    student(KINDS["llama"].teacher(), "local_search")
    assert sizes == [-(-block_selection.SEARCH_TOKENS // 12)], "whole rows of 12 tokens"
    teacher, data = teacher_of("image-classification")
    images = [{name: torch.cat([value] * 30) for name, value in data[0].items()}]
    method = {"method": "calibrated", "refit": "none"}
    from_teacher(teacher, method=method, calibration_dataset=images, show_progress=False, num_hidden_layers=1)
    patches = (teacher.config.image_size // teacher.config.patch_size) ** 2
    assert sizes[1] == max(block_selection.SAMPLE_EXAMPLES, -(-block_selection.SEARCH_TOKENS // patches))
    assert sizes[1] < len(images[0]["pixel_values"])


def test_a_single_embedding_is_an_error_of_a_greedy_removal_and_a_note_of_a_search() -> None:
    teacher, data = teacher_of("feature-extraction")
    options = {"calibration_dataset": [{"input_ids": data[0]["input_ids"][:1]}], "show_progress": False}
    message = "Sets of blocks .* has 1 for it: pass more data"
    with pytest.raises(OptionError, match=message):
        from_teacher(teacher, method=EXACT | {"layer_selection": "greedy"}, num_hidden_layers=2, **options)
    report = from_teacher(teacher, method=EXACT, num_hidden_layers=2, **options).initialization_report
    assert any(re.search(message, note) for note in report.notes)


def test_a_model_of_several_stacks_is_selected_by_influence_with_a_note_and_a_greedy_removal_is_an_error() -> None:
    kind = KINDS["t5"]
    options = {"calibration_dataset": batches(), "show_progress": False, **kind.smaller}
    message = "models of one stack.*layer_selection='block_influence'"
    with pytest.raises(OptionError, match=message):
        from_teacher(kind.teacher(), method=EXACT | {"layer_selection": "greedy"}, **options)
    searched, by_influence = (
        from_teacher(kind.teacher(), method=EXACT | {"layer_selection": selection}, **options)
        for selection in ("local_search", "block_influence")
    )
    (note,) = [each for each in searched.initialization_report.notes if "greatest influence" in each]
    assert re.search(message, note) and same_bits(searched, by_influence)
    assert not any("greatest influence" in each for each in by_influence.initialization_report.notes)
