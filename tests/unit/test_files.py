"""A text file is complete or as it was, whatever happens while it is written."""

import pytest

from megatron_attnedit.errors import UserError
from megatron_attnedit.files import (
    check_output_folder,
    read_input,
    remove_partial_files,
    write_output,
    write_whole,
)


def test_content_and_nothing_beside(tmp_path):
    file = tmp_path / "a" / "b.json"
    write_output(file, "one\n")
    write_whole(file, "two \u00e4\n")
    assert file.read_text(encoding="utf-8") == "two \u00e4\n"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("write", [write_whole, write_output])
def test_what_was_there_stays_when_the_disk_is_full(tmp_path, monkeypatch, write):
    file = tmp_path / "b.json"
    file.write_text("old")

    def half(path, text, **_):
        path.write_bytes(text[:1].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "write_text", half)
    with pytest.raises((OSError, UserError), match="No space left on device"):
        write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out.json: cannot be written: .*file.$"):
        write_output(tmp_path / "file" / "out.json", "")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin").write_bytes("\u00e4".encode("latin-1"))
    for name, problem in (("none", "No such file"), ("latin", "not UTF-8"), (".", "directory")):
        with pytest.raises(UserError) as refused:
            read_input(tmp_path / name)
        message = str(refused.value)
        assert message.startswith(f"{tmp_path / name}: ") and problem in message


@pytest.mark.parametrize("below", ["", "out", "out/run"])
def test_an_output_folder_at_or_below_a_file_is_refused(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError) as refused:
        check_output_folder(file / below, "--output")
    assert str(refused.value) == f"--output {file / below}: {file} is not a folder"


def test_an_output_folder_may_be_there_or_not_and_is_not_made(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        check_output_folder(folder, "--output")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"--save .*link/run: .*link is not a folder"):
        check_output_folder(tmp_path / "link" / "run", "--save")


def test_what_killed_programs_left_of_a_file_is_removed(tmp_path):
    names = {".a[1].json.7.partial", ".b.json.8.partial", "c.partial", ".d.json"}
    for name in names:
        (tmp_path / name).touch()
    remove_partial_files(tmp_path, "a[1].json")
    assert {p.name for p in tmp_path.iterdir()} == names - {".a[1].json.7.partial"}
    remove_partial_files(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"c.partial", ".d.json"}
