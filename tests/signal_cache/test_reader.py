"""What is read back is what the teacher message, wherever an example stands and however it is padded."""

import copy
import pickle
import textwrap

import pytest
import torch
from torch.utils.data import DataLoader

from hf_guide.distillation.losses.divergences import divergence
from hf_guide.errors import CaptureError, OptionError
from hf_guide.signal_cache.reader import Capture, CaptureDataCollator
from hf_guide.signal_cache.writer import capture_teacher
from hf_guide.teachers.signals import DenseTarget, TopKTarget
from tests.signal_cache.tiny_teachers import TEACHERS, VOCABULARY, Examples, Pad, examples_for, run_teacher
from tests.tiny import run_python

ALL = {"top_k": VOCABULARY, "log_prob_dtype": "float32", "hidden_dtype": "float32"}
LAYERS = {"hidden_layers": [1, -1], "save_penultimate": True}
LANGUAGE = ["causal-lm", "masked-lm", "seq2seq-lm"]


def capture(kind, dataset, folder, **config):
    settings = {"shard_size": 7, "batch_size": 3, **config}
    if kind.model_class not in ("LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"):
        settings.pop("top_k", None)
    return capture_teacher(kind.teacher(), dataset, folder, data_collator=Pad(), config=settings, show_progress=False)


@pytest.mark.parametrize("task", TEACHERS)
def test_a_capture_of_everything_equals_the_live_teacher_in_another_order_and_padding(task, tmp_path):
    kind, dataset = TEACHERS[task], examples_for(task)
    made = capture(kind, dataset, tmp_path, **ALL, **LAYERS)
    assert len(made) == len(dataset) and str(made.task) == task.partition(" ")[0]
    collate = CaptureDataCollator(Pad(extra=3), made)
    batch = collate([dataset[number] for number in (20, 3, 11, 3)])
    live = run_teacher(kind.teacher(), batch, output_hidden_states=True)
    states = live.get("hidden_states") or live.decoder_hidden_states
    seen = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    if task == "seq2seq-lm":
        seen = batch["labels"] != -100
    by_item = seen if made.task.is_per_token else slice(None)
    expected = live.logits.log_softmax(-1) if made.task.is_language_model else live.logits
    torch.testing.assert_close(batch["teacher_logits"][by_item], expected[by_item], atol=2e-5, rtol=1e-5)
    for layer in (1, 4):
        torch.testing.assert_close(batch[f"teacher_hidden_{layer}"][seen], states[layer][seen], atol=2e-5, rtol=1e-5)
    embedding = batch["teacher_features"]
    assert embedding.shape[-1] == states[-1].shape[-1] and embedding.ndim == (3 if made.task.is_per_token else 2)
    if made.task.is_per_token and seen is not Ellipsis:
        assert not batch["teacher_logits"][~seen].any() and not batch["teacher_hidden_1"][~seen].any()


