"""A model card parses with the Hub's own parser, names the student's origin, and keeps what others wrote."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import LlamaForCausalLM, default_data_collator

from hf_guide import Capture, DistillationArguments, DistillationTrainer, capture_teacher, from_teacher
from hf_guide.errors import HfGuideError, OptionError
from hf_guide.hub.metadata import DistillationRecord, TeacherRecord, load_record, save_record, teacher_record
from hf_guide.hub.model_card import BEGIN, END, PLOT_NAME, TRAINING_PLOT_NAME, redraw_card, write_model_card
from hf_guide.hub.push import fetch_card
from hf_guide.initialization.report import InitializationReport
from tests.tiny import KINDS

REPORT = InitializationReport(
    teacher="someone/teacher",
    revision="0123456789abcdef",
    teacher_class="LlamaForCausalLM",
    student_class="LlamaForCausalLM",
    options={"method": "guide"},
    hf_guide_version="0.1.0",
    transformers_version="5.0.0",
    teacher_parameters=134_515_008,
    student_parameters=33_400_000,
    approximations=["the final gain: fitted in the logits"],
)
RECORD = DistillationRecord(
    teachers=[TeacherRecord("someone/teacher", "0123456789abcdef", license="mit", languages=["en"])],
    losses={"ce": 0.25, "kd": 0.75},
    temperature=2.0,
    kd_loss_type="forward_kl",
    student_class="LlamaForCausalLM",
    student_parameters=33_400_000,
    task="text-generation",
    datasets=["someone/text"],
    steps=12_000,
    epochs=1.5,
    items=3_200_000,
    training={"learning_rate": 0.001, "lr_scheduler_type": "cosine"},
    metrics={"eval_loss": 3.0681, "eval_perplexity": 21.5, "eval_runtime": 12.0, "epoch": 1.5},
    teacher_metrics={"eval_perplexity": 16.5},
    random_metrics={"eval_perplexity": 41.5},
)


def body(path):
    return ModelCard.load(path).text


def metadata(path):
    return ModelCard.load(path).data.to_dict()


def test_card_parses_and_names_the_teacher(tmp_path):
    path = write_model_card(tmp_path / "student", REPORT, license="apache-2.0", datasets=["someone/text"])
    assert metadata(path) == {
        "base_model": "someone/teacher",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["someone/text"],
        "tags": ["hf_guide", "guide"],
    }
    text = body(path)
    for line in REPORT.summary().splitlines():
        assert f"- {line}\n" in text
    assert text.startswith("\n# student\n\n" + BEGIN) and text.rstrip().endswith(END)
    assert 'LlamaForCausalLM.from_pretrained("student")' in text
    assert "- the final gain: fitted in the logits\n" in text
    assert "License: apache-2.0." in text and "{" not in text


def test_results_are_in_the_table_and_in_the_metadata(tmp_path):
    result = EvalResult("text-generation", "someone/text", "Some text", "perplexity", 21.5)
    card = ModelCard.load(write_model_card(tmp_path, REPORT, model_id="me/student", results=[result]))
    assert card.data.model_name == "me/student"
    (parsed,) = card.data.eval_results
    assert (parsed.metric_type, parsed.metric_value, parsed.dataset_name) == ("perplexity", 21.5, "Some text")
    assert "| dataset | metric | this model |\n|---|---|---|\n| Some text | perplexity | 21.5 |" in card.text


def test_the_card_compares_the_distilled_student_with_the_teacher_and_a_random_initialization(tmp_path):
    path = write_model_card(tmp_path, REPORT, record=RECORD, model_id="me/student")
    text = body(path)
    for line in (
        "with `hf_guide`, method `guide`, and then distilled from it.\n",
        "- Teacher: [someone/teacher](https://huggingface.co/someone/teacher) at 0123456789ab\n",
        "- Loss: 0.25 x `ce` + 0.75 x `kd`\n",
        "- Distillation loss: `forward_kl`, temperature 2\n",
        "- Datasets: someone/text\n",
        "- Length: 12,000 steps, 1.5 epochs, 3.2 M targets\n",
        "- learning_rate: 0.001\n",
        "- lr_scheduler_type: cosine\n",
        "| dataset | metric | this model | teacher | random initialization | gap closed |\n",
        "| someone/text | loss | 3.068 | – | – | – |\n",
        "| someone/text | perplexity | 21.5 | 16.5 | 41.5 | 80.0% |\n",
        "License: mit (the teacher's).",
    ):
        assert line in text, line
    assert "runtime" not in text and "epoch |" not in text
    data = metadata(path)
    assert (
        data["license"] == "mit"
        and data["language"] == ["en"]
        and data["tags"] == ["hf_guide", "guide", "distillation"]
    )
    (index,) = data["model-index"]
    assert index["name"] == "me/student"
    assert [metric for result in index["results"] for metric in result["metrics"]] == [
        {"type": "loss", "value": 3.0681},
        {"type": "perplexity", "value": 21.5},
    ]


def test_a_model_that_was_only_trained_has_a_card_too(tmp_path):
    save_record(tmp_path, RECORD)
    path = redraw_card(tmp_path, model_id="me/student")
    text = body(path)
    assert "A `LlamaForCausalLM` with 33.4 M parameters, distilled from [someone/teacher]" in text
    assert "## Initialization" not in text and "initialization_report" not in text
    assert metadata(path)["base_model"] == "someone/teacher" and metadata(path)["tags"] == ["hf_guide", "distillation"]


def test_several_teachers_are_all_named(tmp_path):
    teachers = [TeacherRecord("a/big", "f00d" * 10, 0.75, license="mit"), TeacherRecord("folder", None, 0.25, True)]
    record = dataclasses.replace(RECORD, teachers=[*teachers, TeacherRecord("b/big", license="apache-2.0")])
    path = write_model_card(tmp_path, record=record)
    assert metadata(path)["base_model"] == ["a/big", "b/big"]
    assert "license" not in metadata(path), "two licences are not one"
    assert "weight 0.75; `folder`, weight 0.25 (outputs read from a cache);" in body(path)


MINE = """---
license: cc-by-4.0
language: fr
tags: [mine]
thumbnail: https://example.org/a.png
model-index:
- name: Mine
  results:
  - task: {type: text-generation}
    dataset: {type: mine, name: Mine}
    metrics: [{type: bleu, value: 12.5}]
