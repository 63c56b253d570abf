"""The teacher of `initialization_comparison.py`: a small Llama, trained here to convergence on the text of the quickstart.

    python examples/benchmarks/small_teacher.py --folder small_teacher
    python examples/benchmarks/small_teacher.py --width 64 --vocabulary 1024 --text wikipedia shakespeare FOLDER ...

Its tokenizer (byte-level BPE) is trained on the same text, the held-out documents left out. 8 blocks of width 128, 4 heads
on 2 key/value heads, three neurons per channel of the residual stream, 4096 entries, tied: 2.1 M parameters; at width
64 with 1024
entries 0.46 M. 24 tokens a parameter; AdamW, cosine. A run that is cut off goes on from its last checkpoint when the
command is given again. The two named texts have 3 M tokens: for a teacher that is to stay ahead of its students give
more, as folders of .txt files (the `_sources` of the Debian packages linux-doc-6.1 and python3.11-doc are such).
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import TextSplit, pack, read_documents, split_documents
from examples.common.malloc import keep_freed_memory

SOURCES = ("wikipedia", "shakespeare")
LENGTH = 128
BATCH = 32
VOCABULARY = 4096
WIDTH = 128
TOKENS_A_PARAMETER = 24
LEARNING_RATE = 3e-3


def texts(sources: tuple[str, ...] = SOURCES) -> TextSplit:
    """Return the documents to learn from, and those that no training run sees; the split is the same for every run."""
    return split_documents((text for source in sources for text in read_documents(source)), seed=0)


def train_tokenizer(split: TextSplit, folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the documents to learn from, or the one that is in the folder already."""
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(split.train, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def teacher_config(width: int, vocabulary: int) -> LlamaConfig:
    """Return the shape of the teacher."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def blocks(split: TextSplit, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return what is learned from and what is held out, int64 (blocks, LENGTH + 1)."""
    return pack(split.train, tokenizer, LENGTH), pack(split.held_out, tokenizer, LENGTH)


def as_examples(tokens: Tensor) -> list[dict[str, Tensor]]:
    """Return blocks as the examples of a causal language model."""
    return [{"input_ids": block, "labels": block} for block in tokens]


def train_teacher(
    folder: Path,
    *,
    tokens_per_parameter: float = TOKENS_A_PARAMETER,
    sources: tuple[str, ...] = SOURCES,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
) -> dict[str, Any]:
    """Train the teacher, or resume, save it in `folder`, and return its record; at once if it exists."""
    done = folder / "trained.json"
    if done.is_file():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    folder.mkdir(parents=True, exist_ok=True)
    split = texts(sources)
    tokenizer = train_tokenizer(split, folder, vocabulary)
    train_blocks, held_out = blocks(split, tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(teacher_config(width, vocabulary))
    steps = math.ceil(model.num_parameters() * tokens_per_parameter / (BATCH * LENGTH))
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        warmup_steps=max(1, steps // 50),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, steps // 50),
        save_steps=max(1, steps // 20),
        save_total_limit=1,
        report_to="none",
        seed=0,
    )
    trainer = Trainer(model, args, default_data_collator, as_examples(train_blocks), as_examples(held_out[:512]))
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    )
    loss = trainer.evaluate()["eval_loss"]
    model.save_pretrained(folder)
    tokens = steps * BATCH * LENGTH
    record = {"eval_loss": loss, "tokens": tokens, "parameters": model.num_parameters()}
    record |= {"text": list(sources), "text_tokens": train_blocks.numel()}
    done.write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("small_teacher"))
    parser.add_argument("--text", nargs="+", default=list(SOURCES), help="names of texts, or folders of .txt files")
    parser.add_argument("--tokens-per-parameter", type=float, default=TOKENS_A_PARAMETER)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    args = parser.parse_args()
    keep_freed_memory()
    record = train_teacher(
        args.folder,
        tokens_per_parameter=args.tokens_per_parameter,
        sources=tuple(args.text),
        width=args.width,
        vocabulary=args.vocabulary,
    )
    print(f"{record}; perplexity {math.exp(record['eval_loss']):.2f}; in {args.folder}")


if __name__ == "__main__":
    main()