@pytest.mark.parametrize("task", ["sequence-classification", "sequence-classification of a decoder", "causal-lm"])
def test_the_embedding_is_what_makes_the_logits(task, tmp_path):
    kind, dataset = TEACHERS[task], examples_for(task)
    made, model = capture(kind, dataset, tmp_path, **ALL, save_penultimate=True), kind.teacher()
    batch = CaptureDataCollator(Pad(), made)(dataset[:4])
    head = next(getattr(model, name) for name in ("classifier", "score", "lm_head") if hasattr(model, name))
    recomputed, captured = head(batch["teacher_features"]), batch["teacher_logits"]
    if made.task.is_per_token:
        seen = batch["attention_mask"].bool()
        recomputed, captured = recomputed.log_softmax(-1)[seen], captured[seen]
    torch.testing.assert_close(recomputed, captured, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", LANGUAGE)
def test_the_largest_k_and_the_tails_mass_are_the_live_teachers_at_every_captured_temperature(task, tmp_path):
    kind, dataset, k = TEACHERS[task], examples_for(task), 10
    made = capture(kind, dataset, tmp_path, top_k=k, temperatures=[2.0, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        batch = CaptureDataCollator(Pad(extra=1), made, temperature)([dataset[4], dataset[17], dataset[0]])
        seen = batch["labels"] != -100 if task == "seq2seq-lm" else batch["attention_mask"].bool()
        log_probs = run_teacher(kind.teacher(), batch).logits[seen].double().log_softmax(-1)
        best = log_probs.topk(k)
        indices, mine = batch["teacher_topk_indices"][seen], batch["teacher_topk_log_probs"][seen]
        assert indices.dtype == torch.int64 and torch.equal(indices, best.indices)
        torch.testing.assert_close(mine.double(), best.values, atol=5e-3, rtol=1e-3)  # they were float16
        normalizer = batch["teacher_log_normalizer"][seen]
        torch.testing.assert_close(normalizer.double(), (log_probs / temperature).logsumexp(-1), atol=5e-3, rtol=1e-3)
        heads = (mine.double() / temperature - normalizer.double()[:, None]).exp().sum(-1)
        exact = (best.values / temperature - (log_probs / temperature).logsumexp(-1, keepdim=True)).exp().sum(-1)
        torch.testing.assert_close(1 - heads, 1 - exact, atol=1e-6, rtol=1e-4)  # the mass is not rounded as they were
        assert temperature != 1.0 or not normalizer.any()


def test_the_captured_divergence_is_a_lower_bound_of_the_live_one_and_equals_it_with_all_classes(tmp_path):
    kind, dataset = TEACHERS["causal-lm"], examples_for("causal-lm")
    student = TEACHERS["causal-lm"].teacher(num_hidden_layers=1)
    values = {}
    for k in (1, 8, 64, VOCABULARY):
        made = capture(kind, dataset, tmp_path / str(k), top_k=k, log_prob_dtype="float32", temperatures=[3.0])
        batch = CaptureDataCollator(Pad(), made, 3.0)(dataset[:5])
        seen = batch["attention_mask"].bool()
        if k == VOCABULARY:
            target = DenseTarget(batch["teacher_logits"][seen])
        else:
            target = TopKTarget(
                *(batch[f"teacher_{name}"][seen] for name in ("topk_indices", "topk_log_probs", "log_normalizer"))
            )
        values[k] = divergence(run_teacher(student, batch).logits[seen], target, temperature=3.0)
        live = divergence(
            run_teacher(student, batch).logits[seen],
            DenseTarget(run_teacher(kind.teacher(), batch).logits[seen]),
            temperature=3.0,
        )
    for fewer, more in ((1, 8), (8, 64), (64, VOCABULARY)):
        assert (values[fewer] <= values[more] + 1e-5).all() and values[fewer].sum() < values[more].sum()
    torch.testing.assert_close(values[VOCABULARY], live, atol=1e-5, rtol=1e-5)


def test_padding_on_the_left_finds_the_same_signals_at_their_tokens(tmp_path):
    dataset = examples_for("causal-lm")
    made = capture(TEACHERS["causal-lm"], dataset, tmp_path, **ALL)
    right, left = (CaptureDataCollator(Pad(side), made)(dataset[:6]) for side in ("right", "left"))
    for name in right:
        at = [batch[name][batch["attention_mask"].bool()] for batch in (right, left)]
        assert torch.equal(*at), name
    assert not torch.equal(right["teacher_logits"], left["teacher_logits"])


def test_shuffled_epochs_over_worker_processes_need_no_teacher(tmp_path):
    dataset = examples_for("causal-lm")
    made = capture(TEACHERS["causal-lm"], dataset, tmp_path, top_k=8)
    alone = {made.keys(Pad()([example]))[0]: CaptureDataCollator(Pad(), made)([example]) for example in dataset}
    loader = DataLoader(
        dataset,
        batch_size=4,
        shuffle=True,
        num_workers=2,
        collate_fn=CaptureDataCollator(Pad(), Capture.open(tmp_path)),
    )
    for _ in range(2):
        seen = 0
        for batch in loader:
            for row, key in enumerate(made.keys(batch)):
                length = int(batch["attention_mask"][row].sum())
                assert torch.equal(
                    batch["teacher_topk_log_probs"][row, :length], alone[key]["teacher_topk_log_probs"][0]
                )
                seen += 1
        assert seen == len(dataset)


def test_a_collator_is_sent_to_a_process_without_what_it_reads(tmp_path):
    dataset = examples_for("causal-lm")
    made = capture(TEACHERS["causal-lm"], dataset, tmp_path, top_k=8)
    collate = CaptureDataCollator(Pad(), made)
    expected = collate(dataset[:3])
    sent = pickle.dumps(collate)
    assert len(sent) < 5000 < sum(file.stat().st_size for file in tmp_path.iterdir())
    found = pickle.loads(sent)(dataset[:3])
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_example_that_was_not_captured_is_an_error_or_leaves_the_batch_without_signals(tmp_path):
    dataset = examples_for("causal-lm")
    made = capture(TEACHERS["causal-lm"], dataset[:20], tmp_path, top_k=8)
    other = copy.deepcopy(dataset[0])
    other["input_ids"][-1] = 1 + (other["input_ids"][-1] + 1) % (VOCABULARY - 1)
    for missing in (dataset[21], other, {"input_ids": dataset[0]["input_ids"][:-1]}):
        with pytest.raises(CaptureError, match="is not in .*masked at random, truncated or tokenised otherwise"):
            CaptureDataCollator(Pad(), made)([dataset[0], missing])
        batch = CaptureDataCollator(Pad(), made, missing="skip")([dataset[0], missing])
        assert set(batch) == {"input_ids", "attention_mask"}
    assert "teacher_topk_indices" in CaptureDataCollator(Pad(), made, missing="skip")(dataset[:2])
    with pytest.raises(OptionError, match="missing must be 'error' or 'skip'; found 'ignore'"):
        CaptureDataCollator(Pad(), made, missing="ignore")


def test_token_types_distinguish_examples_unless_they_are_zero_or_ignored(tmp_path):
    dataset = examples_for("masked-lm")
    kind = TEACHERS["sequence-classification"]

    def typed(features):
        batch = Pad()(features)
        return batch | {"token_type_ids": batch["attention_mask"] * (torch.arange(batch["input_ids"].shape[1]) > 1)}

    def zero(features):
        batch = Pad()(features)
        return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}

    def made(folder, collator, **config):
        return capture_teacher(
            kind.teacher(), dataset, folder, data_collator=collator, config=config, show_progress=False
        )

    plain = made(tmp_path / "plain", zero)
    assert "teacher_logits" in CaptureDataCollator(Pad(), plain)(dataset[:2])
    with pytest.raises(CaptureError, match="is not in"):
        CaptureDataCollator(Pad(), made(tmp_path / "typed", typed))(dataset[5:7])
    ignoring = made(tmp_path / "ignoring", typed, ignored_inputs=["token_type_ids"])
    assert "teacher_logits" in CaptureDataCollator(Pad(), ignoring)(dataset[5:7])


def test_a_temperature_that_was_not_captured_is_an_error_where_the_tail_needs_it(tmp_path):
    dataset = examples_for("causal-lm", 3)
    made = capture(TEACHERS["causal-lm"], dataset, tmp_path / "some", top_k=8, temperatures=[2.0])
    with pytest.raises(CaptureError, match=r"temperature=4.0 was not captured; .* has \[1.0, 2.0\]"):
        CaptureDataCollator(Pad(), made, 4.0)
    CaptureDataCollator(Pad(), capture(TEACHERS["causal-lm"], dataset, tmp_path / "all", **ALL), 4.0)(dataset)


def test_batches_without_content_or_with_packed_rows_are_errors(tmp_path):
    dataset = examples_for("causal-lm", 3)
    made = capture(TEACHERS["causal-lm"], dataset, tmp_path, top_k=8)
    with pytest.raises(CaptureError, match="none of input_ids"):
        made.keys({"labels": torch.zeros(2, 3)})
    with pytest.raises(CaptureError, match=r"attention_mask has the shape \(1, 1, 4, 4\)"):
        made.keys({"input_ids": torch.zeros(1, 4), "attention_mask": torch.zeros(1, 1, 4, 4)})


def test_the_same_example_twice_is_found(tmp_path):
    example = {"input_ids": [5, 6, 7]}
    made = capture(TEACHERS["causal-lm"], Examples([example] * 9 + [{"input_ids": [5, 6, 8]}]), tmp_path, top_k=8)
    batch = CaptureDataCollator(Pad(), made)([example, example])
    assert torch.equal(batch["teacher_topk_log_probs"][0], batch["teacher_topk_log_probs"][1])


@pytest.mark.extended
def test_neither_capturing_nor_reading_holds_the_dataset_in_memory(tmp_path):
    script = """
    import resource, sys
    from pathlib import Path
    from hf_guide.signal_cache.writer import capture_teacher
    from hf_guide.signal_cache.reader import Capture, CaptureDataCollator
    from tests.signal_cache.tiny_teachers import TEACHERS, Pad

    class Long:
        def __init__(self, count): self.count = count
        def __len__(self): return self.count
        def __getitem__(self, number): return {"input_ids": [3 + number // 90, 3 + number % 90] * 16}

    def resident(kind):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(kind)))

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = {"top_k": 8, "hidden_layers": [0, 1, 2, 3, 4], "hidden_dtype": "float32", "batch_size": 32}
    config["shard_size"] = 320
    def run(count, name):
        capture_teacher(TEACHERS["causal-lm"].teacher(), Long(count), f"{sys.argv[1]}/{name}", data_collator=Pad(),
                        config=config, show_progress=False)
        return sum(file.stat().st_size for file in Path(sys.argv[1], name).iterdir())
    run(160, "small")
    before, size = peak(), run(1600, "big")
    grown, whole = peak() - before, resident("VmRSS")
    collate = CaptureDataCollator(Pad(), Capture.open(f"{sys.argv[1]}/big"))
    collate([Long(1600)[7]])
    one, own = resident("VmRSS") - whole, resident("RssAnon")
    for number in range(0, 1600, 3):  # what is mapped of the files is the system's, and it takes it back when it likes
        collate([Long(1600)[number]])
    print(size // 1024, grown, one, resident("RssAnon") - own)
    """
    found = run_python(textwrap.dedent(script), tmp_path, OMP_NUM_THREADS="1").split()
    size, capturing, first, reading = map(int, found)
    assert size > 45_000  # KiB
    assert max(capturing, first, reading) < size / 4, found
