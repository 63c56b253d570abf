"""Hidden states of encoder-decoders: those of the decoder, as many as it has blocks, whatever the encoder has."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_guide import DistillationTrainer
from hf_guide.models.layer_mapping import depth_of_config, hidden_states_of
from tests.distillation.small import collate, examples_for
from tests.distillation.test_trainer import arguments

TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BartForConditionalGeneration": ("BartConfig", HEADS),
    "BartForSequenceClassification": ("BartConfig", HEADS),
    "MBartForConditionalGeneration": ("MBartConfig", HEADS),
    "MarianMTModel": ("MarianConfig", HEADS),
    "PegasusForConditionalGeneration": ("PegasusConfig", HEADS),
    "T5ForConditionalGeneration": ("T5Config", {"d_kv": 8, "d_ff": 32, "num_heads": 4}),
}


def model(family: str, encoder: int, decoder: int, seed: int) -> Any:
    config, sizes = FAMILIES[family]
    names = ("num_layers", "num_decoder_layers") if config == "T5Config" else ("encoder_layers", "decoder_layers")
    transformers.set_seed(seed)
    depths = dict(zip(names, (encoder, decoder), strict=True))
    made = getattr(transformers, config)(vocab_size=61, d_model=32, num_labels=5, **sizes, **TOKENS, **depths)
    return getattr(transformers, family)(made)


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_depth_is_the_decoders(family: str, encoder: int, decoder: int) -> None:
    student = model(family, encoder, decoder, 0)
    ids = torch.tensor([[5, 6, 1]])
    outputs = student(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    assert depth_of_config(student.config) == decoder == len(hidden_states_of(outputs)) - 1


@pytest.mark.parametrize("family", ["BartForConditionalGeneration", "BartForSequenceClassification"])
def test_hidden_states_of_a_shallower_decoder_are_learned(family: str, tmp_path: Path) -> None:
    task = "seq2seq-lm" if "Generation" in family else "sequence-classification"
    data = [example | {"input_ids": [5, *example["input_ids"][2:], 1]} for example in examples_for(task, 4)]
    for example in data:
        example["attention_mask"] = [1] * len(example["input_ids"])
    data = [example for example in data if len(example["input_ids"]) == len(data[0]["input_ids"])] * 4
    args = arguments(tmp_path, losses={"ce": 0.5, "hidden_states": 0.5}, max_steps=1)
    trainer = DistillationTrainer(model(family, 2, 1, 1), args, collate, data, teacher=model(family, 3, 2, 2))
    trainer.train()
    assert trainer.distillation_objective.layers == {1: 2} and trainer.state.log_history[0]["hidden_states"] > 0
