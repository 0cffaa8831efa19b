"""A job on a node ends there when it ends here: with a real sshd."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from test_ssh import Server, connect, server  # noqa: F401  (a fixture)

from gpupt.edges import job
from gpupt.edges.job import LATE, run_job


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(job, "FOLDER", str(tmp_path / "jobs"))
    return tmp_path / "jobs"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def written(file: Path, *, deadline: float = 10) -> int:
    """The PID that a job writes into a file."""
    end = time.monotonic() + deadline
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < end, f"{file} was not written"
        time.sleep(0.02)
    return int(file.read_text())


def await_end(pid: int, *, deadline: float = 10) -> None:
    end = time.monotonic() + deadline
    while alive(pid):
        assert time.monotonic() < end, f"{pid} still runs"
        time.sleep(0.02)


def test_streams_words_and_status_come_back(server: Server, folder: Path) -> None:  # noqa: F811
    heard: list[str] = []
    with connect(server) as ssh:
        words = ("sh", "-c", 'echo "$1"; exit 7', "x", "a b $HOME")
        done = run_job(ssh, words, deadline=20, on_line=heard.append)
    assert (done.status, done.stdout, heard) == (7, "a b $HOME\n", ["a b $HOME"])
    assert list(folder.iterdir()) == []


def test_a_late_one_is_ended_there(server: Server, folder: Path) -> None:  # noqa: F811
    with connect(server) as ssh:
        assert run_job(ssh, ("sleep", "60"), deadline=0.3, on_line=print).status == LATE
    assert list(folder.iterdir()) == []


def test_ctrl_c_ends_it_and_what_it_started(
    server: Server,  # noqa: F811
    folder: Path,
    tmp_path: Path,
) -> None:
    child = tmp_path / "child"
    script = f"sleep 600 & echo $! > {child}.new; mv {child}.new {child}; wait"

    def interrupt() -> None:
        written(child)
        os.kill(os.getpid(), signal.SIGINT)

    with connect(server) as ssh:
        presser = threading.Thread(target=interrupt)
        presser.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run_job(ssh, ("sh", "-c", script), deadline=300, on_line=print)
        presser.join()
    await_end(written(child))
    assert time.monotonic() - began < 60
    assert list(folder.iterdir()) == []


def test_one_that_is_ended_before_it_began_does_not_begin(tmp_path: Path) -> None:
    note, ran = tmp_path / "jobs/x", tmp_path / "ran"
    assert subprocess.run(["sh", "-c", job.END, note], check=False).returncode == 0
    started = subprocess.run(["sh", "-c", job.START, note, "5", "touch", ran], check=False)
    assert started.returncode != 0
    assert not ran.exists()


def test_one_that_had_to_be_killed_was_late(
    server: Server,  # noqa: F811
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "START", job.START.replace("-k 30", "-k 0.2"))
    with connect(server) as ssh:
        deaf = ("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
        assert run_job(ssh, deaf, deadline=0.3, on_line=print).status == LATE
    assert list(folder.iterdir()) == []
