"""The quickstart itself: one function a stage, and the stages in order."""

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_guide.errors import OptionError, TeacherError
from hf_guide.hub.companions import copy_tokenizer_files
from hf_guide.hub.model_card import write_model_card
from hf_guide.modeling import AutoStudentForCausalLM
from hf_guide.models.pretrained import load_config, load_processing_class, unreadable_as
from hf_guide.quickstart import QuickstartOptions
from hf_guide.quickstart.corpus import pack, read_text, split_documents
from hf_guide.quickstart.distill import Evaluation, Recipe, capture, evaluate, train
from hf_guide.quickstart.memory import keep_freed_memory
from hf_guide.quickstart.teacher import default_teacher
from hf_guide.utils import files as folders
from hf_guide.utils.checksums import check_written_model
from hf_guide.utils.files import atomic_folder, check_disk_space
from hf_guide.utils.public_names import public_name, public_value

RESULTS_NAME = "quickstart.json"

# How each student is made, and its peak learning rate: the better of 1e-3 and 3e-3 on SmolLM2-135M and Wikipedia, one seed,
# after 200 steps with even blocks; for guide after 60 with the first. The first blocks were better for both at 50 steps;
# guide's gain of 0.3 was picked among about ten variants on one seed's held-out text, uniform had no such search. Neither
# had calibrated: its rate is random's, and it listens to as much of the training text as its default says.
METHODS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "uniform": {"method": "uniform", "layers": "first"},
    "guide": {"method": "guide", "layers": "first", "logit_gain": 0.3},
    "calibrated": {"method": "calibrated"},
}
LEARNING_RATES = {"random": 1e-3, "uniform": 3e-3, "guide": 3e-3, "calibrated": 1e-3}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Fields:
        parameters: number of parameters, tied ones once.
        start, end: perplexity per token on the held-out text, before and after training.
        gap_closed: (end of random - end) / (end of random - teacher).
        reading: tokens per second through the model without gradients.
        training: tokens per second of forward, loss, backward and update; None for the teacher.
    """

    name: str
    parameters: int
    start: float
    end: float
    gap_closed: float
    reading: float
    training: float | None = None


def quickstart(options: QuickstartOptions, *, show_progress: bool = True) -> list[Row]:
    """Make students of one teacher by every method, train them on the same tokens, compare them, save the best.

    The saved student is a stock model: a fresh process that never imports hf_guide loads it and writes a sentence.

    Returns:
        The printed table: the teacher first, then one row per method.

    Raises:
        OptionError: an unusable option; before any work.
        OSError: the teacher cannot be had.
    """
    output = Path(options.output)
    check_output(output)
    keep_freed_memory()
    started = time.perf_counter()
    texts = split_documents((text for source in options.text for text in read_text(source)), seed=options.seed)
    name = options.teacher or default_teacher(options.cache_dir)
    tokenizer = load_processing_class(AutoTokenizer, name)
    load_config(name)
    with unreadable_as(TeacherError, f"The teacher {name} cannot be loaded"):
        teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    recipe = Recipe(options.steps, options.batch_size, options.kd_weight, options.seed)
    learned = shuffled(
        pack(texts.train, tokenizer, options.sequence_length), recipe.steps * recipe.batch_size, options
    )
    held_out = shuffled(pack(texts.held_out, tokenizer, options.sequence_length), options.held_out_blocks, options)
    print(f"teacher: {name}")
    amount = f"{learned[:, 1:].numel():,} tokens to train on, {held_out[:, 1:].numel():,} held out"
    print(f"text: {', '.join(options.text)}; {amount}")

    def measure(title: str, model: PreTrainedModel) -> Evaluation:
        return evaluate(model, held_out, options.batch_size, title, show_progress=show_progress)

    goal = measure("teacher", teacher)
    print(f"teacher's perplexity on the held-out text: {goal.perplexity:.1f}")
    shape = half_shape(teacher.config)
    made = {
        method: make_student(name, method, shape, options.seed, learned, recipe.batch_size, show_progress)
        for method in METHODS
    }
    before = {method: measure(f"{method} at the start", student) for method, student in made.items()}
    training = {}
    with tempfile.TemporaryDirectory(prefix="quickstart-") as place:
        heard = capture(teacher, learned, Path(place, "capture"), recipe, show_progress=show_progress)
        size = sum(file.stat().st_size for file in heard.folder.rglob("*") if file.is_file())
        print(f"what the teacher says of it: {size / 2**20:.0f} MiB on disk; it is not needed any more")
        for method, student in made.items():
            print(f"training {method}")
            rate = LEARNING_RATES[method]
            training[method] = train(student, heard, learned, rate, recipe, Path(place), show_progress=show_progress)
    after = {method: measure(f"{method} at the end", student) for method, student in made.items()}
    worst = after["random"].perplexity
    rows = [Row("teacher", teacher.num_parameters(), goal.perplexity, goal.perplexity, 1.0, goal.tokens_per_second)]
    for method, student in made.items():
        rows.append(
            Row(
                name=method,
                parameters=student.num_parameters(),
                start=before[method].perplexity,
                end=after[method].perplexity,
                gap_closed=(worst - after[method].perplexity) / (worst - goal.perplexity),
                reading=after[method].tokens_per_second,
                training=training[method],
            )
        )
    print(f"\n{table(rows)}\n")
    best = min(after, key=lambda method: after[method].perplexity)
    save(made[best], name, rows, options, output)
    print(f"The best, {best!r}, is saved in {output}. A fresh process loads it with Transformers alone and writes:\n")
    print(f"    {check_stock(made[best], output, held_out, texts.held_out[0])!r}\n")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes in all.")
    return rows


def check_output(output: Path) -> None:
    """Refuse a folder that holds anything but an earlier quickstart.

    Raises:
        FileExistsError: it is a file, or holds something else.
    """
    if not (output / RESULTS_NAME).is_file():
        folders.check_output_folder(output)


def shuffled(blocks: Tensor, count: int, options: QuickstartOptions) -> Tensor:
    """Return `count` of the blocks in an order that only the seed decides.

    Raises:
        OptionError: there are fewer.
    """
    if len(blocks) < count:
        raise OptionError(
            f"{count} blocks of {options.sequence_length} tokens were asked for, but {', '.join(options.text)} gives "
            f"{len(blocks)}: ask for fewer steps, smaller batches or fewer held-out blocks, or add text."
        )
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(options.seed))[:count]]


def half_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """Return overrides for half the width and a third of the depth, with as many heads of half the size."""
    shape = {"hidden_size": config.hidden_size // 2, "num_hidden_layers": max(1, config.num_hidden_layers // 3)}
    for key in ("intermediate_size", "head_dim"):
        if isinstance(getattr(config, key, None), int):
            shape[key] = getattr(config, key) // 2
    return shape


def make_student(
    teacher: str, method: str, shape: dict[str, Any], seed: int, learned: Tensor, batch_size: int, show_progress: bool
) -> PreTrainedModel:
    """Return a float32 student of `shape`; a calibrated one has listened to the text it will be trained on."""
    how = METHODS[method] | {"seed": seed}
    heard = [{"input_ids": rows} for rows in learned[:, :-1].split(batch_size)] if method == "calibrated" else None
    return AutoStudentForCausalLM.from_teacher(
        teacher,
        method=how,
        calibration_dataset=heard,
        dtype=torch.float32,
        show_progress=show_progress,
        **shape,
    )


def table(rows: list[Row]) -> str:
    """Return the rows as text with aligned columns."""
    lines = [
        ["", "parameters", "perplexity at start", "at end", "gap closed", "tokens/s reading", "tokens/s training"]
    ]
    for row in rows:
        lines.append(
            [
                row.name,
                f"{row.parameters / 1e6:.1f} M",
                f"{row.start:.4g}",
                f"{row.end:.4g}",
                f"{row.gap_closed:.1%}",
                f"{row.reading:.0f}",
                f"{row.training:.0f}" if row.training else "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    name, *others = widths
    return "\n".join("  ".join([line[0].ljust(name), *map(str.rjust, line[1:], others)]) for line in lines)


def save(student: PreTrainedModel, teacher: str, rows: list[Row], options: QuickstartOptions, output: Path) -> None:
    """Write a student, its teacher's tokenizer, its card and the table into `output`, whole or not at all."""
    report: Any = student.initialization_report
    end = next(row.end for row in rows if row.name == report.options["method"])
    result = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=f"{', '.join(map(public_name, options.text))} (held out)",
        metric_type="perplexity",
        metric_value=round(end, 2),
    )
    told = {"options": public_value(dataclasses.asdict(options)), "rows": [dataclasses.asdict(row) for row in rows]}
    with atomic_folder(output, replaces=(output / RESULTS_NAME).is_file(), check=check_written_model) as folder:
        check_disk_space(folder, student.get_memory_footprint())
        student.save_pretrained(folder)
        copy_tokenizer_files(teacher, folder)
        write_model_card(folder, report, model_id=output.resolve().name, results=[result])
        (folder / RESULTS_NAME).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def check_stock(student: PreTrainedModel, folder: Path, held_out: Tensor, text: str) -> str:
    """Load `folder` in a process that knows Transformers alone; return how it continues the first words of `text`.

    Raises:
        RuntimeError: the process fails, or its model is not the student.
    """
    asked = {"folder": str(folder), "prompt": " ".join(text.split()[:6]), "tokens": held_out[0].tolist()}
    script = Path(__file__).with_name("stock.py")
    done = subprocess.run(
        [sys.executable, "-I", script], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"The student in {folder} does not load in a fresh process:\n{done.stderr}")
    answer = json.loads(done.stdout)
    here = evaluate(student, held_out[:1], 1, "", show_progress=False).perplexity
    if answer["parameters"] != student.num_parameters() or not math.isclose(answer["perplexity"], here, rel_tol=1e-4):
        raise RuntimeError(
            f"In a fresh process the student in {folder} has {answer['parameters']} parameters and perplexity "
            f"{answer['perplexity']}; {student.num_parameters()} and {here} were saved."
        )
    return answer["text"]
