"""`hf-guide label`: a teacher's labels in place of a dataset's own, resumable to the last bit, and trained on."""

import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import torch
import yaml
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_guide.cli.main import main
from hf_guide.scripts import label, teacher_labels
from hf_guide.scripts.distill import distill, read_config
from hf_guide.scripts.label_config import LabelConfig
from tests.small_speech import (
    LABELS,
    RATE,
    ctc_model,
    ctc_processor,
    sound_classifier,
    tone,
    whisper,
    whisper_processor,
    write_dataset,
)
from tests.teachers.test_inputs import tokenizer


def saved(folder: Path, model: PreTrainedModel, processor: Any) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def run(teacher: str, output: Path, file: Path, *flags: str) -> int:
    return main(["label", teacher, "-o", str(output), "--data-files", str(file), "--no-progress", *flags])


def lines(output: Path, split: str = "train") -> list[dict[str, Any]]:
    files = sorted(output.glob(f"{split}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def content(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


NO_EVALUATION = ("--validation-split-percentage", "0")
SAMPLING = (
    "--generation-kwargs",
    '{"max_new_tokens": 5, "temperature": 9.0}',
    "--batch-size",
    "2",
    "--shard-size",
    "4",
)


def test_transcripts_of_a_killed_and_resumed_run_are_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = whisper_processor()
    teacher, file = saved(tmp_path / "teacher", whisper(processor), processor), write_dataset(tmp_path / "data", 10)
    flags = (*SAMPLING, *NO_EVALUATION, "--language", "german", "--speech-task", "transcribe")
    assert run(teacher, tmp_path / "whole", file, *flags) == 0
    assert "Labeled 10 of 10 rows of train" in capsys.readouterr().out

    real, calls = teacher_labels.TeacherLabels.__call__, []

    def killed(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(teacher_labels.TeacherLabels, "__call__", killed)
    assert run(teacher, tmp_path / "resumed", file, *flags) == 130
    assert len(lines(tmp_path / "resumed")) == 4, "whole files only"
    monkeypatch.setattr(teacher_labels.TeacherLabels, "__call__", real)
    assert run(teacher, tmp_path / "resumed", file, *flags) == 0
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")

    rows = lines(tmp_path / "whole")
    raw = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["reference_text"] for row in rows] == [row["text"] for row in raw]
    assert [row["audio"] for row in rows] == [row["audio"] for row in raw] and len({row["text"] for row in rows}) > 1
    assert run(teacher, tmp_path / "whole", file, *flags, "--seed", "1") == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    changed = write_dataset(tmp_path / "data", 10, speaker="a")
    assert run(teacher, tmp_path / "whole", changed, *flags) == 2
    assert "checksums.train" in capsys.readouterr().err


def test_ctc_transcripts_are_the_teachers_and_filtered_by_word_error_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = ctc_processor(tmp_path / "p")
    model = ctc_model(processor)
    teacher, file = saved(tmp_path / "teacher", model, processor), write_dataset(tmp_path / "data", 6)
    assert run(teacher, tmp_path / "out", file, *NO_EVALUATION, "--batch-size", "4") == 0
    rows = lines(tmp_path / "out")
    for row in rows:  # one at a time: a model without a mask would see the padding of a batch
        sound = teacher_labels.decode_sound(row["audio"], RATE, row=0, column="audio", dataset="x")
        inputs = processor(sound, sampling_rate=RATE, return_tensors="pt")
        assert row["text"] == processor.decode(model(**inputs).logits[0].argmax(-1))
    texts = [row["reference_text"] for row in rows]
    right = rows[2]["text"].upper() + "!"
    replaced = [json.loads(line) | ({"text": right} if index == 2 else {}) for index, line in enumerate(file.open())]
    file.write_text("".join(json.dumps(row) + "\n" for row in replaced))
    assert run(teacher, tmp_path / "close", file, *NO_EVALUATION, "--max-wer", "0.1") == 0
    assert [row["reference_text"] for row in lines(tmp_path / "close")] == [right] and right not in texts
    assert "Labeled 1 of 6 rows of train" in capsys.readouterr().out
    assert run(teacher, tmp_path / "x", file, *NO_EVALUATION, "--max-wer", "20") == 2
    assert "max_wer must be a number from 0 to 1" in capsys.readouterr().err
    assert run(teacher, tmp_path / "y", file, *NO_EVALUATION, "--max-wer", "0.1", "--text-column", "words") == 2
    assert "has no column 'words'" in capsys.readouterr().err
    assert run(teacher, tmp_path / "z", file, *NO_EVALUATION, "--generation-kwargs", '{"num_beams": 2}') == 2
    assert "generation_kwargs are for teachers that generate" in capsys.readouterr().err


def test_a_student_is_distilled_on_the_teachers_transcripts(tmp_path: Path) -> None:
    """Sequence-level distillation with the logits' divergence; the evaluation is against the dataset's own texts."""
    processor = whisper_processor()
    teacher, file = saved(tmp_path / "teacher", whisper(processor), processor), write_dataset(tmp_path / "data", 12)
    flags = ("--validation-split-percentage", "34", "--generation-kwargs", '{"max_new_tokens": 5}', "--language", "en")
    assert run(teacher, tmp_path / "labeled", file, *flags) == 0
    held_out = lines(tmp_path / "labeled", "validation")
    assert held_out and all(row["text"] == row["reference_text"] for row in held_out)
    options = {
        "teacher": teacher,
        "student_init_kwargs": {"decoder_layers": 2},
        "dataset_name": str(tmp_path / "labeled"),
        "output_dir": str(tmp_path / "student"),
        "losses": {"ce": 0.5, "kd": 0.5},
        "language": "en",
        "predict_with_generate": True,
        "generation_max_length": 12,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    metrics = distill(read_config(tmp_path / "config.yaml"))
    assert metrics["eval_wer"] >= 0 and metrics["eval_kd"] > 0 and metrics["eval_ce"] == metrics["eval_loss"]
    generation = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert generation["language"] == "en" and (tmp_path / "student" / "tokenizer.json").exists()


def test_classes_of_sounds_and_images_are_written_by_name(tmp_path: Path) -> None:
    model, extractor = sound_classifier(), ctc_processor(tmp_path / "p").feature_extractor
    teacher, file = saved(tmp_path / "teacher", model, extractor), write_dataset(tmp_path / "data", 5)
    assert run(teacher, tmp_path / "out", file, *NO_EVALUATION) == 0
    rows = lines(tmp_path / "out")
    for row in rows:
        sound = torch.from_numpy(teacher_labels.decode_sound(row["audio"], RATE, row=0, column="audio", dataset="x"))
        normal = extractor(sound.numpy(), sampling_rate=RATE, return_tensors="pt")["input_values"]
        assert row["label"] == model.config.id2label[int(model(normal).logits.argmax())]
    assert {row["reference_label"] for row in rows} == {"low", "middle", "high"}

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **LABELS)
    config.image_size, config.patch_size = 8, 4
    images = [PIL.Image.new("RGB", (8, 8), (40 * index, 99, 200 - 40 * index)) for index in range(3)]
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": "a.png"})
    data = datasets.Dataset.from_dict({"image": encoded, "label": [0, 1, 1]}).cast_column("image", datasets.Image())
    data = data.cast_column("label", datasets.ClassLabel(names=["dark", "light"]))
    data.save_to_disk(tmp_path / "images")
    torch.manual_seed(0)
    vit = saved(tmp_path / "vit", ViTForImageClassification(config), ViTImageProcessor(size={"height": 8, "width": 8}))
    flags = ["label", vit, "-o", str(tmp_path / "seen"), "--dataset-name", str(tmp_path / "images"), *NO_EVALUATION]
    assert main([*flags, "--no-progress"]) == 0
    rows = lines(tmp_path / "seen")
    assert [row["reference_label"] for row in rows] == ["dark", "light", "light"]
    assert all(row["label"] in LABELS["label2id"] for row in rows)
    assert PIL.Image.open(tmp_path / "seen" / rows[1]["image"]).getpixel((0, 0)) == (40, 99, 160)


def test_texts_are_written_by_language_models(tmp_path: Path) -> None:
    """Targets of a sequence-to-sequence model, completions of prompts, and answers in conversations."""
    tok = tokenizer()
    sizes = {"vocab_size": len(tok), "pad_token_id": tok.pad_token_id, "eos_token_id": tok.eos_token_id}
    torch.manual_seed(0)
    t5 = T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=tok.pad_token_id, **sizes
    )
    widths = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**widths, **sizes, bos_token_id=tok.bos_token_id))
    short = ("--generation-kwargs", '{"max_new_tokens": 4}', *NO_EVALUATION)

    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"text": f"w{n} w{n + 1}", "summary": "w1"}) + "\n" for n in range(3)))
    teacher = saved(tmp_path / "t5", T5ForConditionalGeneration(t5), tok)
    assert run(teacher, tmp_path / "a", file, *short) == 0
    assert all(row["summary"] and row["reference_summary"] == "w1" for row in lines(tmp_path / "a"))

    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "w1 " * (n + 1)}) + "\n" for n in range(3)))
    template = (
        "{% for message in messages %}{{ message.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    )
    tok.chat_template = template
    teacher = saved(tmp_path / "llama", llama, tok)
    assert run(teacher, tmp_path / "b", file, *short) == 0
    rows = lines(tmp_path / "b")
    for row in rows:  # padding on the left changes nothing
        ids = tok(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        made = llama.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["completion"] == tok.decode(made, skip_special_tokens=True) and set(row) > {"reference_prompt"}

    file = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    assert run(teacher, tmp_path / "c", file, *short) == 0
    (row,) = lines(tmp_path / "c")
    assert row["reference_messages"] == messages and row["messages"][0] == messages[0]
    assert row["messages"][1]["role"] == "assistant" and len(row["messages"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--generation-kwargs", '{"num_beam": 2}'), "cannot generate with .*num_beam"),
        (("--language", "french"), "has no token <.fr.>"),
        (("--audio-column", "sound"), "has no column 'sound'.*Set audio_column"),
        (("--shard-size", "0"), "shard_size must be"),
    ],
)
def test_what_cannot_be_labeled_is_an_error(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = whisper_processor()
    teacher, file = saved(tmp_path / "teacher", whisper(processor), processor), write_dataset(tmp_path / "data", 2)
    assert run(teacher, tmp_path / "out", file, *NO_EVALUATION, *flags) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors


def test_a_teacher_of_real_numbers_writes_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = sound_classifier(problem_type="regression", id2label={0: "level"}, label2id={"level": 0})
    teacher = saved(tmp_path / "teacher", model, ctc_processor(tmp_path / "p").feature_extractor)
    assert run(teacher, tmp_path / "out", write_dataset(tmp_path / "data", 2), *NO_EVALUATION) == 1
    assert (
        "writes no labels: its task is audio-classification with problem_type='regression'" in capsys.readouterr().err
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert run(teacher, tmp_path / "other", tmp_path / "data" / "data.jsonl") == 2
    assert "holds something else: notes.txt" in capsys.readouterr().err
    assert label.MANIFEST_NAME == "labels.json" and LabelConfig().generation_kwargs == {} and len(tone("low")) == 3200
