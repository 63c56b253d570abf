"""The table of tasks in `examples/README.md` agrees with `Task` and with the scripts that exist; what all scripts refuse."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from hf_guide.tasks import OutputKind, Task
from tests.examples.local import EXAMPLES

CLASSES = {
    "vocabulary": "over the vocabulary",
    "labels": "over the labels",
    "characters": "over the tokens and the blank",
    "positions": "over the tokens of the text",
    "choices": "over the choices",
    "pairs": "over the other half of the batch's pairs",
}
ITEMS = {
    "token": "per token",
    "example": "per example",
    "boundary": "per answer",
    "frame": "per frame of the sound",
    "pixel": "per pixel of a grid",
    "query": "per query",
    "row": "per image and per text",
    "patch": "per patch",
}
KINDS = {OutputKind.CATEGORICAL: "probabilities", OutputKind.REAL: "values", OutputKind.FEATURES: "vectors"}


def describe(task: Task) -> str:
    """Return what is distilled for a task, from its row."""
    texts: dict[str, list[str]] = {}
    for output in task.row.outputs:
        words = (KINDS[output.kind], CLASSES.get(output.classes, ""), ITEMS[output.items])
        texts.setdefault(" ".join(word for word in words if word), []).append(f"`{output.name}`")
    return "; ".join(f"{' and '.join(names)}: {text}" for text, names in texts.items())


def table() -> dict[str, tuple[list[str], str]]:
    """Return the scripts and the description of each task in the table."""
    lines = (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| task | script | what is distilled |") + 2
    rows = {}
    for line in lines[start : lines.index("", start)]:
        task, scripts, text = (cell.strip() for cell in line.strip("|").split("|"))
        rows[task.strip("`")] = (re.findall(r"`([a-z_0-9]+\.py)`", scripts), text)
    return rows


@pytest.mark.parametrize("task", Task)
def test_each_task_is_described_as_its_row_has_it(task: Task) -> None:
    assert table()[task.value][1] == describe(task)


def test_the_scripts_of_the_table_are_those_of_the_folder() -> None:
    rows = table()
    assert list(rows) == [task.value for task in Task]
    named = {script for scripts, _ in rows.values() for script in scripts if script.endswith("_distillation.py")}
    assert named == {path.name for path in EXAMPLES.glob("run_*_distillation.py")}


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("run_*.py")))
def test_a_script_that_neither_trains_nor_evaluates_is_an_error(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--dataset_name", "some/dataset", "--output_dir", str(tmp_path / "student"), "--use_cpu"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *data])
    with pytest.raises(ValueError, match="nothing to do: pass --do_train, --do_eval or both"):
        importlib.import_module(f"examples.{script}").main()
    assert not (tmp_path / "student").exists()
