"""The teacher run once over a dataset, and what it says written to disk, so that training needs no teacher.

Does: share the shards out among the processes of `torchrun`, go on where a killed run was, refuse to mix two captures.
Does not: read them back (`reading.py`), or hold more than a batch in memory.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed
from transformers import PreTrainedModel

import hf_guide
from hf_guide.capture.collate import Collate, is_by_number
from hf_guide.capture.manifest import MANIFEST_NAME, CaptureManifest
from hf_guide.capture.options import CaptureConfig
from hf_guide.capture.reading import Capture
from hf_guide.capture.run import Run
from hf_guide.capture.signals import Listener, read_signals, resolve_layers
from hf_guide.capture.teachers import load_teacher
from hf_guide.distillation.tasks import Task, task_of, without_adapter
from hf_guide.errors import CaptureError, OptionError
from hf_guide.fingerprints import files_fingerprint, tokenizer_fingerprint, weights_fingerprint
from hf_guide.folders import check_parents, is_partial
from hf_guide.public_names import public_name, without_private_keys
from hf_guide.worlds import world


def capture_teacher(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    config: "CaptureConfig | Mapping[str, Any] | None" = None,
    dtype: "str | torch.dtype | None" = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    trust_remote_code: bool = False,
    dataloader_num_workers: int = 0,
    show_progress: bool = True,
) -> Capture:
    """Run a teacher once over a dataset and write what it says to `output_dir`, in Arrow files.

    Of classifiers all logits are kept; of language models the largest k log-probabilities at each token and the mass of all
    others; hidden states and embeddings on request. Killed at any moment, the same call goes on where it was. Under
    `torchrun` the processes share the work; each calls this, with a folder that all of them see.

    Args:
        teacher: a Hub id, a folder or a loaded model.
        dataset: what the student will be trained on, processed as for `Trainer`: a length, and examples by number.
        output_dir: a new or empty folder, or one that the same call began.
        processing_class: the tokenizer or processor; remembered by its fingerprint, and used to pad.
        data_collator: as for training, but for its padding; by default one that pads.
        config: a `CaptureConfig` or a mapping of its fields.
        dtype: of a teacher that is loaded here; None or "auto" takes the checkpoint's.
        revision, token, trust_remote_code: as in `from_pretrained`.
        dataloader_num_workers: processes that prepare batches beside this one.
        show_progress: whether the first process shows a bar.

    Returns:
        The capture, opened.

    Raises:
        CaptureError: the folder holds something else or a capture with other settings, and which; the teacher says
            something that is not finite, and of which example; the disk is too small.
        OptionError: an option out of range, such as a k over the vocabulary, or a dataset without a length.
        TaskError, TeacherError: a teacher of no known task, or one that cannot be loaded.
    """
    options = CaptureConfig.parse(config)
    folder = Path(output_dir)
    examples = _count(dataset)
    check_folder(folder)
    state = processes()
    if isinstance(teacher, PreTrainedModel) or hasattr(teacher, "get_base_model"):
        if dtype is not None or revision is not None:
            raise OptionError("dtype and revision are for a teacher that is loaded here; this one is loaded already.")
        model: Any = teacher
    elif not isinstance(teacher, (str, os.PathLike)):
        raise OptionError(f"A teacher is a Hub id, a folder or a PreTrainedModel, not a {type(teacher).__name__}.")
    else:
        model = load_teacher(
            teacher,
            dtype=dtype,
            device=state.device,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
        )
    task = task_of(model)
    collate = Collate(model, task, data_collator, processing_class, options.remove_unused_columns)
    was_training = model.training
    model.eval()
    try:
        where = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        listener = Listener(model, task, processing_class, where)
        manifest = describe(teacher, listener, collate([dataset[0]]), examples, processing_class, options)
        run = Run(folder, manifest, listener, dataset, collate, dataloader_num_workers)
        run.begin(state)
        run.write_missing(state, show_progress)
        run.finish(state)
    finally:
        model.train(was_training)
    return Capture.open(folder)


def describe(
    teacher: Any,
    listener: Listener,
    batch: Mapping[str, Any],
    examples: int,
    processing_class: Any,
    options: CaptureConfig,
) -> CaptureManifest:
    """Return the manifest of a capture that is to begin; the first example, collated, shows the shapes.

    Raises:
        OptionError: k or the vocabulary's size is over the teacher's, or it has no such layer.
        CaptureError: the first example already cannot be captured.
    """
    model, task = listener.model, listener.task
    heard = listener.hear(batch, hidden_states=bool(options.hidden_states))
    classes = heard.classes
    if task.is_language_model:
        if options.vocabulary_size is not None and options.vocabulary_size > classes:
            raise OptionError(f"vocabulary_size is {options.vocabulary_size}; the teacher's has {classes} rows.")
        classes = options.vocabulary_size or classes
        if options.top_k > classes:
            raise OptionError(
                f"top_k is {options.top_k}; the vocabulary has {classes} rows, which would keep them all. "
                f"Set top_k to {classes} at most."
            )
    elif options.vocabulary_size is not None:
        raise OptionError(f"vocabulary_size is for language models; the teacher is one for {task}.")
    config = dataclasses.replace(options, hidden_states=resolve_layers(options.hidden_states, len(heard.layers)))
    (first,) = read_signals(listener, batch, config, [0])
    by_place = task is not Task.IMAGE_CLASSIFICATION
    shapes = {}
    for name, array in first.items():
        if name.startswith("hidden_") or (name == "embedding" and task.is_per_token):
            shapes[name] = [-1, *array.shape[1:]] if by_place else list(array.shape)
        elif name == "embedding":
            shapes[name] = list(array.shape)
    bare = without_adapter(model)
    loaded_here = isinstance(teacher, (str, os.PathLike))
    name = os.fspath(teacher) if loaded_here else bare.config._name_or_path or type(bare).__name__
    return CaptureManifest(
        teacher=public_name(name),
        teacher_revision=getattr(bare.config, "_commit_hash", None),
        teacher_class=type(bare).__name__,
        teacher_config=without_private_keys(bare.config.to_dict()),
        teacher_dtype=str(bare.dtype).removeprefix("torch."),
        weights=weights_fingerprint(model),
        files=files_fingerprint(name) if loaded_here and os.path.isdir(name) else None,
        tokenizer=tokenizer_fingerprint(processing_class),
        task=str(task),
        classes=classes,
        examples=examples,
        shapes=shapes,
        config=config,
        hf_guide_version=hf_guide.__version__,
    )


def processes() -> PartialState:
    """Return which of how many processes this is; they speak by gloo where there is no accelerator."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    try:
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    except distributed.DistError as error:
        raise CaptureError(
            f"The {started} processes did not find each other (this is rank {os.environ.get('RANK')}): {error}. Start ranks 0 "
            f"to {started - 1}, each with the same MASTER_ADDR and MASTER_PORT."
        ) from error
    if started != state.num_processes:
        raise CaptureError(
            f"{started} processes were started, and accelerate knows of {state.num_processes}: all would do all of the work. "
            "Call capture_teacher before anything else makes accelerate's PartialState, or make that with cpu=True."
        )
    world()  # from now on the others notice when this process ends
    return state


def _count(dataset: Any) -> int:
    if not is_by_number(dataset):
        raise OptionError(
            f"A capture needs a dataset with a length and examples by number, not a {type(dataset).__name__}: it goes on "
            "where it was. Save a stream to disk first."
        )
    if len(dataset) == 0:
        raise OptionError("The dataset is empty; there is nothing to capture.")
    return len(dataset)


def check_folder(folder: Path) -> None:
    """Refuse an output that is a file, or a folder that holds something else than a capture.

    Raises:
        CaptureError: names what is there.
        OSError: it lies in a file, or in a folder that is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise CaptureError(f"The output {folder} is a file; name a folder that is new, empty, or of this capture.")
    check_parents(folder)
    if folder.is_dir() and not (folder / MANIFEST_NAME).exists():
        others = sorted(path.name for path in folder.iterdir() if not is_partial(path))
        if others:
            raise CaptureError(
                f"The output folder {folder} holds something else: {', '.join(others[:5])}. Name one that is new or empty."
            )
