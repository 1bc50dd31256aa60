"""One process at a time writes an output, whatever happens to the others."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_attnedit import locks, owners, scratch
from megatron_attnedit.errors import UserError
from megatron_attnedit.locks import folder_lock, output_lock
from tests.support.forked import FORKED


def lock_of(folder):
    return folder_lock(folder / "run", "--save")


def file_of(folder):
    return folder / "run" / ".lock"


def rewrite(file, age=0.0, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    os.utime(file, (time.time() - age,) * 2)


def hold(folder, taken, end):
    with lock_of(folder):
        taken.set()
        end.wait()


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock."""
    taken, end = FORKED.Event(), FORKED.Event()
    process = FORKED.Process(target=hold, args=(tmp_path, taken, end))
    process.start()
    assert taken.wait(30)
    yield process
    os.kill(process.pid, signal.SIGCONT)  # before: setting an event waits for those that it wakes
    end.set()
    process.join()


def test_nothing_stays(tmp_path):
    with lock_of(tmp_path):
        assert file_of(tmp_path).is_file()
    assert list(tmp_path.iterdir()) == []
    with output_lock(tmp_path / "a" / "out", "--output"):
        (tmp_path / "a" / "out").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_a_live_owner_is_named(tmp_path, owner):
    host = os.uname().nodename
    for state in ("running", "suspended"):
        if state == "suspended":
            os.kill(owner.pid, signal.SIGSTOP)
        rewrite(file_of(tmp_path), age=3 * locks.STALE_S)  # a process that is there is alive
        with pytest.raises(UserError, match=rf"--save .*run: in use by .*{owner.pid} on {host}"):
            lock_of(tmp_path).take()
    assert file_of(tmp_path).is_file()


