"""A teacher of a folder runs block by block, and gives the same student as one in memory."""

import errno
import gc
import io
import itertools
import json
import logging
import os
import re
import shutil
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_guide import OptionError, TeacherError, from_teacher
from hf_guide.calibration import collection, refit, resume, streams
from hf_guide.calibration.block_weights import BlockWeights, model_without_weights
from hf_guide.calibration.head_fitting import HeadFitter
from hf_guide.calibration.modules import find_modules
from hf_guide.calibration.recorded_inputs import InputRecorder
from hf_guide.calibration.sequential import SequentialBlocks, SequentialModel
from hf_guide.calibration.streams import Streams, StreamStore
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.teachers.checkpoint import open_teacher
from hf_guide.teachers.tensor_source import SafetensorsTensors
from tests.calibration.small_students import BART, SHALLOWER, kind_batches, make_student, token_batches
from tests.invariants.test_laws import layout_of
from tests.tiny import KINDS, run_python, same_bits


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "default_device", lambda: torch.device("cpu"))  # where the one in memory is


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "bert", "t5", "bart", "mixtral", "vit"])
def test_the_student_is_the_same_from_a_folder_and_from_memory_and_with_activations_on_disk(
    name: str, tmp_path: Path
) -> None:
    kind = BART if name == "bart" else KINDS[name]
    teacher = kind.teacher()
    teacher.save_pretrained(tmp_path)

    def make(source: Any, **method: Any) -> Any:
        return from_teacher(
            source,
            method={"method": "calibrated", **method},
            calibration_dataset=kind_batches(kind),
            show_progress=False,
            **kind.smaller,
        )

    expected = make(teacher)
    for student in (make(tmp_path), make(tmp_path, activation_memory=0)):
        assert same_bits(student, expected)
        assert student.initialization_report.approximations == expected.initialization_report.approximations
    together = [
        note for note in expected.initialization_report.approximations if "were in memory and ran together: " in note
    ]
    assert bool(together) == (name == "t5"), (
        "a stack that does not run block by block is in the report, with the reason"
    )


