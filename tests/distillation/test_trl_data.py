"""TRL's `SFTTrainer` prepares chat data, and `DistillationTrainer` trains on its dataset with its collator."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_guide import DistillationArguments, DistillationTrainer
from hf_guide.chat.encoding import ChatEncoder
from hf_guide.chat.formats import detect_format
from hf_guide.data.arguments import DataArguments
from hf_guide.data.preprocessing import preprocess
from hf_guide.tasks import Task
from tests.chat.small import CONVERSATIONS, MARKED, VOCABULARY, byte_tokenizer, message, tokenizer

trl = pytest.importorskip("trl")

MESSAGES = [
    messages for number, messages in enumerate(CONVERSATIONS) if number != 3
]  # TRL's own masks fail on the other


def model(width: int, implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    made = LlamaForCausalLM._from_config(config, attn_implementation=implementation)
    for parameter in made.parameters():
        parameter.data.mul_(4)
    return made


def prepared(folder: Path, packing: bool) -> Any:
    config = trl.SFTConfig(
        str(folder / "sft"),
        assistant_only_loss=True,
        packing=packing,
        max_length=24,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    tok = tokenizer(MARKED)
    return trl.SFTTrainer(
        model(16), config, train_dataset=datasets.Dataset.from_dict({"messages": MESSAGES}), processing_class=tok
    )


def distill(folder: Path, data: Any, collator: Any, **options: Any) -> DistillationTrainer:
    args = DistillationArguments(
        str(folder / "out"),
        losses={"ce": 0.5, "kd": 0.5},
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return DistillationTrainer(model(16), args, collator, data, data, tokenizer(MARKED), teacher=model(32))


@pytest.mark.filterwarnings("ignore")  # of TRL, for packing without flash attention
@pytest.mark.parametrize("packing", [False, True])
def test_the_objective_on_trls_data_is_that_on_ours(packing: bool, tmp_path: Path) -> None:
    sft = prepared(tmp_path, packing)
    assert ("seq_lengths" in sft.train_dataset.column_names) == packing
    theirs = distill(tmp_path, sft.train_dataset, sft.data_collator)
    rows = datasets.Dataset.from_dict({"messages": MESSAGES})
    options = DataArguments(dataset_name="some/data", max_length=24, packing=packing, assistant_only_loss=True)
    data = preprocess(Task.CAUSAL_LM, rows, None, tokenizer(MARKED), options)
    ours = distill(tmp_path, data.train, data.collator)
    results = [[trainer.evaluate()[f"eval_{name}"] for name in ("ce", "kd")] for trainer in (theirs, ours)]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    theirs.train()
    logged = [entry for entry in theirs.state.log_history if "kd" in entry]
    assert len(logged) == 2 and all(entry["kd"] > 0 for entry in logged)


@pytest.mark.parametrize("family", ["cohere", "gemma", "gemma3", "llama3", "phi3", "qwen2_5"])
def test_targets_without_markers_are_those_of_trls_template_with_them(family: str) -> None:
    """But for line breaks after the token that ends a turn, which no assistant writes."""
    folder, tok = Path(trl.__file__).parent / "chat_templates", byte_tokenizer()
    contents = ["Who?", "A cat.", "And?", "Nothing.\n\nReally."]
    messages = [message(("user", "assistant")[number % 2], text) for number, text in enumerate(contents)]
    targets = []
    for name in (family, f"{family}_training"):
        tok.chat_template = (folder / f"{name}.jinja").read_text()
        data_format = detect_format(["messages"], {"messages": messages}, "some/data")
        assert data_format is not None
        found = ChatEncoder(tok, data_format, assistant_only_loss=True)({"messages": messages}, 0)
        targets.append("".join(tok.decode([label for label in found.labels if label != -100]).split()))
    assert targets[0] == targets[1]
