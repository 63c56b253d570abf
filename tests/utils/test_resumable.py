"""A folder continues the call that began it, and no other."""

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hf_guide.errors import OptionError
from hf_guide.utils.checksums import write_json
from hf_guide.utils.resumable import MAX_LISTED, ResumableFolder, differences, resumable_write


def folder(path: Path) -> ResumableFolder:
    return ResumableFolder(path, "manifest.json", "cache_dir", OptionError)


def test_a_new_an_empty_and_an_own_folder_pass_and_are_left_as_they_are(tmp_path: Path) -> None:
    folder(tmp_path / "new").check()
    assert not (tmp_path / "new").exists()
    folder(tmp_path).check()
    (tmp_path / "manifest.json").touch()
    (tmp_path / "other").touch()
    folder(tmp_path).check()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(
        OptionError, match=r"cache_dir .* holds something else: other\. It must be a folder that is new"
    ):
        folder(tmp_path).check()
    with pytest.raises(OptionError, match=r"cache_dir .*other is a file; it must be"):
        folder(tmp_path / "other").check()


def test_the_manifest_is_written_once(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        folder(tmp_path / "new").begin(lambda: (tmp_path / "new" / "manifest.json").write_text(str(calls.append(1))))
    assert calls == [1]


def test_each_entry_that_differs_is_named() -> None:
    recorded = {"top_k": 8, "config": {"hidden_size": 4, "layers": 2}, "seed": 0}
    requested = {"top_k": 9, "config": {"hidden_size": 6, "layers": 2}, "text": "x" * 100}
    assert differences(recorded, requested) == [
        "top_k is 8 there and 9 here",
        "config.hidden_size is 4 there and 6 here",
        "seed is 0 there and None here",
        f"text is None there and '{'x' * 56}... here",
    ]
    folder(Path("cache")).check_same_call(recorded, recorded)
    with pytest.raises(
        OptionError, match="cache_dir cache was begun with other settings: top_k is 8 there and 9 here"
    ):
        folder(Path("cache")).check_same_call(recorded, recorded | {"top_k": 9})


def test_of_many_differences_some_are_named_the_teacher_s_first() -> None:
    recorded = {"options": {f"option_{index}": 0 for index in range(9)}, "teacher_config": {"hidden_size": 4}}
    requested = {"options": {f"option_{index}": 1 for index in range(9)}, "teacher_config": {"hidden_size": 6}}
    with pytest.raises(OptionError) as found:
        folder(Path("cache")).check_same_call(recorded, requested)
    message = str(found.value)
    assert (
        "was begun with another teacher: teacher_config.hidden_size is 4 there and 6 here; options.option_0" in message
    )
    assert message.count(" there and ") == MAX_LISTED and f"; and {10 - MAX_LISTED} more. Repeat" in message


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        (OSError(errno.ENOSPC, "no space"), "Free some space"),
        (OSError(errno.EFBIG, "too large"), r"Raise the process's limit .*`ulimit -f`\)"),
        (
            SafetensorError(f"I/O error: too large (os error {errno.EFBIG})"),
            r"Raise the process's limit .*`ulimit -f`\)",
        ),
        (OSError(errno.EDQUOT, "quota"), "Raise the disk quota, or remove files"),
        (OSError(errno.EACCES, "Permission denied"), "Make the folder writable"),
        (OSError(errno.EROFS, "Read-only file system"), "Make the folder writable"),
        (SafetensorError(f"I/O error: denied (os error {errno.EACCES})"), "Make the folder writable"),
        (OSError(errno.EIO, "Input/output error"), "Remove the cause"),
        (OSError(errno.ENOENT, "No such file"), "Remove the cause"),
    ],
    ids=str,
)
def test_an_error_of_a_write_states_what_helps(cause: Exception, advice: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"{advice}.*; the same call then continues"):  # noqa: SIM117
        with resumable_write(tmp_path / "file", OptionError):
            raise cause


def test_a_folder_that_was_removed_meanwhile_has_advice_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "removed" / "file"
    with pytest.raises(OptionError, match="No such file.*Put back the folder, which was removed meanwhile; the same"):  # noqa: SIM117
        with resumable_write(path, OptionError):
            write_json(path, {})


def test_an_error_of_the_disk_states_that_the_call_continues(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="could not be written: no space.*the same call then continues"):  # noqa: SIM117
        with resumable_write(tmp_path / "file", OptionError):
            raise OSError("no space")