def kind_student(name: str) -> Any:
    """Return a calibrated student of a kind's teacher."""
    kind = BART if name == "bart" else KINDS[name]
    return from_teacher(
        kind.teacher(),
        method="calibrated",
        calibration_dataset=kind_batches(kind),
        show_progress=False,
        **kind.smaller,
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama", "mixtral", "bart"])
@pytest.mark.parametrize("recorded", [0, 1])
def test_blocks_that_are_not_recorded_run_again_to_the_same_bits(
    name: str, recorded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = itertools.count()
    expected = kind_student(name)
    monkeypatch.setattr(InputRecorder, "has_space", lambda self, streams: next(spaces) < recorded)
    assert same_bits(kind_student(name), expected)
    assert next(spaces) > recorded


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["llama", "mixtral", "bart"])
@pytest.mark.parametrize("written", [0, 1, 7, 12, 50])
def test_inputs_that_cannot_be_recorded_do_not_change_the_student(
    name: str, written: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The budget holds all activations, so that no file is needed but those of what is recorded."""
    failures, writes = 0, itertools.count()
    files: weakref.WeakSet[io.FileIO] = weakref.WeakSet()
    open_file = StreamStore.open_file

    class Limited(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal failures
            if next(writes) < written:
                return super().write(data)
            assert not failures, "nothing is written any more"
            failures += 1
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def opening(self: StreamStore) -> io.FileIO:
        with open_file(self) as file:
            files.add(limited := Limited(os.dup(file.fileno()), "r+b"))
        return limited

    expected = kind_student(name)
    monkeypatch.setattr(StreamStore, "open_file", opening)
    with caplog.at_level(logging.WARNING, logger="hf_guide"):
        assert same_bits(kind_student(name), expected) and failures == 1
    assert caplog.text.count("cannot be recorded ([Errno 27] File too large)") == 1
    gc.collect()
    assert not files


def test_one_block_is_in_memory_at_a_time_and_read_once_per_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KINDS["llama"].teacher().save_pretrained(tmp_path)
    reads: list[int] = []
    in_memory: list[int] = []
    load = BlockWeights._load

    def counting(self: BlockWeights, block: nn.Module | None) -> None:
        if block is not None:
            reads.append(self._blocks.index(block))
            in_memory.append(sum(not weight.is_meta for each in self._blocks for weight in each.parameters()))
        load(self, block)

    monkeypatch.setattr(BlockWeights, "_load", counting)
    make_student(tmp_path, shape=SHALLOWER)
    assert reads == [0, 1, 2, 3] * 3, "to verify the structure, for the statistics, and to choose the blocks"
    reads.clear()
    make_student(tmp_path)
    assert reads == [0, 1, 2, 3] * 2, "sets of blocks are not compared for a narrower student"
    assert set(in_memory) == {0}


@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps"), reason="the memory of a mapped file is in /proc/self/smaps"
)
def test_tables_that_were_read_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an untied head, which the search of the blocks reads whole, would stay to the end."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=65536, tie_word_embeddings=False, pad_token_id=0)
    teacher = LlamaForCausalLM(config)
    teacher.save_pretrained(tmp_path)
    table, file = teacher.lm_head.weight.nbytes, tmp_path / "model.safetensors"
    resident: dict[str, list[int]] = {}

    def measure(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def measuring(*args: Any) -> Any:
            resident.setdefault(name, []).append(_resident_bytes(file))
            return original(*args)

        monkeypatch.setattr(owner, name, measuring)

    measure(SequentialBlocks, "run_block")
    measure(refit, "assign_checked")  # also of some rows of the head
    measure(HeadFitter, "_kl_derivatives")
    make_student(tmp_path, token_batches(2))
    largest = {name: max(found) for name, found in resident.items()}
    assert largest["run_block"] < table / 4
    assert largest["_kl_derivatives"] < table / 4
    assert largest["assign_checked"] < table / 2


def _resident_bytes(file: Path) -> int:
    """Return how much of a mapped file is in this process's memory."""
    counts, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            is_file = line.endswith(str(file))
        elif is_file and first == "Rss:":
            counts += int(line.split()[1]) * 1024
    return counts


def test_of_a_mixture_one_expert_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["mixtral"]
    kind.teacher().save_pretrained(tmp_path)
    calls: Counter[int] = Counter()
    reads: Counter[tuple[str, int]] = Counter()
    alive: list[StorageWeakRef] = []
    read, run = SafetensorsTensors.rows, MixtralExperts.forward

    def counting(self: SafetensorsTensors, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = read(self, name, start, stop)
        if len(self.shape(name)) == 3:
            assert stop == start + 1 and all(each.expired() for each in alive)
            reads[name, start] += 1
            alive[:] = [StorageWeakRef(tensor.untyped_storage())]
        return tensor

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gate_up_proj.device.type != "meta" and not isinstance(self.gate_up_proj, nn.Parameter):
            calls[id(self)] += 1  # of the teacher, which lives to the end: another module may have had its id before
        return run(self, *args, **kwargs)

    monkeypatch.setattr(SafetensorsTensors, "rows", counting)
    monkeypatch.setattr(MixtralExperts, "forward", forward)
    from_teacher(
        tmp_path,
        method="calibrated",
        calibration_dataset=kind_batches(kind),
        show_progress=False,
        **kind.smaller,
    )
    config = kind.teacher().config
    assert len(reads) == 2 * config.num_hidden_layers * config.num_local_experts
    runs = [count for count in calls.values() if count]  # of each block, in the order of their first runs
    assert len(runs) == config.num_hidden_layers
    for (name, _), count in reads.items():
        assert count <= runs[int(name.split("layers.")[1].split(".")[0])], "an expert once per run of its block"


def test_the_weights_of_a_block_are_read_once_and_in_the_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KINDS["llama"].teacher().save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loads: list[list[tuple[str, int]]] = []
    load, read = BlockWeights._load, SafetensorsTensors.get

    def loading(self: BlockWeights, block: nn.Module | None) -> None:
        with monkeypatch.context() as within:
            loads.append([])
            within.setattr(SafetensorsTensors, "get", reading)
            load(self, block)

    def reading(self: SafetensorsTensors, name: str) -> torch.Tensor:
        ((stored, _),) = self._tensors[name].parts(None)
        loads[-1].append((stored.file, stored.start))
        return read(self, name)

    monkeypatch.setattr(BlockWeights, "_load", loading)
    make_student(tmp_path, shape=SHALLOWER)
    assert len(loads) == 1 + 3 * 4, "the rest once, and each of four blocks once in each of three passes"
    assert all(each == sorted(set(each)) and each for each in loads)


def test_a_model_that_needs_more_than_the_last_hidden_states_runs_as_a_whole(tmp_path: Path) -> None:
    def add_a_skip(model: Any) -> None:
        outputs: list[Any] = []
        model.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
        model.norm.register_forward_pre_hook(lambda module, args: (args[0] + outputs[-1],))

    teacher = KINDS["llama"].teacher()
    teacher.save_pretrained(tmp_path)
    checkpoint = open_teacher(tmp_path)
    model = model_without_weights(checkpoint)
    weights = BlockWeights(model, model.model.layers, checkpoint, torch.device("cpu"))
    for each in (teacher, model):
        add_a_skip(each.model)
    modules = find_modules(model, layout_of(teacher))
    sequential = SequentialModel(model, modules, token_batches(), is_teacher=True, weights=weights)
    with torch.no_grad():
        for index, batch in enumerate(token_batches()):
            torch.testing.assert_close(sequential.forward(index).logits, teacher(**batch).logits)
    assert sequential.finished == {} and not any(weight.is_meta for weight in model.parameters())


def test_only_the_stack_that_does_not_run_by_blocks_stays_in_memory(tmp_path: Path) -> None:
    """A tower that no batch of text runs; the blocks of text are dropped one by one as always."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **sizes},
        text_config={"model_type": "llama", "vocab_size": 96, **sizes},
        image_token_index=4,
        tie_word_embeddings=False,
    )
    teacher = LlavaForConditionalGeneration(config).eval()
    teacher.save_pretrained(tmp_path)
    ids = torch.randint(5, 90, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    ids[1, :, 3:7] = 4
    text, images = ({"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids)
    batches = [text, images | {"pixel_values": torch.randn(2, 3, 8, 8)}]
    checkpoint = open_teacher(tmp_path)
    model = model_without_weights(checkpoint)
    modules = find_modules(model, layout_for(config, LlavaForConditionalGeneration))
    weights = BlockWeights(model, itertools.chain(*modules.blocks.values()), checkpoint, torch.device("cpu"))
    sequential = SequentialModel(model, modules, batches, is_teacher=True, weights=weights)
    with torch.no_grad():
        for index, batch in enumerate(batches):
            torch.testing.assert_close(sequential.forward(index).logits, teacher(**batch).logits)
    in_memory = {
        stack: [not weight.is_meta for block in blocks for weight in block.parameters()]
        for stack, blocks in modules.blocks.items()
    }
    assert len(in_memory) == 2 and sequential.visited == [stack for stack in in_memory if "language_model" in stack]
    assert all(all(found) if "vision" in stack else not any(found) for stack, found in in_memory.items())


def test_streams_on_disk_are_those_in_memory_and_leave_no_file(tmp_path: Path) -> None:
    values = [torch.randn(2, 3, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    store = StreamStore(gigabytes=values[0].nbytes / streams.GIGABYTE, folder=tmp_path)
    kept = Streams(store)
    for value in values:
        kept.append(value)
    assert kept[0] is values[0] and store.bytes_in_memory == values[0].nbytes
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(kept, values, strict=True))
    kept[1] = values[1] * 2
    kept[2] = torch.ones(5)
    assert torch.equal(kept[1], values[1] * 2) and torch.equal(kept[2], torch.ones(5)) and len(kept) == 3
    assert not list(tmp_path.iterdir()), "the file has no name"
    del kept
    assert store.bytes_in_memory == 0


def test_no_space_for_activations_is_an_error_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(streams.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(SequentialModel, "visit", None)
    with pytest.raises(
        OptionError,
        match=r"GB of activations do not fit into temporary files in .*, where 1e-05 GB are free\..*activation_memory",
    ):
        make_student(KINDS["llama"].teacher(), activation_memory=0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device without space is needed")
def test_a_disk_that_fills_up_is_an_error_that_states_what_helps_and_the_call_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = KINDS["llama"].teacher()
    expected = make_student(teacher)
    open_file = StreamStore.open_file

    def filling(self: StreamStore) -> io.FileIO:
        is_full = any((tmp_path / "cache").glob("step-*"))
        return io.FileIO("/dev/full", "r+b") if is_full else open_file(self)

    monkeypatch.setattr(resume, "SECONDS_BETWEEN_SAVES", 0.0)
    with monkeypatch.context() as within:
        within.setattr(StreamStore, "open_file", filling)
        with pytest.raises(OptionError, match=r"GB are free \(No space left on device after.*Set TMPDIR.*continues"):
            make_student(teacher, folder=tmp_path / "cache", activation_memory=0)
    assert same_bits(make_student(teacher, folder=tmp_path / "cache", activation_memory=0), expected)


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (errno.EFBIG, r"File too large.*`ulimit -f`"),
        (errno.EDQUOT, "exceeded.*Raise the disk quota"),
        (errno.EIO, "another"),
    ],
)
@pytest.mark.parametrize("fails", ["open", "write"])
def test_activations_that_cannot_be_written_are_no_lack_of_space(
    number: int, found: str, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.RawIOBase):
        def seek(self, offset: int, whence: int = 0) -> int:
            raise OSError(number, os.strerror(number))

    def open_file(**options: Any) -> Any:
        return Failing() if fails == "write" else Failing().seek(0)

    monkeypatch.setattr(streams.tempfile, "TemporaryFile", open_file)
    with pytest.raises(OptionError, match=rf"activations cannot be written to.*{found}.*raise activation_memory"):
        Streams(StreamStore(gigabytes=0, folder=tmp_path)).append(torch.ones(3))


@pytest.mark.parametrize("change", ["rewritten", "replaced", "removed"])
def test_a_checkpoint_that_changes_between_two_blocks_is_an_error(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KINDS["llama"].teacher().save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / index["model.layers.3.mlp.up_proj.weight"]
    register = collection.collect_statistics.__globals__["_StatisticsCollector"].register_hooks

    def rewriting(self: Any, handles: list[Any], stack: str | None, index: int) -> None:
        if (stack, index) == ("layers.{block}", 2):
            if change == "rewritten":
                os.utime(shard, ns=(1, 1))
            elif change == "replaced":
                shutil.copy(shard, tmp_path / "new")
                os.replace(tmp_path / "new", shard)
            else:
                shard.unlink()
        register(self, handles, stack, index)

    monkeypatch.setattr(collection.collect_statistics.__globals__["_StatisticsCollector"], "register_hooks", rewriting)
    found = "was removed while it was read" if change == "removed" else "has changed since it was opened"
    with pytest.raises(TeacherError, match=f"{shard} {found}"):
        make_student(tmp_path)


@pytest.mark.extended
def test_a_file_that_becomes_shorter_while_it_is_mapped_is_an_error(tmp_path: Path) -> None:
    """Without the check before each block the process would end by SIGBUS, hence a process of its own."""
    KINDS["llama"].teacher().save_pretrained(tmp_path)
    script = """
        import os, shutil, sys
        from hf_guide import TeacherError
        from hf_guide.calibration.sequential import SequentialBlocks
        from tests.calibration.small_students import make_student
        advance, path = SequentialBlocks.advance, sys.argv[1] + "/model.safetensors"
        shutil.copy(path, path + ".whole")
        for count in (1, 5):
            def truncating(self, *args, calls=[]):
                advance(self, *args)
                calls.append(self)
                if len(calls) == count:
                    os.truncate(path, 4096)
            SequentialBlocks.advance = truncating
            try:
                make_student(sys.argv[1])
            except TeacherError as error:
                print(error)
            shutil.copy(path + ".whole", path)
    """
    errors = run_python(script, tmp_path).splitlines()
    assert len(errors) == 2 and "model.safetensors has changed since it was opened, from" in errors[0]
    assert all(re.search(r"model\.safetensors (has changed|is truncated)", error) for error in errors), errors
