"""Writes to the kernel's files: in a child, with a deadline, inside the root."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path, PurePosixPath

import pytest

from gpupt.edges.journal import Journal
from gpupt.edges.kernel import Kernel
from gpupt.errors import BadInput, DeadlineExceeded, Failed, Refused
from gpupt.model.pci import PciAddress

PROBE = PurePosixPath("sys/bus/pci/drivers_probe")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    (tmp_path / "sys/bus/pci").mkdir(parents=True)
    return Kernel(tmp_path)


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_a_write_arrives(kernel: Kernel) -> None:
    (kernel.root / PROBE).write_text("longer than what is written")
    kernel.probe(PciAddress.parse("41:00.0"))
    assert (kernel.root / PROBE).read_text() == "0000:41:00.0\n"


def test_a_write_that_never_returns_is_given_up(kernel: Kernel) -> None:
    # Opening a pipe that nobody reads blocks in the kernel, as a stuck unbind does.
    os.mkfifo(kernel.root / PROBE)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="did not finish drivers_probe") as error:
        kernel.write(PROBE, "0000:41:00.0\n", deadline=0.1)
    assert time.monotonic() - began < 3
    assert "do not retry" in error.value.remedy
    assert children() == []


def test_the_kernels_word_is_in_the_error(kernel: Kernel) -> None:
    with pytest.raises(Failed, match="ENOENT"):
        kernel.write(PROBE, "x", deadline=5)
    (kernel.root / PROBE).mkdir()
    with pytest.raises(Failed, match=errno.errorcode[errno.EISDIR]):
        kernel.write(PROBE, "x", deadline=5)


@pytest.mark.parametrize(
    "path", ["/sys/x", "sys/../etc/passwd", "etc/passwd", "proc/sysrq-trigger", ".."]
)
def test_nothing_outside_the_root_is_written(kernel: Kernel, path: str) -> None:
    with pytest.raises(BadInput, match="not one of the kernel's files"):
        kernel.write(PurePosixPath(path), "x", deadline=5)


def test_a_card_that_is_gone(kernel: Kernel) -> None:
    with pytest.raises(Failed, match="not on the bus"):
        kernel.binding(PciAddress.parse("41:00.0"))


def test_modules_are_loaded_into_the_running_kernel_only(kernel: Kernel) -> None:
    with pytest.raises(Failed, match="not loaded in the machine under"):
        kernel.load_module("vfio-pci")


def test_nothing_is_begun_while_a_write_is_still_in_the_kernel(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gpupt is killed while its child waits in the kernel: the lock outlives gpupt.
    os.mkfifo(kernel.root / PROBE)
    state = tmp_path / "state"
    gpupt = os.fork()
    if gpupt == 0:
        with Journal(state):
            kernel.write(PROBE, "0000:41:00.0\n", deadline=30)
        os._exit(0)
    writing = Path(f"/proc/{gpupt}/task/{gpupt}/children")
    until = time.monotonic() + 10
    while not writing.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(gpupt, signal.SIGKILL)
    os.waitpid(gpupt, 0)
    monkeypatch.setattr("gpupt.edges.journal.ORPHAN_SECONDS", 0.2)
    with pytest.raises(Refused, match="has not come back from the kernel"):
        Journal(state)
    # The write comes to its end.
    reader = os.open(kernel.root / PROBE, os.O_RDONLY)
    assert os.read(reader, 100) == b"0000:41:00.0\n"
    os.close(reader)
    # One that ends soon is waited for, and nobody need try again.
    monkeypatch.setattr("gpupt.edges.journal.ORPHAN_SECONDS", 10)
    Journal(state).close()