def test_the_same_process_is_refused_too(tmp_path):
    with lock_of(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        lock_of(tmp_path).take()
    with lock_of(tmp_path):
        pass


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_taken_over_at_once(tmp_path, reaped):
    code = (
        "import sys, time; from pathlib import Path; from megatron_attnedit.locks import *\n"
        "folder_lock(Path(sys.argv[1], 'run'), '--save').take(); print(); time.sleep(99)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    with pytest.raises(UserError, match=f"in use by .*{process.pid}"):
        lock_of(tmp_path).take()
    process.kill()
    if reaped:
        process.wait()
    else:  # a zombie still has its number
        time.sleep(0.2)
    start = time.monotonic()
    with lock_of(tmp_path):
        assert time.monotonic() - start < 5
        assert json.loads(file_of(tmp_path).read_text())["pid"] == os.getpid()
    process.wait()
    process.stdout.close()
    assert list(tmp_path.rglob(".lock*")) == []


def test_another_process_with_the_owner_s_number_is_not_the_owner(tmp_path, owner):
    rewrite(file_of(tmp_path), process_started=time.time() - 1000)
    with lock_of(tmp_path):
        pass


OTHER = {"host": "node7", "machine": "node7 another boot"}


def test_an_owner_elsewhere_is_dead_when_its_heartbeat_is_old(tmp_path, owner, monkeypatch):
    rewrite(file_of(tmp_path), age=locks.STALE_S + 1, **OTHER)
    start = time.monotonic()
    with lock_of(tmp_path):
        assert time.monotonic() - start < 5


def test_an_owner_elsewhere_that_was_alive_lately_is_waited_for(tmp_path, owner, monkeypatch):
    monkeypatch.setattr(locks, "STALE_S", 2.0)
    monkeypatch.setattr(locks, "POLL_S", 0.05)
    os.kill(owner.pid, signal.SIGSTOP)
    rewrite(file_of(tmp_path), age=0.5, **OTHER)
    start = time.monotonic()
    with lock_of(tmp_path):
        assert 1.0 < time.monotonic() - start < 10


def test_an_owner_elsewhere_is_alive_when_its_heart_beats(tmp_path, owner, monkeypatch):
    monkeypatch.setattr(locks, "POLL_S", 0.05)
    os.kill(owner.pid, signal.SIGSTOP)
    rewrite(file_of(tmp_path), age=20, **OTHER)
    threading.Timer(0.5, os.utime, [file_of(tmp_path)]).start()
    with pytest.raises(UserError, match=rf"{owner.pid} on node7"):
        lock_of(tmp_path).take()


def test_the_clock_of_the_host_does_not_count(tmp_path, owner, monkeypatch):
    monkeypatch.setattr(locks, "POLL_S", 0.05)
    rewrite(file_of(tmp_path), age=1, **OTHER)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    threading.Timer(0.5, os.utime, [file_of(tmp_path)]).start()
    with pytest.raises(UserError, match="in use"):
        lock_of(tmp_path).take()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    with lock_of(tmp_path):
        os.utime(file_of(tmp_path), (1.0, 1.0))
        end = time.monotonic() + 10
        while file_of(tmp_path).stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert file_of(tmp_path).stat().st_mtime > 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x", "machine": 3}', "\0" * 9])
def test_a_file_that_names_nobody(tmp_path, monkeypatch, content):
    """After a crash of its host; whoever wrote it is given the time to show a heartbeat."""
    monkeypatch.setattr(locks, "STALE_S", 1.0)
    file_of(tmp_path).parent.mkdir()
    file_of(tmp_path).write_text(content)
    with lock_of(tmp_path):
        assert json.loads(file_of(tmp_path).read_text())["pid"] == os.getpid()


def test_forked_and_spawned_processes_do_not_end_it(tmp_path):
    with lock_of(tmp_path) as lock:
        for method in ("fork", "forkserver"):
            child = multiprocessing.get_context(method).Process(target=lock.release)
            if method == "fork":
                child.start()
                child.join()
        pid = os.fork()
        if not pid:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        assert file_of(tmp_path).is_file()
        lock.check()


def test_a_forked_writer_does_not_keep_it_after_its_parent_s_death(tmp_path):
    """As of a checkpoint that is written in the background."""
    code = (
        "import os, sys, time; from pathlib import Path; from megatron_attnedit.locks import *\n"
        "folder_lock(Path(sys.argv[1], 'run'), '--save').take()\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with lock_of(tmp_path):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_an_owner_that_was_taken_over_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "CHECK_S", 0.0)
    first = lock_of(tmp_path)
    first.take()
    first.check()
    rewrite(file_of(tmp_path), age=locks.STALE_S + 1, **OTHER)
    with lock_of(tmp_path) as second:
        with pytest.raises(UserError, match=f"taken over by .*{os.getpid()} on"):
            first.check()
        first.release()
        second.check()  # its file is still there
    with lock_of(tmp_path) as third:
        file_of(tmp_path).unlink()
        with pytest.raises(UserError, match=r"taken over by nobody: .*\.lock was removed"):
            third.check()


def compete(folder, start, end, results):
    lock = lock_of(folder)
    start.wait()
    try:
        lock.take()
    except UserError as error:
        results.put(str(error))
        return
    results.put("mine")
    end.wait()
    lock.release()


@pytest.mark.parametrize("dead_owner", [False, True])
def test_of_many_at_once_one_wins(tmp_path, dead_owner):
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        if dead_owner:
            leave_dead(folder)
        start, end, results = FORKED.Event(), FORKED.Event(), FORKED.Queue()
        args = (folder, start, end, results)
        rivals = [FORKED.Process(target=compete, args=args) for _ in range(5)]
        for rival in rivals:
            rival.start()
        time.sleep(0.2)
        start.set()
        answers = sorted(results.get(timeout=60) for _ in rivals)
        end.set()
        for rival in rivals:
            rival.join()
        assert answers.count("mine") == 1
        assert all("in use by" in answer for answer in answers if answer != "mine")
        assert not list(folder.rglob(".lock*"))


def leave_dead(folder):
    """The lock of a process that has ended."""
    lock_of(folder).take()
    rewrite(file_of(folder), process_started=1.0)


def test_a_slow_rival_leaves_the_new_owner_s_file(tmp_path, monkeypatch):
    """It found the owner dead, and before it acts, another takes over; a third could come in."""
    leave_dead(tmp_path)
    quick, slow = lock_of(tmp_path), lock_of(tmp_path)
    is_running, read, there = owners.is_running, owners.read, []

    def late(owner):
        monkeypatch.setattr(owners, "is_running", is_running)
        quick.take()
        monkeypatch.setattr(owners, "read", looked_at)
        return False

    def looked_at(file):
        there.append(file_of(tmp_path).exists())
        return read(file)

    monkeypatch.setattr(owners, "is_running", late)
    with pytest.raises(UserError, match="in use by"):
        slow.take()
    monkeypatch.setattr(owners, "read", read)
    assert there and all(there)
    quick.check()
    quick.release()


def test_a_right_of_a_killed_rival_expires(tmp_path, monkeypatch):
    leave_dead(tmp_path)
    right = file_of(tmp_path).with_name(".lock.removing")
    right.touch()
    os.utime(right, (time.time() - locks.STALE_S - 1,) * 2)
    with lock_of(tmp_path):
        assert not right.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"--save .*run: cannot be written: .*"):
        lock_of(tmp_path).take()


def test_a_full_disk_leaves_no_lock_of_nobody(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def write(self, text):
            raise OSError(28, "No space left on device")

    def full(descriptor, mode):
        os.close(descriptor)
        return Full()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        with pytest.raises(UserError, match="No space left on device"):
            lock_of(tmp_path).take()
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_that_cannot_be_renewed_is_a_single_warning(tmp_path, monkeypatch, caplog):
    def denied(*_):
        raise PermissionError(1, "Operation not permitted")

    with lock_of(tmp_path) as lock:
        monkeypatch.setattr(os, "utime", denied)
        lock._renew()
        lock._renew()
        lock.check()
    assert len(caplog.records) == 1 and ".lock cannot be renewed" in caplog.text


def test_temporary_folders_of_killed_programs_are_removed(tmp_path, monkeypatch, owner):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    dead, alive, foreign = (tmp_path / f"{scratch.PREFIX}{name}" for name in "abc")
    for folder in (dead, alive, foreign):
        (folder / "export1").mkdir(parents=True)
        (folder / ".lock").write_bytes(file_of(tmp_path).read_bytes())
    rewrite(dead / ".lock", process_started=1.0)
    rewrite(foreign / ".lock", process_started=1.0, **OTHER)
    (tmp_path / f"{scratch.PREFIX}d").symlink_to(tmp_path)
    with scratch.scratch_folder() as mine:
        assert mine.parent == tmp_path and not dead.exists()
        assert alive.is_dir() and foreign.is_dir()
        with scratch.scratch_folder() as other:
            assert mine.is_dir() and other != mine
    assert not mine.exists() and not other.exists()
    assert file_of(tmp_path).is_file()
