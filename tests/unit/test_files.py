"""A text file is complete or as it was, whatever happens while it is written."""

import pytest

from megatron_attnedit.errors import UserError
from megatron_attnedit.files import write_output, write_whole


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
