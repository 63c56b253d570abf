"""Several processes fit the same projector as one, and train on its subclasses as one."""

import pytest
import torch

from hf_guide import SubclassProjector, fit_subclasses
from tests.distributed.launch import run_processes
from tests.distributed.test_gradients import vector
from tests.lelp.test_fitting import examples, teacher_arrays, teacher_of
from tests.signal_cache.tiny_teachers import Pad

RUNS = [("lelp", False), ("lelp", True), ("kmeans", False), ("labels", False)]


@pytest.mark.extended
def test_two_processes_fit_the_projector_of_one(tmp_path):
    actual = run_processes("fit_subclasses.py", 2, {"runs": RUNS, "folder": str(tmp_path)}, tmp_path)
    assert actual["world_size"] == 2 and all(actual["alike"].values())
    assert "label of example 9 is 9" in actual["errors"][1]
    assert actual["errors"][0].startswith("Process 1 failed: The label of example 9 is 9")
    teacher = teacher_of()
    rows = [row | {"fine": 2 * (number % 3) + number % 2} for number, row in enumerate(examples())]
    outputs = teacher_arrays(teacher, rows)
    for splitter, capture in RUNS:
        one = fit_subclasses(
            teacher,
            rows,
            4,
            splitter=splitter,
            fine_label_column="fine",
            data_collator=Pad(),
            batch_size=9,
            show_progress=False,
        )
        two = SubclassProjector.from_pretrained(tmp_path / f"{splitter}-{capture}")
        fine = torch.tensor([row["fine"] for row in rows]) if splitter == "labels" else None
        mine, theirs = (each.transform(outputs.embeddings.double(), outputs.logits, fine) for each in (one, two))
        # Alone, the same batches give the same bits, and only the order of the sums differs.
        assert (mine - theirs).abs().max() < (1e-9 if not capture else 1e-5)


@pytest.mark.extended
def test_two_processes_of_four_train_on_subclasses_as_one_of_eight(tmp_path):
    """Also where a batch has examples without a label, more of them in one process than in the other."""
    actual, objective = [], {"ce": 0.3, "lelp": 0.7}
    for processes in (1, 2):
        sizes = {"per_device_train_batch_size": 8 // processes, "per_device_eval_batch_size": 2}
        params = {"arguments": {"losses": objective} | sizes}
        actual.append(run_processes("lelp_gradients.py", processes, params, tmp_path))
    one, two = map(vector, actual)
    assert one.norm() > 1e-3 and (one - two).norm() < 1e-5 * one.norm()
    for name in [*objective, "loss"]:
        assert actual[1]["log"][name] == pytest.approx(actual[0]["log"][name], rel=1e-4)
    for name in [*objective, "loss"]:
        assert actual[1]["metrics"][f"eval_{name}"] == pytest.approx(actual[0]["metrics"][f"eval_{name}"], rel=1e-4)
