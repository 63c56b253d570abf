"""A projector is pushed to the Hub and loaded from it, and the other files of the repository stay."""

import dataclasses

import pytest

from hf_guide import SubclassProjector
from hf_guide.lelp.projector_files import CONFIG_NAME, WEIGHTS_NAME
from tests.fake_hub import fake_hub
from tests.lelp.synthetic_data import make_embeddings
from tests.lelp.test_projector import fit
from tests.tiny import run_python

PUSH = """
    import sys, torch
    from hf_guide import SubclassProjector
    from tests.lelp.synthetic_data import make_embeddings
    projector = SubclassProjector.from_pretrained(sys.argv[1])
    commit = projector.push_to_hub("me/projector", private=True, commit_message="Directions", token="hf_test")
    print(commit.oid)
    projector.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/again", token="hf_test")
    loaded = SubclassProjector.from_pretrained("me/projector", token="hf_test", cache_dir=sys.argv[2])
    data = make_embeddings()
    assert torch.equal(
        loaded.transform(data.embeddings, data.logits), projector.transform(data.embeddings, data.logits)
    )
    print(loaded.teacher)
    try:
        SubclassProjector.from_pretrained("me/nothing", token="hf_test")
    except OSError as error:
        print(type(error).__name__)
"""


@pytest.mark.extended
def test_it_is_pushed_and_loaded_by_its_id(tmp_path):
    (tmp_path / "teacher").mkdir()
    projector = dataclasses.replace(fit(make_embeddings()), teacher=str(tmp_path / "teacher"))
    projector.save_pretrained(tmp_path / "mine")
    with fake_hub() as hub:
        hub.repositories["me/projector"] = {"model.safetensors": b"a student's"}
        printed = run_python(PUSH, tmp_path / "mine", tmp_path / "other", HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")
        assert {"model.safetensors", CONFIG_NAME, WEIGHTS_NAME} == set(hub.repositories["me/projector"])
        assert {CONFIG_NAME, WEIGHTS_NAME} <= set(hub.repositories["me/again"])
        assert "me/projector" in hub.private
        assert ("me/projector", "Directions") in hub.commits
        assert str(tmp_path).encode() not in hub.repositories["me/projector"][CONFIG_NAME], "a path of this machine"
    assert printed.split() == ["0" * 40, "teacher", "RepositoryNotFoundError"]


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder 'nothing-here'"):
        SubclassProjector.from_pretrained("nothing-here", local_files_only=True)
