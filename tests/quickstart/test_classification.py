"""The second act, on few images in seconds and on the real set in minutes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageClassification, HfArgumentParser

from examples.common.characters import read_glyphs, split_fonts
from examples.common.data import package_dir
from examples.quickstart.classification import (
    HELD_OUT,
    PICTURE_NAME,
    ClassificationArguments,
    Trained,
    draw_images,
    quickstart,
    result_rows,
    results_table,
    verdict,
)
from examples.quickstart.output import RESULTS_NAME
from hf_guide.errors import OptionError
from hf_guide.hub.metadata import SUBCLASS_HEAD_AGREEMENT, load_record

matplotlib = pytest.importorskip("matplotlib")  # it ships fonts


@pytest.fixture
def options(tmp_path: Path) -> ClassificationArguments:
    """Few images of fonts of two families, and few steps."""
    (tmp_path / "fonts").mkdir()
    for name in ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "STIXGeneralBol"):
        shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", tmp_path / "fonts")
    return ClassificationArguments(
        output_dir=str(tmp_path / "student"),
        fonts=str(tmp_path / "fonts"),
        teacher_images=120,
        student_images=80,
        held_out=30,
        teacher_steps=3,
        steps=2,
        batch_size=16,
        seeds=1,
    )


def check_result(rows, options: ClassificationArguments, printed: str) -> None:
    assert [row.name for row in rows] == ["teacher", "hard labels", "KD", "LELP"]
    teacher, hard, kd, lelp = rows
    assert hard.parameters == kd.parameters < lelp.parameters < teacher.parameters / 8
    assert kd.against_kd is None and len(teacher.accuracies) == 1
    for row in (hard, lelp):
        assert len(row.accuracies) == options.seeds and row.against_kd == pytest.approx(row.accuracy - kd.accuracy)
        assert f"{row.accuracy:.1%}" in printed
    assert "Here LELP" in printed and "gives the same class to" in printed and "subclasses of each class:" in printed
    saved = AutoModelForImageClassification.from_pretrained(options.output_dir)
    assert saved.config.num_labels == 2 and type(saved).__module__.startswith("transformers.models.resnet")
    record = load_record(options.output_dir)
    assert record.losses == {"lelp": 1.0} and list(record.metrics) == [SUBCLASS_HEAD_AGREEMENT]
    assert 0.0 <= record.metrics[SUBCLASS_HEAD_AGREEMENT] <= 1.0
    card = Path(options.output_dir, "README.md").read_text(encoding="utf-8")
    assert f"| {HELD_OUT} | accuracy |" in card and str(Path(options.output_dir).parent) not in card
    results = json.loads(Path(options.output_dir, RESULTS_NAME).read_text(encoding="utf-8"))
    assert [tuple(row["accuracies"]) for row in results["rows"]] == [row.accuracies for row in rows]
    picture = Image.open(Path(options.output_dir, PICTURE_NAME))
    assert picture.height % 28 == 0 and picture.getextrema()[0] < 128 < picture.getextrema()[1]


@pytest.mark.extended
def test_the_whole_way_on_few_images(options, capsys):
    rows = quickstart(options, show_progress=False)
    check_result(rows, options, capsys.readouterr().out)
    again = quickstart(options, show_progress=False)
    assert [row.accuracies for row in again] == [row.accuracies for row in rows], (
        "the same call gives the same figures"
    )


def test_differences_from_kd_are_seed_by_seed():
    trained = {"KD": Trained([0.7, 0.72], [1.0, 3.0], 20), "LELP": Trained([0.78, 0.84], [2.0, 2.0], 21)}
    rows = result_rows(0.9, 700, 60.0, trained)
    lelp = rows[-1]
    assert lelp.against_kd == pytest.approx(0.1) and lelp.spread == pytest.approx(0.02 * 2**0.5)
    assert "+10.0 ± 2.8" in results_table(rows) and "above KD by more than the spread over 2 seeds" in verdict(rows)


def test_fonts_are_held_out_by_family(options):
    images = draw_images(options)
    assert images.num_fonts == (2, 2) and images.student == images.teacher[:80]
    glyphs = read_glyphs(sorted(Path(str(options.fonts)).glob("*.ttf")))
    parts = [{glyphs.families[font] for font in part.tolist()} for part in split_fonts(glyphs, [0.5, 0.5])]
    assert parts[0].isdisjoint(parts[1])
    for file in Path(str(options.fonts)).glob("STIX*"):
        file.unlink()
    with pytest.raises(OptionError, match="two families"):
        draw_images(options)


def test_the_command_line_has_the_defaults_of_the_arguments():
    parser = HfArgumentParser(ClassificationArguments)
    assert parser.parse_args_into_dataclasses([])[0] == ClassificationArguments()
    words = ["--steps", "7", "--fonts", "here", "--temperature", "2"]
    expected = ClassificationArguments(steps=7, fonts="here", temperature=2.0)
    assert parser.parse_args_into_dataclasses(words)[0] == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"student_images": 9000},
        {"num_subclasses": 1},
        {"temperature": 0.0},
        {"subclass_temperature": -1.0},
    ],
)
def test_numbers_out_of_range_are_an_error(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        ClassificationArguments(**wrong)


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
sys.exit(main({[f"--{name}={value}" for name, value in vars(options).items() if value is not None]!r}))
"""
    (tmp_path / "scratch").mkdir()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr[-2000:]
    assert "interrupted" in done.stderr
    assert not Path(options.output_dir).exists() and not list((tmp_path / "scratch").glob("quickstart-*"))


@pytest.mark.slow
def test_lelp_is_above_kd_on_the_real_fonts(tmp_path, capsys):
    try:
        package_dir("trdg", "trdg")
    except OptionError as missing:
        pytest.skip(str(missing))
    options = ClassificationArguments(output_dir=str(tmp_path / "student"))
    rows = quickstart(options)
    check_result(rows, options, capsys.readouterr().out)
    teacher, *_, lelp = rows
    assert teacher.accuracy > 0.85 and lelp.against_kd > lelp.spread