---

# My student

What I know of it.

"""


def test_a_card_without_our_part_gets_it_once_and_keeps_its_own_words(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(MINE)
    first = write_model_card(tmp_path, REPORT, record=RECORD).read_text()
    text = body(path)
    assert (
        text.startswith("\n# My student\n\nWhat I know of it.\n\n" + BEGIN)
        and text.count(BEGIN) == text.count(END) == 1
    )
    data = metadata(path)
    assert (data["license"], data["language"], data["thumbnail"]) == ("cc-by-4.0", "fr", "https://example.org/a.png")
    assert data["tags"] == ["mine", "hf_guide", "guide", "distillation"]
    assert data["datasets"] == ["someone/text"] and data["model-index"][0]["name"] == "Mine"
    actual_values = [metric["value"] for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    assert actual_values == [12.5, 3.0681, 21.5]
    assert "| Mine | bleu | 12.5 |" in text and "License: cc-by-4.0." in text
    assert write_model_card(tmp_path, REPORT, record=RECORD).read_text() == first, "drawn twice is drawn once"


def test_only_our_part_is_redrawn(tmp_path):
    path = write_model_card(tmp_path, REPORT, record=RECORD, model_id="me/student")
    before, after = path.read_text().split(BEGIN)[0], "\n\n## Mine\n\nBelow it.\n"
    path.write_text(path.read_text().rstrip().replace("12,000", "many") + after)
    better = dataclasses.replace(RECORD, metrics={"eval_perplexity": 19.0}, steps=13_000)
    write_model_card(tmp_path, dataclasses.replace(REPORT, options={"method": "uniform"}), record=better)
    text = path.read_text()
    assert text.split(BEGIN)[0].splitlines()[-2] == before.splitlines()[-2] == "# me/student"
    assert text.endswith(END + after) and "13,000 steps" in text and "many" not in text
    assert "| perplexity | 19 | 16.5 | 41.5 | 90.0% |" in text and "21.5" not in text
    assert 'from_pretrained("me/student")' in text, "the name in the title is kept"
    assert metadata(path)["tags"] == ["hf_guide", "distillation", "uniform"]


OLD_REPORT = {
    "teacher": "someone/teacher",
    "revision": "0123456789abcdef",
    "teacher_class": "LlamaForCausalLM",
    "student_class": "LlamaForCausalLM",
    "options": {"method": "calibrated", "layers": "influence", "heads": "energy"},
    "hf_guide_version": "0.1.0",
    "transformers_version": "5.21.0",
    "teacher_parameters": 134_515_008,
    "student_parameters": 33_400_000,
    "blocks": {"model.layers": [0, 2]},
    "heads": {},
    "explained_variance": {"embed": [0.5, 0.75, 1.0]},
    "kept": {"embed": 0.75},
    "widths": {"embed": [3, 2]},
    "parameters": [
        {"name": "model.norm.weight", "shape": [2], "source": None, "source_shape": None, "maps": [], "steps": []}
    ],
    "approximations": ["the final gain: fitted in the logits"],
    "randomly_initialized": [],
    "notes": [],
    "calibration": {"tokens": 8192, "own_text": True, "influence": {}, "units": {}, "lost": {}},
    "seconds": {"plan": 1.0},
    "peak_memory_bytes": 2**30,
    "teacher_fingerprint": None,
}
OLD_RECORD = {
    "teachers": [
        {"name": "someone/teacher", "revision": "0123456789abcdef", "weight": 1.0, "captured": True, "license": "mit"}
    ],
    "objective": {"ce": 0.25, "kd": 0.75},
    "temperature": 2.0,
    "divergence": "forward_kl",
    "student_class": "LlamaForCausalLM",
    "task": "text-generation",
    "datasets": ["someone/text"],
    "steps": 12_000,
    "metrics": {"eval_perplexity": 21.5},
    "teacher_metrics": {"eval_perplexity": 16.5},
    "random_metrics": {"eval_perplexity": 41.5},
    "hf_guide_version": "0.1.0",
    "transformers_version": "5.21.0",
}


def test_a_folder_of_the_previous_release_is_redrawn(tmp_path):
    (tmp_path / "initialization_report.json").write_text(json.dumps(OLD_REPORT))
    (tmp_path / "distillation.json").write_text(json.dumps(OLD_RECORD))
    (tmp_path / "README.md").write_text(f"# me/student\n\nMine.\n\n{BEGIN}\n## What it is\n\nOld.\n{END}\n")
    text = body(redraw_card(tmp_path))
    assert "Mine." in text and "Old." not in text and "## Model description" in text
    assert "method `calibrated`" in text and "8192 tokens" in text and "- Loss: 0.25 x `ce` + 0.75 x `kd`" in text
    assert "| someone/text | perplexity | 21.5 | 16.5 | 41.5 | 80.0% |" in text
    assert metadata(tmp_path / "README.md")["base_model"] == "someone/teacher"


def test_line_endings_of_a_card_are_kept(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(MINE.replace("\n", "\r\n").encode())
    content = write_model_card(tmp_path, REPORT).read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n")


def test_a_card_of_text_alone_gets_metadata(tmp_path):
    (tmp_path / "README.md").write_text("mine\n")
    path = write_model_card(tmp_path, REPORT)
    assert body(path).startswith("mine\n\n" + BEGIN) and metadata(path)["base_model"] == "someone/teacher"


@pytest.mark.parametrize(
    "text,message",
    [
        (f"mine\n{BEGIN}\nours", "has only one of the comments"),
        (f"mine\n{END}\nours\n{BEGIN}", "has only one of the comments"),
        ("---\na: [1\n---\nmine", "cannot be read"),
        ("---\n- 1\n---\nmine", "cannot be read"),
    ],
)
def test_a_card_that_cannot_be_parsed_is_an_error_and_left_as_it_is(tmp_path, text, message):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(HfGuideError, match=message):
        write_model_card(tmp_path, REPORT)
    assert (tmp_path / "README.md").read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_an_index_that_the_hub_would_not_understand_is_left_as_it_is(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nmodel-index:\n- name: Mine\n  results:\n  - metrics: []\n---\n")
    text = write_model_card(tmp_path, REPORT, record=RECORD).read_text()
    assert "- name: Mine\n  results:\n  - metrics: []\n" in text and "| perplexity | 21.5 |" in text


def test_a_folder_of_nobody_has_no_card(tmp_path):
    with pytest.raises(HfGuideError, match="contains neither initialization_report.json nor distillation.json"):
        redraw_card(tmp_path)
    with pytest.raises(NotADirectoryError, match="missing is not a folder"):
        redraw_card(tmp_path / "missing")


def test_a_local_teacher_is_no_base_model_and_its_path_stays_private(tmp_path):
    report = dataclasses.replace(REPORT, teacher=str(tmp_path / "teacher-folder"), approximations=[])
    path = write_model_card(tmp_path / "student", report)
    assert "base_model" not in metadata(path) and "license" not in metadata(path)
    assert str(tmp_path) not in path.read_text() and "`teacher-folder`" in path.read_text()
    assert "could not be transferred" not in path.read_text()


def test_the_licence_is_that_of_the_teachers_card(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    head = "license: other\nlicense_name: big\nlicense_link: LICENSE\nlanguage:\n- en\n- de\ntags: [theirs]\n"
    (teacher / "README.md").write_text(f"---\n{head}---\n")
    known = teacher_record(str(teacher))
    assert known == TeacherRecord(
        "teacher", license="other", license_name="big", license_link="LICENSE", languages=["en", "de"], source="local"
    )
    path = write_model_card(tmp_path / "student", dataclasses.replace(REPORT, teacher=str(teacher)))
    data = metadata(path)
    assert (data["license"], data["license_name"]) == ("other", "big")
    assert "license_link" not in data, "the file is not in the student's folder"
    assert "License: big (the teacher's)." in body(path)
    assert data["language"] == ["en", "de"] and data["tags"] == ["hf_guide", "guide"]
    (teacher / "README.md").unlink()
    write_model_card(tmp_path / "student", dataclasses.replace(REPORT, teacher=str(teacher)))
    assert metadata(path) == data, "what was known stays known"


def test_a_teachers_card_that_cannot_be_read_gives_no_licence(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    assert teacher_record(str(tmp_path)).license is None
    assert "license is not known" in caplog.text
    assert teacher_record("nobody/that-was-ever-cached").license is None


def test_without_matplotlib_the_card_shows_no_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = dataclasses.replace(REPORT, explained_variance={"embed": [0.5, 1.0]})
    assert PLOT_NAME not in write_model_card(tmp_path, report).read_text()


def test_the_plots_are_saved_next_to_the_card(tmp_path):
    pytest.importorskip("matplotlib")
    curve = {"embed": [0.5, 0.75, 1.0]}
    report = dataclasses.replace(
        REPORT, explained_variance=curve, sizes={"embed": [3, 2]}, variance_explained={"embed": 0.75}
    )
    record = dataclasses.replace(RECORD, history=[{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    path = write_model_card(tmp_path, report, record=record)
    for name in (PLOT_NAME, TRAINING_PLOT_NAME):
        assert f"]({name})\n\n" in path.read_text()
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_stock_class_loads_a_student_of_ones_own_class_and_its_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    text = write_model_card(
        tmp_path, dataclasses.replace(REPORT, student_class="MyStudent"), model_id="me/s"
    ).read_text()
    assert (
        "from transformers import AutoTokenizer, LlamaForCausalLM\n" in text
        and "MyStudent" not in text.split("```")[1]
    )
    assert 'tokenizer = AutoTokenizer.from_pretrained("me/s")\nmodel = LlamaForCausalLM' in text


def test_the_card_of_an_adapter_names_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/student"}))
    path = write_model_card(tmp_path, record=RECORD, model_id="me/adapter")
    assert metadata(path)["base_model"] == "me/student" and metadata(path)["library_name"] == "peft"
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/adapter")' in path.read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own call
def test_the_blank_card_that_peft_saves_is_replaced_and_holds_no_path(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.distillation.small import llama

    base, folder = tmp_path / "base", tmp_path / "adapter"
    llama(1).save_pretrained(base)
    adapted = get_peft_model(
        llama(1).from_pretrained(base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(folder)
    assert str(base) in (folder / "README.md").read_text()
    path = write_model_card(folder, record=RECORD, model_id="me/adapter")
    assert body(path).lstrip().startswith("# me/adapter") and "More Information Needed" not in path.read_text()
    assert metadata(path)["library_name"] == "peft" and "lora" in metadata(path)["tags"]
    (folder / "README.md").write_text(f"{path.read_text()}\nMy own words.\n")
    adapted.save_pretrained(folder)  # PEFT puts its base into a card that is there, too
    path = write_model_card(folder, record=RECORD, model_id="me/adapter")
    assert str(tmp_path) not in path.read_text() and "My own words." in path.read_text()


def test_a_saved_report_holds_no_path(tmp_path):
    dataclasses.replace(REPORT, teacher=str(tmp_path / "big")).save(tmp_path)
    assert InitializationReport.load(tmp_path) == dataclasses.replace(REPORT, teacher="big", revision=None)
    REPORT.save(tmp_path)
    assert InitializationReport.load(tmp_path) == REPORT


def test_a_card_that_is_there_stays_where_the_hub_cannot_be_reached(tmp_path):
    with pytest.raises(OSError, match="cannot"):
        fetch_card("me/never-reached", tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert fetch_card("me/never-reached", tmp_path) == tmp_path / "README.md"
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_blank_card_gives_way_to_that_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "hub.md").write_text("# Theirs\n")
    asked = []

    def download(repo_id, name, *, local_dir, **where):
        asked.append((repo_id, name, where))
        return str(tmp_path / "hub.md")

    monkeypatch.setattr("hf_guide.hub.push.hf_hub_download", download)
    folder = tmp_path / "adapter"
    folder.mkdir()
    ModelCard.from_template(ModelCardData(library_name="peft")).save(folder / "README.md")
    fetch_card("me/adapter", folder, token="hf_one", revision="dev")
    assert body(folder / "README.md") == "# Theirs\n"
    assert asked == [("me/adapter", "README.md", {"token": "hf_one", "revision": "dev"})]


@pytest.mark.parametrize(
    "teacher,revision,expected",
    [
        ("org/name", None, "org/name"),
        ("gpt2", "607a30d7", "gpt2"),
        ("LlamaForCausalLM", None, None),
        ("/data/teacher", None, None),
        ("./teacher", None, None),
        ("a/b/c", None, None),
    ],
)
def test_only_ids_of_the_hub_count_as_base_models(teacher, revision, expected):
    report = dataclasses.replace(REPORT, teacher=teacher, revision=revision)
    assert report.first_stage.repo_id == expected


def test_words_of_a_card_that_yaml_once_read_as_booleans_stay_words(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "---\nlanguage: no\ntags: [on, off]\nwidget:\n- text: yes\ninference: false\nnew: TRUE\n---\n# Mine\n"
    )
    data = metadata(write_model_card(tmp_path, REPORT))
    assert (data["language"], data["tags"][:2], data["widget"]) == ("no", ["on", "off"], [{"text": "yes"}])
    assert data["inference"] is False and data["new"] is True
    first = path.read_text()
    assert write_model_card(tmp_path, REPORT).read_text() == first


@pytest.mark.parametrize("model_id", ["me/my_student", "me/student"])
@pytest.mark.parametrize("title", ["", "# s1\n", "# TCP/IP\n"])
def test_an_id_stays_whatever_the_title_is(tmp_path, title, model_id):
    (tmp_path / "README.md").write_text(title)
    write_model_card(tmp_path, REPORT, model_id=model_id)
    assert f'from_pretrained("{model_id}")' in body(write_model_card(tmp_path, REPORT))


def test_a_title_is_no_id(tmp_path):
    (tmp_path / "README.md").write_text("# TCP/IP\n\nMine.\n")
    assert f'from_pretrained("{tmp_path.name}")' in body(write_model_card(tmp_path, REPORT))
    assert f'from_pretrained("{tmp_path.name}")' in body(write_model_card(tmp_path, REPORT))


def test_the_name_of_a_folder_is_that_of_the_folder_as_it_is(tmp_path):
    write_model_card(tmp_path / "before", REPORT)
    (tmp_path / "before").rename(tmp_path / "after")
    assert 'from_pretrained("after")' in body(write_model_card(tmp_path / "after", REPORT))


@pytest.mark.parametrize("files", [{"modules.json": "[]"}, {"adapter_config.json": "{}"}])
def test_the_id_is_kept_in_every_kind_of_code(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    first = body(write_model_card(tmp_path, REPORT, model_id="me/my_student"))
    assert body(write_model_card(tmp_path, REPORT)) == first and '"me/my_student")' in first


# Where a teacher was loaded from


def in_a_folder_of(tmp_path, monkeypatch, name):
    """Save a teacher as a relative path and go there; its folder is moved away later."""
    monkeypatch.chdir(tmp_path)
    KINDS["llama"].teacher().save_pretrained(name)
    (Path(name) / "README.md").write_text("---\nlicense: mit\n---\n")


def move_and_put_another(name):
    """Move a folder, and put another one with a card of its own at the last part of its path."""
    Path(name).rename("moved")
    other = Path(name).name
    Path(other).mkdir(exist_ok=True)
    (Path(other) / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")


@pytest.mark.parametrize("name", ["models/teacher", "teacher"])
@pytest.mark.parametrize("loaded", [False, True])
def test_the_folder_of_a_report_is_no_id_and_is_not_looked_up_elsewhere(tmp_path, monkeypatch, name, loaded):
    in_a_folder_of(tmp_path, monkeypatch, name)
    teacher = LlamaForCausalLM.from_pretrained(name) if loaded else name
    student = from_teacher(teacher, num_hidden_layers=1, show_progress=False)
    move_and_put_another(name)
    student.save_pretrained("student")
    path = write_model_card("student")
    text = path.read_text()
    assert "base_model" not in metadata(path) and "license" not in metadata(path) and "gpl" not in text
    assert "from `teacher` (" in text and "huggingface.co" not in text
    report = InitializationReport.load("student")
    assert (report.teacher, report.revision, report.teacher_source) == ("teacher", None, "local")
    second = from_teacher("student", num_hidden_layers=1, hidden_size=16, head_dim=4, show_progress=False)
    path = write_model_card("second", second.initialization_report)
    assert "base_model" not in metadata(path) and "license" not in metadata(path)


def test_the_folder_of_a_report_is_read_where_its_weights_are_the_same(tmp_path, monkeypatch):
    in_a_folder_of(tmp_path, monkeypatch, "teacher")
    from_teacher("teacher", num_hidden_layers=1, show_progress=False).save_pretrained("student")
    assert metadata(write_model_card("student"))["license"] == "mit"


@pytest.mark.parametrize("name", ["gpt2", "someone/teacher"])
def test_a_repository_of_a_report_stays_one_where_a_folder_has_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    (Path(name) / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    for each in (REPORT, dataclasses.replace(REPORT, teacher_source="hub", teacher=name)):
        each.save("student")
        assert each is REPORT or InitializationReport.load("student") == each
    path = write_model_card("student")
    assert metadata(path)["base_model"] == name and "license" not in metadata(path)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["models/teacher", "teacher"])
def test_the_folder_of_a_training_is_no_id_and_is_not_looked_up_elsewhere(tmp_path, monkeypatch, name, captured):
    in_a_folder_of(tmp_path, monkeypatch, name)
    student = from_teacher(name, num_hidden_layers=1, show_progress=False)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    if captured:
        capture_teacher(name, rows, "capture", data_collator=default_data_collator, show_progress=False)
    args = DistillationArguments(
        str(tmp_path / "run"), losses={"kd": 1.0}, max_steps=1, report_to="none", use_cpu=True
    )
    source = Capture.open("capture") if captured else name
    trainer = DistillationTrainer(student, args, default_data_collator, rows, teacher=source)
    trainer.train()
    Path(name).rename("moved")
    Path("elsewhere/teacher").mkdir(parents=True)
    Path("elsewhere/teacher/README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    monkeypatch.chdir("elsewhere")
    trainer.save_model()
    trainer.create_model_card()
    (teacher,) = load_record(tmp_path / "run").teachers
    assert (teacher.name, teacher.source, teacher.repo_id, teacher.license) == ("teacher", "local", None, None)
    path = write_model_card(tmp_path / "run")
    assert "base_model" not in metadata(path) and "huggingface.co" not in path.read_text()


# Results


def result(metric, value):
    return EvalResult("text-generation", "someone/text", "Some text", metric, value)


def test_results_stay_with_the_weights_that_they_were_measured_on(tmp_path, caplog):
    student = from_teacher(KINDS["llama"].teacher(), num_hidden_layers=1, show_progress=False)
    student.save_pretrained(tmp_path)
    path = write_model_card(tmp_path, model_id="me/student", results=[result("perplexity", 21.5)])
    path.write_text(path.read_text().replace("# me/student", "# Mine\n\nMy own words, perplexity 21.5."))
    student.save_pretrained(tmp_path)
    write_model_card(tmp_path)
    assert "| perplexity | 21.5 |" in body(path) and "model-index" in metadata(path) and not caplog.text
    with torch.no_grad():
        student.model.norm.weight.fill_(2.0)
    student.save_pretrained(tmp_path)
    write_model_card(tmp_path, results=[result("accuracy", 0.5)])
    assert "| perplexity |" not in body(path) and "| accuracy | 0.5 |" in body(path)
    (entry,) = ModelCard.load(path).data.eval_results
    assert entry.metric_type == "accuracy" and "My own words, perplexity 21.5." in body(path)
    assert "measured on other weights" in caplog.text and "21.5" in caplog.text


def test_results_of_a_card_that_no_weights_are_known_of_stay(tmp_path):
    path = tmp_path / "README.md"
    results = [result("perplexity", 21.5)]
    path.write_text(str(ModelCard(f"---\n{ModelCardData(model_name='mine', eval_results=results)}\n---\n# Mine\n")))
    from_teacher(KINDS["llama"].teacher(), num_hidden_layers=1, show_progress=False).save_pretrained(tmp_path)
    assert "| perplexity | 21.5 |" in body(write_model_card(tmp_path))
    assert "| perplexity | 21.5 |" in body(write_model_card(tmp_path))


# Options that the Hub would refuse


@pytest.mark.parametrize(
    "options, message",
    [
        ({"license": "Apache-2.0"}, "license must be an identifier of the Hub.*'Apache-2.0'.*apache-2.0"),
        ({"license": "my own"}, "For a license that is not among them use other"),
        ({"language": "English"}, "language must be an ISO 639 code.*'English'"),
        ({"language": ["en", "pt-BR"]}, "found 'pt-BR'"),
        ({"datasets": ["my data"]}, "dataset_name must be the id of a repository on the Hub"),
        ({"model_id": "me/my student"}, "model_id must be the id of a repository on the Hub"),
    ],
)
def test_an_option_that_the_hub_would_refuse_is_an_error(tmp_path, options, message):
    save_record(tmp_path, RECORD)
    with pytest.raises(OptionError, match=message):
        redraw_card(tmp_path, **options)
    assert not (tmp_path / "README.md").exists()


def test_a_license_that_may_be_newer_than_the_list_is_a_warning(tmp_path, caplog):
    assert metadata(write_model_card(tmp_path, REPORT, license="apache-3.0"))["license"] == "apache-3.0"
    assert "may refuse the card" in caplog.text and "apache-2.0" in caplog.text


def test_one_tag_or_dataset_may_be_a_string(tmp_path):
    data = metadata(write_model_card(tmp_path, REPORT, tags="small", datasets="me/data"))
    assert data["tags"] == ["hf_guide", "guide", "small"] and data["datasets"] == ["me/data"]
