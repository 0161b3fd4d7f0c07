"""One process at a time, also where the file system has no locks."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from vit_nabirds.errors import UserError
from vit_nabirds.parallel import locks
from vit_nabirds.parallel.locks import lock

HOLD = """
import fcntl, sys
from pathlib import Path
def none(*_):
    raise OSError(37, "No locks available")
fcntl.flock = none
from vit_nabirds.parallel.locks import lock
lock(Path(sys.argv[1]), "busy")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def no_locks(monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)


def held(file) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path):
    with lock(tmp_path / "lock", "busy"):
        with pytest.raises(UserError, match="^busy$"):
            lock(tmp_path / "lock", "busy")
    lock(tmp_path / "lock", "busy").close()


def test_without_locks_a_file_names_the_owner(tmp_path, no_locks):
    process = held(tmp_path / "lock")
    with pytest.raises(UserError, match=rf"busy \(It is process {process.pid} on "):
        lock(tmp_path / "lock", "busy")
    process.kill()
    process.wait()
    with lock(tmp_path / "lock", "busy"):  # the dead one has lost it
        with pytest.raises(UserError, match=rf"It is process {os.getpid()} on "):
            lock(tmp_path / "lock", "busy")
    assert not (tmp_path / "lock.owner").exists()


def test_an_owner_on_another_machine_counts_while_it_gives_signs_of_life(tmp_path, no_locks, monkeypatch):
    file = tmp_path / "lock.owner"
    file.write_text(json.dumps({"host": "far-away", "pid": 1, "started": "1"}))
    with pytest.raises(UserError, match="It is process 1 on far-away"):
        lock(tmp_path / "lock", "busy")
    os.utime(file, (0, time.time() - locks.SILENCE - 1))
    lock(tmp_path / "lock", "busy").close()
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    with lock(tmp_path / "lock", "busy"):
        os.utime(file, (0, 1000))
        time.sleep(0.2)
        assert file.stat().st_mtime > 1000


def test_an_owner_in_another_container_counts_though_its_process_is_not_seen_here(tmp_path, no_locks):
    file = tmp_path / "lock.owner"
    file.write_text(json.dumps({"host": locks.socket.gethostname(), "machine": "x", "pid": 1, "started": "none"}))
    with pytest.raises(UserError, match="busy"):
        lock(tmp_path / "lock", "busy")


def test_an_owner_that_was_taken_for_dead_leaves_the_lock_to_its_heir(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    with lock(tmp_path / "lock", "busy"):
        file = tmp_path / "lock.owner"
        file.write_text('{"host": "heir"}')
        os.utime(file, (0, 1000))
        time.sleep(0.2)
        assert file.stat().st_mtime == 1000
    assert file.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 7}'])
def test_an_owner_that_cannot_be_read_counts_until_it_is_silent(tmp_path, no_locks, content):
    file = tmp_path / "lock.owner"
    file.write_text(content)
    with pytest.raises(UserError, match="busy"):
        lock(tmp_path / "lock", "busy")
    os.utime(file, (0, time.time() - locks.SILENCE - 1))
    lock(tmp_path / "lock", "busy").close()
