"""Blocks chosen as a set by a local search: never worse than by influence alone, and resumable."""

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_guide import from_teacher
from hf_guide.calibration import block_selection
from hf_guide.calibration.output_comparison import divergence
from hf_guide.calibration.reconstruction import BlockReconstructor
from hf_guide.modeling import plan_student
from tests.calibration.small_students import kind_batches
from tests.calibration.test_output_comparison import teacher_of
from tests.tiny import KINDS, same_bits

FAMILIES = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama tied"))]
EXACT = {"method": "calibrated", "refit": "none", "fit_logit_scale": False}
SAMPLE_TOKENS = block_selection.SHORT_ROWS * block_selection.SHORT_ROW_TOKENS


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
    """Return the mean divergence from the teacher on the sample of a local search, 128 tokens or more of whole rows."""
    ids = torch.cat([each["input_ids"] for each in batches()])[: -(-SAMPLE_TOKENS // 12)]
    return divergence(model(ids).logits, teacher(ids).logits).mean().item()


def test_a_teacher_of_files_loses_the_same_blocks(tmp_path: Path) -> None:
    teacher = KINDS["llama"].teacher()
    teacher.save_pretrained(tmp_path)
    reports = [student(each, "local_search").initialization_report for each in (teacher, tmp_path)]
    assert reports[0].blocks == reports[1].blocks
    assert reports[0].calibration["exchanged_blocks"] == reports[1].calibration["exchanged_blocks"]


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


@pytest.mark.extended
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "width"), [("llama", "hidden_size"), ("gpt2", "n_embd"), ("bert", "hidden_size"), ("t5", "d_model")]
)
def test_sets_are_compared_at_the_width_of_the_teacher_alone(name: str, width: str) -> None:
    """A narrower student is that of the most influential blocks, states why, and is estimated without a search."""
    kind = KINDS[name]
    depth = {field: size for field, size in kind.smaller.items() if "layer" in field}
    for overrides in (depth, {**kind.smaller, width: 24}):
        searched, by_influence = (
            from_teacher(
                kind.teacher(),
                method=EXACT | {"layer_selection": selection},
                calibration_dataset=kind_batches(kind),
                show_progress=False,
                **overrides,
            )
            for selection in ("local_search", "block_influence")
        )
        report, is_wide = searched.initialization_report, overrides is depth
        assert bool(report.calibration.get("exchanged_blocks")) == is_wide
        assert any("and the student has another" in note for note in report.notes) != is_wide
        assert is_wide or same_bits(searched, by_influence)
        estimates = [
            plan_student(
                kind.teacher(), method={"method": "calibrated", "layer_selection": each}, **overrides
            ).estimate
            for each in ("local_search", "block_influence")
        ]
        operations = [sum(sum(part.products.values()) for part in each.parts) for each in estimates]
        assert (operations[0] > operations[1]) == is_wide


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


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", ["masked-lm", "sequence-classification", "sequence-classification, regression", "feature-extraction"]
)
def test_encoders_are_scored_by_how_far_they_are_from_the_teacher(name: str) -> None:
    teacher, data = teacher_of(name)
    options = {"calibration_dataset": data, "show_progress": False, "num_hidden_layers": 2}
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
    assert sizes == [-(-SAMPLE_TOKENS // 12)], "whole rows of 12 tokens"
    teacher, data = teacher_of("image-classification")
    images = [{name: torch.cat([value] * 30) for name, value in data[0].items()}]
    method = {"method": "calibrated", "refit": "none"}
    from_teacher(teacher, method=method, calibration_dataset=images, show_progress=False, num_hidden_layers=1)
    patches = (teacher.config.image_size // teacher.config.patch_size) ** 2
    assert sizes[1] == max(block_selection.SAMPLE_EXAMPLES, -(-block_selection.SEARCH_TOKENS // patches))
    assert sizes[1] < len(images[0]["pixel_values"])


def with_massive_token(block: int, depth: int = 6) -> PreTrainedModel:
    """Return a Llama one of whose blocks multiplies the hidden states of token 5 alone, by a direction that no other uses."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 8, "vocab_size": 96}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=depth, tie_word_embeddings=False)).eval()
    embeddings = teacher.get_input_embeddings().weight.data
    embeddings[:, -1], embeddings[5, -1] = 0.0, 0.1
    for index, each in enumerate(teacher.model.layers):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = each.get_submodule(name).weight.data.mul_(0.1 if index == block else 20.0)
            weight[-1] = 0.0
    mlp = teacher.model.layers[block].mlp
    for name in ("gate_proj", "up_proj"):
        mlp.get_submodule(name).weight.data[0] = 0.0
        mlp.get_submodule(name).weight.data[0, -1] = 50.0
    mlp.down_proj.weight.data[:-1, 0] = 300.0
    return teacher


@pytest.mark.parametrize("selection", ["block_influence", "local_search"])
@pytest.mark.parametrize("block", [2, 4])
def test_a_block_that_makes_hidden_states_massive_is_kept(block: int, selection: str) -> None:
    """Its influence, a mean over tokens, is the least of all; and no other block is taken for one."""
    data = batches()
    for batch in data:
        batch["input_ids"][batch["input_ids"] == 5] = 6
        batch["input_ids"][0, 0] = 5
    depth, kept = (
        (6, 4) if selection == "block_influence" else (12, 9)
    )  # a search exchanges the last three of the kept
    options = {"calibration_dataset": data, "show_progress": False, "num_hidden_layers": kept}
    method = EXACT | {"layer_selection": selection}
    report = from_teacher(with_massive_token(block, depth), method=method, **options).initialization_report
    (influence,) = report.calibration["block_influence"].values()
    assert min(influence) == influence[block]
    assert report.calibration["massive_blocks"] == {"layers": [block]} and block in report.blocks["layers"]
    assert {block, influence.index(max(influence))} <= {*report.blocks["layers"]}
    assert "massive_blocks" not in student(misleading(8), selection).initialization_report.calibration


def long_rows(count: int, padding: "dict[int, slice] | None" = None) -> list[dict[str, torch.Tensor]]:
    """Return batches of two rows of 48 tokens, of which some have padding."""
    ids = torch.randint(3, 90, (count, 2, 48), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    for index, columns in (padding or {}).items():
        rows[index]["attention_mask"][1, columns] = 0
    return rows


@pytest.mark.parametrize("padding", [{}, {0: slice(40, None)}, {1: slice(20, None)}], ids=["none", "late", "early"])
def test_sets_are_compared_on_the_start_of_several_texts(padding: "dict[int, slice]") -> None:
    """The losses are those of the student on the first 32 tokens of four rows, without padding."""
    teacher, data, kept = misleading(8), long_rows(4, padding), block_selection.SHORT_ROW_TOKENS
    options = {"calibration_dataset": data, "show_progress": False, "num_hidden_layers": 4}
    made = from_teacher(teacher, method=EXACT, **options)
    (found,) = made.initialization_report.calibration["exchanged_blocks"].values()
    rows = 4 if padding != {1: slice(20, None)} else 5  # a row of 20 tokens leaves 12 of the 128 for another
    ids, mask = (torch.cat([each[name] for each in data])[:rows, :kept] for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        logits = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (made, teacher))
        expected = divergence(*logits).mean().item()
    assert found["loss"] == pytest.approx(expected, rel=1e-4)


def test_rows_that_are_padded_on_the_left_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[list[tuple[int, ...]]] = []
    sample = block_selection._sample

    def recorded(*args: Any) -> Any:
        found = sample(*args)
        shapes.append([tuple(batch["input_ids"].shape) for batch in found.batches])
        return found

    monkeypatch.setattr(block_selection, "_sample", recorded)
    teacher = KINDS["llama"].teacher()
    for data in (long_rows(4, {0: slice(0, 8)}), long_rows(4)):
        options = {"calibration_dataset": data, "show_progress": False, "num_hidden_layers": 2}
        from_teacher(teacher, method=EXACT, **options)
    assert shapes == [[(2, 48), (2, 32)], [(4, 32)]]


def test_a_single_embedding_is_a_note_of_a_search() -> None:
    teacher, data = teacher_of("feature-extraction")
    options = {"calibration_dataset": [{"input_ids": data[0]["input_ids"][:1]}], "show_progress": False}
    report = from_teacher(teacher, method=EXACT, num_hidden_layers=2, **options).initialization_report
    assert any(re.search("Sets of blocks .* has 1 for it: pass more data", note) for note in report.notes)


def with_blocks(teacher: PreTrainedModel, path: str, kept: tuple[int, ...]) -> PreTrainedModel:
    """Return a copy that has these blocks alone of those in a list of modules."""
    cut = copy.deepcopy(teacher)
    blocks = cut.get_submodule(path)
    for index in reversed([index for index in range(len(blocks)) if index not in kept]):
        del blocks[index]
    cut.config.use_cache = False
    return cut


def seq2seq_teacher(name: str) -> PreTrainedModel:
    """Return an encoder-decoder of four blocks in each stack."""
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 4, "num_decoder_layers": 4}
        model = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=96, decoder_start_token_id=0))
    else:
        sizes = {
            f"{side}_{what}": size
            for side in ("encoder", "decoder")
            for what, size in (("layers", 4), ("ffn_dim", 24), ("attention_heads", 2))
        }
        model = BartForConditionalGeneration(
            BartConfig(**sizes, d_model=16, vocab_size=96, max_position_embeddings=32)
        )
    for parameter in model.parameters():
        if parameter.ndim == 2 and len(parameter) < 96:
            parameter.data.mul_(4.0)
    return model.eval()


@torch.no_grad()
def seq2seq_divergence(teacher: PreTrainedModel, model: PreTrainedModel) -> float:
    ids = torch.cat([each["input_ids"] for each in batches()])[: -(-block_selection.SEARCH_TOKENS // 12)]
    rows = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    return divergence(*(each(**rows).logits.flatten(0, 1) for each in (model, teacher))).mean().item()


@pytest.mark.extended
@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_the_stacks_of_an_encoder_decoder_are_searched_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the other whole: of all sets of one stack the best is kept, and its loss is that of such a student."""
    monkeypatch.setattr(block_selection, "MIN_GAIN", 1e-3)
    teacher = seq2seq_teacher(name)
    rows = [{"input_ids": each["input_ids"], "decoder_input_ids": each["input_ids"]} for each in batches()]
    options = {"calibration_dataset": rows, "show_progress": False}
    depths = ("num_layers", "num_decoder_layers") if name == "t5" else ("encoder_layers", "decoder_layers")
    report = from_teacher(teacher, method=EXACT, **dict.fromkeys(depths, 2), **options).initialization_report
    assert not any("greatest influence" in note for note in report.notes) and len(report.blocks) == 2
    for stack, kept in report.blocks.items():
        losses: dict[tuple[int, ...], float] = {}
        for chosen in itertools.combinations(range(4), 2):
            if name == "bart" or chosen[0] == 0:  # T5's first block has the biases of all
                path = f"model.{stack}" if name == "bart" else stack
                losses[chosen] = seq2seq_divergence(teacher, with_blocks(teacher, path, chosen))
        found = report.calibration["exchanged_blocks"][stack]
        assert losses[tuple(kept)] <= min(losses.values()) * (1 + 2e-3)
        assert found["loss"] == pytest.approx(losses[tuple(kept)], rel=1e-3)


def test_of_the_sets_that_the_config_can_have_the_best_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of this family is the only one without experts: a set without it is not possible."""
    monkeypatch.setattr(block_selection, "MIN_GAIN", 1e-3)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    config = Glm4MoeConfig(**sizes, **experts, num_key_value_heads=2, num_hidden_layers=6, vocab_size=96)
    torch.manual_seed(1)
    teacher = Glm4MoeForCausalLM(config).eval()
    for block in teacher.model.layers[1:]:
        block.self_attn.o_proj.weight.data.mul_(20.0)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        teacher.model.layers[0].get_submodule(name).weight.data.zero_()  # it has the least influence
    options = {"calibration_dataset": batches(), "show_progress": False, "num_hidden_layers": 3}
    report = from_teacher(teacher, method=EXACT, **options).initialization_report
    losses = {}
    for chosen in itertools.combinations(range(1, 6), 2):
        losses[(0, *chosen)] = divergence_from(teacher, with_blocks(teacher, "model.layers", (0, *chosen)))
    kept = tuple(report.blocks["layers"])
    assert losses[kept] <= min(losses.values()) * (1 + 2e-3)
    found = report.calibration["exchanged_blocks"]["layers"]
    assert found["loss"] == pytest.approx(losses[kept], rel=1e-3)
    assert any("cannot have all sets of blocks" in note for note in report.notes)
