"""Writes to the kernel's files: in a child, with a deadline, inside the root."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path, PurePosixPath

import pytest

from gpupt.edges.kernel import Kernel
from gpupt.errors import BadInput, DeadlineExceeded, Failed
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
