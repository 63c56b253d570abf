"""Every kind of folder that hf_guide writes, from a teacher whose folder asks for code, and whose path is secret."""

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_guide import (
    CaptureConfig,
    DistillationArguments,
    DistillationTrainer,
    capture_targets,
    capture_teacher,
    fit_subclasses,
    from_teacher,
    save_subclass_student,
)
from hf_guide.cli import main as cli
from tests.tiny import KINDS

SECRET = "sekrit-user-4711"
TOKEN = "hf_SekritToken4711"
ELSEWHERE = "someone/else--modeling_other.OtherModel"
REFERENCES = {
    "auto_map": {
        "AutoConfig": "configuration_other.OtherConfig",
        "AutoModelForCausalLM": ELSEWHERE,
        "AutoModel": "o.O",
    },
    "custom_pipelines": {"text-generation": {"impl": "my_pipeline.Pipeline", "pt": ["AutoModelForCausalLM"]}},
}
TOKENIZER_REFERENCES = {"auto_map": {"AutoTokenizer": ["tokenization_other.OtherTokenizer", None]}}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(93))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def change_json(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_teacher(kind: str, folder: Path) -> Path:
    """Save a stock teacher whose configs refer to code that it does not need, and contain local paths."""
    KINDS[kind].teacher().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    change_json(folder / "config.json", **REFERENCES)
    if (folder / "generation_config.json").is_file():
        change_json(folder / "generation_config.json", auto_map={"AutoModel": "o.O"})
    private = {"name_or_path": str(folder), "token": TOKEN, "tokenizer_file": str(folder / "tokenizer.json")}
    change_json(folder / "tokenizer_config.json", **TOKENIZER_REFERENCES, **private)
    (folder / "processor_config.json").write_text(
        json.dumps({"auto_map": {"AutoProcessor": "processing_other.Other"}})
    )
    return folder


def texts_file(home: Path) -> Path:
    rng = random.Random(0)
    path = home / "texts.txt"
    path.write_text("\n".join(" ".join(f"w{rng.randrange(93)}" for _ in range(12)) for _ in range(40)))
    return path


def command(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


def distil(home: Path, output: Path, **changes: Any) -> None:
    settings = {
        "teacher_init_kwargs": {"token": TOKEN},
        "hub_token": TOKEN,
        "data_files": str(texts_file(home)),
        "max_length": 16,
        "output_dir": str(output),
        "max_steps": 2,
        "save_steps": 1,
        "eval_steps": 1,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "load_best_model_at_end": True,
        "validation_split_percentage": 20,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = home / "settings.yaml"
    path.write_text(json.dumps(settings | changes))
    command("distill", path)


def language_models(home: Path, root: Path) -> dict[str, Path]:
    """Return one folder of each kind that is made of a causal language model, by its name."""
    teacher = save_teacher("llama", home / "teacher")
    data = texts_file(home)
    command("init", teacher, "-o", root / "init", "--hidden-size", 24, "--no-progress", "--token", TOKEN)
    from_teacher(teacher, show_progress=False, hidden_size=24, token=TOKEN).save_pretrained(root / "saved")
    distil(home, root / "distilled", model_name_or_path=str(teacher), teacher=str(teacher))
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    distil(home, root / "adapter", model_name_or_path=str(teacher), teacher=str(teacher), peft_config=lora)
    flags = ["--max-length", 16, "--top-k", 8, "--no-progress", "--token", TOKEN]
    command(
        "capture", teacher, "-o", root / "capture", "--data-files", data, "--validation-split-percentage", 20, *flags
    )
    chosen = {"teacher": str(teacher), "hidden_size": 24, "token": TOKEN}
    distil(
        home,
        root / "from capture",
        teacher_cache=str(root / "capture"),
        student_init_kwargs=chosen,
        teacher_init_kwargs=None,
    )
    calibrated = from_teacher(
        teacher,
        method={"method": "calibrated", "calibration_tokens": 400},
        calibration_dataset=data.read_text().splitlines(),
        calibration_cache_dir=root / "calibration",
        hidden_size=24,
        show_progress=False,
        token=TOKEN,
    )
    calibrated.save_pretrained(root / "calibrated")
    merged(teacher, root / "merged")
    return {path.name: path for path in root.iterdir()}


def merged(teacher: Path, folder: Path) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 4
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(teacher),
        DistillationArguments(str(folder.with_name("run")), max_steps=1, report_to="none", hub_token=TOKEN),
        train_dataset=rows,
        processing_class=tokenizer,
        teacher=str(teacher),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.save_merged_model(folder)
    trainer.save_model()
    trainer.save_state()


def classifiers(home: Path, root: Path) -> dict[str, Path]:
    """Return one folder of each kind that is made of a classifier, by its name."""
    folder = save_teacher("bert classifier", home / "classifier")
    teacher = BertForSequenceClassification.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 96, (60, 8), generator=generator)
    rows = [{"input_ids": row.tolist(), "labels": number % 3} for number, row in enumerate(tokens)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"processing_class": tokenizer, "show_progress": False}
    projector = fit_subclasses(teacher, rows, 2, **options)
    projector.save_pretrained(root / "projector")
    capture_teacher(
        folder, rows, root / "embeddings", config=CaptureConfig(save_penultimate=True), token=TOKEN, **options
    )
    capture_targets(projector, teacher, rows, root / "targets", **options)
    for export_format in ("remote_code", "subclass_head", "refit_head"):
        student = from_teacher(folder, num_subclasses=2, hidden_size=24, show_progress=False)
        save_subclass_student(student, root / export_format, export_format, dataset=rows, **options)
    lines = [json.dumps({"text": " ".join(f"w{id - 3}" for id in row.tolist()), "label": "good"}) for row in tokens]
    (home / "rows.jsonl").write_text("\n".join(lines))
    (root / "page").mkdir()
    figures = ["-o", root / "page" / "subclasses.html", "--figures", root / "page", "--no-probe", "--no-progress"]
    command("analyze-subclasses", root / "projector", home / "rows.jsonl", "--teacher", folder, *figures)
    return {path.name: path for path in root.iterdir()}


def contents(path: Path) -> bytes:
    """Return a file's bytes, those of a zip's members uncompressed."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def files_with(folder: Path, *words: str, where: Callable[[Path], bool] = Path.is_file) -> list[str]:
    """Return the files below a folder that hold one of some words."""
    return [
        f"{path.relative_to(folder)}: {word}"
        for path in sorted(folder.rglob("*"))
        if where(path)
        for word in words
        if word.encode() in contents(path)
    ]
