"""Text from outside stays text, in cards, figures, pages and the terminal."""

import dataclasses
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_guide.cli import main as cli
from hf_guide.hub.metadata import DistillationRecord, TeacherRecord, save_record
from hf_guide.hub.model_card import BEGIN, END, write_model_card
from hf_guide.initialization.report import InitializationReport, StageRecord
from hf_guide.lelp.analysis.report import ClassSummary, SubclassSummary, plot_class, write_page
from hf_guide.utils.escaping import (
    escape_control_characters,
    escape_markdown,
    escape_mathtext,
    markdown_code,
    to_single_line,
)
from hf_guide.visualization import plot_explained_variance

NASTY = [
    r"$\frac{1$",
    r"$$x^2$$ \$",
    "$",
    r"a\b\\c",
    "a|b|c",
    "`code` ``more``",
    "```\nimport os\n```",
    "[text](https://example.com)",
    "![image](https://example.com/x.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></table><h1>x",
    f"{END} then {BEGIN}",
    "-->",
    "a\nb\r\n---\nlicense: mit",
    "# heading",
    "- item",
    "1. item",
    "**bold** __bold__ ~~gone~~",
    '\'quoted\' "twice" \\"',
    "{{ 7 * 7 }} {% raw %}",
    ": {yaml: [1]} # no",
    "\x1b[31mred\x1b[0m\x07",
    "null\x00byte",
    "\u202egnp.exe",
    "_hidden",
    "x" * 3000,
]


@pytest.fixture(autouse=True)
def glyphs() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


REPORT = InitializationReport(
    teacher="org/teacher",
    revision=None,
    teacher_class="LlamaForCausalLM",
    student_class="LlamaForCausalLM",
    options={"method": "guide"},
    hf_guide_version="0",
    transformers_version="0",
    teacher_parameters=100,
    student_parameters=10,
)


def card_of(text: str, folder: Path) -> str:
    """Return a card in which every name from outside is `text`."""
    report = dataclasses.replace(
        REPORT,
        teacher=text,
        approximations=[text],
        options={"method": text},
        sizes={text: [2, 1]},
        explained_variance={text: [0.5, 1.0]},
        variance_explained={text: 0.5},
        blocks={text: [0, 1]},
        lineage=[StageRecord(text, None, 20, 10, text, {text: [4, 2]}, {text: [0, 2]}, steps=1, losses={text: 1.0})],
    )
    record = DistillationRecord(
        teachers=[TeacherRecord(text, license=text, license_name=text, languages=[text])],
        losses={text: 1.0},
        kd_loss_type=text,
        task="text-generation",
        datasets=[text],
        evaluated_on=text,
        languages=[text],
        training={text: text},
        metrics={text: 1.0},
        student_class=text,
        steps=1,
    )
    path = write_model_card(folder, report, record=record, model_id=text, tags=[text])
    return path.read_bytes().decode()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text)[:30])
def test_a_card_is_the_same_whatever_its_names_are(text: str, tmp_path: Path) -> None:
    """The same headings, lists, tables, links and code as with a plain name; and the metadata give the names back."""
    pytest.importorskip("matplotlib")
    card, plainly = card_of(text, tmp_path / "a"), card_of("name", tmp_path / "b")
    head, body = card.split("\n---\n", 1)
    data = yaml.safe_load(head.removeprefix("---\n"))
    assert text in data["datasets"] and text in data["tags"] and data["license"] == text
    _, body_plainly = plainly.split("\n---\n", 1)
    assert _structure(body) == _structure(body_plainly)
    assert body.count(BEGIN) == body.count(END) == 1
    again = (
        write_model_card(tmp_path / "a", dataclasses.replace(REPORT, teacher=text)).read_text().split("\n---\n", 1)[1]
    )
    assert again.count(BEGIN) == again.count(END) == 1 and again.count("## Model description") == 1


def _structure(body: str) -> list[str]:
    """Return what a Markdown parser finds in a card, without its text."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [
        token.type
        for block in parser.parse(body)
        for token in [block, *(block.children or [])]
        if token.type not in ("text", "softbreak", "text_special")
    ]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text)[:30])
def test_figures_and_pages_show_names_as_they_are(text: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    view = ClassSummary(
        number=0,
        name=text,
        rows=torch.arange(4),
        points=torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
        subclasses=torch.tensor([0, 1, 0, 1]),
        sizes=torch.tensor([0.5, 0.5]),
        top_examples=[[0], [1]],
        top_probabilities=[[0.5], [0.5]],
        explained_variance_ratio=None,
    )
    figure = plot_class(view, tmp_path / "class.png")
    assert all(len(axes.get_title()) <= 160 for axes in figure.axes)
    plot_explained_variance({text: [0.5, 1.0], "other": [0.4, 1.0]}, tmp_path / "curve.svg")
    facts = {text: text}
    page = write_page(SubclassSummary(text, facts, [view], no_probe=text), tmp_path / "page.html", lambda row: text)
    tags = _Tags()
    tags.feed(page.read_text())
    assert not {"script", "h1x", "object", "iframe"} & tags.found.keys() and tags.found["h1"] == 1
    assert tags.found["img"] == 1 and "onerror" not in tags.attributes


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] = self.found.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text)[:30])
def test_nothing_controls_the_terminal(text: str) -> None:
    for shown in (
        to_single_line(text),
        escape_control_characters(text),
        escape_markdown(text),
        markdown_code(text),
        escape_mathtext(text),
    ):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert "\n" not in to_single_line(text) + escape_markdown(text) + markdown_code(text) + escape_mathtext(text)


def test_an_error_message_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families", "\x1b[31mred"]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "x1b[31mred" in error


def test_plain_names_stay_as_they_are() -> None:
    for name in ("org/SmolLM2-135M_v1.0", "embed 576 -> 288 (keeps 84.2%)", "model.layers.0.mlp.up_proj.weight"):
        assert (
            escape_markdown(name)
            == to_single_line(name)
            == escape_mathtext(name)
            == escape_control_characters(name)
            == name
        )
        assert markdown_code(name) == f"`{name}`"


def test_a_student_folder_cannot_name_code_for_its_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ['Llama"); import os; os.x("']}))
    save_record(tmp_path, DistillationRecord(student_class="x; import os", steps=1))
    text = write_model_card(tmp_path, model_id='me/"); import os #').read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(block, "card", "exec")
    assert "import os" not in re.sub(r'"(\\.|[^"\\])*"', "", block)
