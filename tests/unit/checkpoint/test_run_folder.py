"""Which checkpoint of a folder is used, and which stay."""

import logging
import shutil

import pytest

from megatron_attnedit.checkpoint import run_folder
from megatron_attnedit.checkpoint.run_folder import Retention
from megatron_attnedit.convert.integrity import MARKER, seal
from megatron_attnedit.errors import UserError


def make(directory, *iterations, tracker=None):
    for iteration in iterations:
        folder = run_folder.iteration_dir(directory, iteration)
        (folder / "hf").mkdir(parents=True)
        (folder / "attnedit.json").write_text("{}")
        (folder / "hf" / "config.json").write_text('{"a": 1}')
        (folder / "data").write_bytes(bytes(range(256)) * 8)
        seal(folder)
    run_folder.track(directory, tracker if tracker is not None else max(iterations))
    return directory


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a bit flipped": flip,
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("file", ["attnedit.json", "hf/config.json", "data", MARKER])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_one_before_used(tmp_path, caplog, kind, file):
    make(tmp_path, 2, 4, 6)
    DAMAGE[kind](tmp_path / "iter_0000006" / file)
    with caplog.at_level(logging.WARNING):
        assert run_folder.last_good(tmp_path).name == "iter_0000004"
    (record,) = caplog.records
    assert "iter_0000006" in record.message and file.split("/")[-1] in record.message


def test_missing_folder(tmp_path, caplog):
    make(tmp_path, 2, 4)
    shutil.rmtree(tmp_path / "iter_0000004")
    assert run_folder.last_good(tmp_path).name == "iter_0000002"
    assert "iter_0000004" in caplog.text


@pytest.mark.parametrize("text", [b"", b"nonsense", b"\xff\x00"])
def test_damaged_tracker(tmp_path, caplog, text):
    make(tmp_path, 2, 4)
    (tmp_path / run_folder.TRACKER).write_bytes(text)
    assert run_folder.last_good(tmp_path).name == "iter_0000004"
    assert run_folder.TRACKER in caplog.text


def test_the_tracker_can_go_back(tmp_path):
    make(tmp_path, 2, 4, 6, tracker=4)
    assert run_folder.last_good(tmp_path).name == "iter_0000004"


def test_nothing_there(tmp_path):
    assert run_folder.last_good(tmp_path) is None


def test_nothing_good_there(tmp_path):
    make(tmp_path, 2, 4)
    for folder in tmp_path.glob("iter_*"):
        DAMAGE["a bit flipped"](folder / "data")
    with pytest.raises(UserError, match="no checkpoint there is usable.*iter_0000004.*data"):
        run_folder.last_good(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_marker_that_points_outside(tmp_path, name):
    make(tmp_path, 2, 4)
    marker = tmp_path / "iter_0000004" / MARKER
    marker.write_text(marker.read_text().replace('"data"', f'"{name}"'))
    assert "outside" in run_folder.damage(marker.parent)


def test_what_a_flag_names_is_checked_too(tmp_path):
    make(tmp_path, 2)
    assert run_folder.find(str(tmp_path), "--load").name == "iter_0000002"
    DAMAGE["truncated"](tmp_path / "iter_0000002" / "data")
    with pytest.raises(UserError, match="data: has 2047 bytes, not 2048"):
        run_folder.find(str(tmp_path), "--load")


def test_a_checkpoint_of_this_program_has_a_marker(tmp_path):
    make(tmp_path, 2)
    (tmp_path / "iter_0000002" / MARKER).unlink()
    with pytest.raises(UserError, match=rf"iter_0000002: incomplete, {MARKER} is missing"):
        run_folder.find(str(tmp_path), "--teacher")


def test_checkpoints_of_other_programs_have_no_marker(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run_folder.check_seal(tmp_path)
    assert f"{tmp_path}: of another program: no {MARKER}, so nothing is verified" in caplog.text


@pytest.mark.parametrize(
    ("retention", "stay"),
    [
        (Retention(), [2, 4, 6, 8, 10]),
        (Retention(last=2), [8, 10]),
        (Retention(last=1, every=4), [4, 8, 10]),
        (Retention(last=9), [2, 4, 6, 8, 10]),
    ],
)
def test_retention(tmp_path, retention, stay):
    make(tmp_path, 2, 4, 6, 8, 10)
    run_folder.retire(tmp_path, retention, newest=10)
    assert sorted(run_folder.iterations(tmp_path)) == stay
    assert not list(tmp_path.glob(".*iter*"))


def test_retention_leaves_newer_ones_alone(tmp_path):
    """After going back, what was newer is replaced as training comes to it."""
    make(tmp_path, 2, 4, 6, 8, tracker=4)
    run_folder.retire(tmp_path, Retention(last=1), newest=4)
    assert sorted(run_folder.iterations(tmp_path)) == [4, 6, 8]


def test_leftovers_of_a_killed_run(tmp_path):
    make(tmp_path, 2, 4)
    (tmp_path / ".writing-iter_0000006-ab").mkdir()
    (tmp_path / "iter_0000002").rename(tmp_path / ".deleting-iter_0000002")
    (tmp_path / "iter_0000004").rename(tmp_path / ".replaced-iter_0000004")
    run_folder.clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000004", run_folder.TRACKER}
