"""What the kernel keeps locked is not waited for."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from fakekernel import Function, plant

from gpupt.decide.viability import Preflight, assess_lending
from gpupt.edges import sysfs
from gpupt.edges.apart import read_apart
from gpupt.edges.kernel import Kernel
from gpupt.edges.sysfs import PciReader, read_host
from gpupt.errors import DeadlineExceeded
from gpupt.model.pci import PciAddress

GPU = PciAddress.parse("0000:01:00.0")
OTHER = PciAddress.parse("0000:02:00.0")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    plant(
        tmp_path,
        [
            Function(str(GPU), "10de:2330", 0x030200, "nvidia", group=1, override="vfio-pci"),
            Function(str(OTHER), "10de:2330", 0x030200, "nvidia", group=2),
        ],
        drivers=["nvidia", "vfio-pci"],
    )
    return tmp_path


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_every_file_is_read(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"vfio-pci\n")
    large.write_bytes(b"\xff" * 100_000)
    before = children()
    told = read_apart([str(small), str(large), str(tmp_path / "absent")])
    assert told[str(small)] == b"vfio-pci\n"
    assert told[str(large)] == b"\xff" * 4096
    config = tmp_path / "config"
    config.write_bytes(b"\xff" * 4096)
    assert read_apart([str(config)]) == {str(config): b"\xff" * 64}
    missing = told[str(tmp_path / "absent")]
    assert isinstance(missing, OSError)
    assert missing.errno == errno.ENOENT
    assert children() == before


def test_one_that_never_answers_ends_the_wait_and_not_the_answers_before_it(
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    before = children()

    def locked(path: str) -> bytes:
        if path == "locked":
            time.sleep(600)
        return Path(path).read_bytes()

    told = read_apart([str(file), "locked", str(file) + "2"], deadline=0.3, read=locked)
    assert told == {str(file): b"1"}
    assert children() == before


def test_a_child_that_may_never_end_holds_nothing_of_ours_open(tmp_path: Path) -> None:
    """Least of all the lock of the state folder, which would keep every later verb out."""
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    seen = tmp_path / "seen"

    def look(_path: str) -> bytes:
        open_there = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        seen.write_text(repr([each for each in open_there if each > 2]))
        return b""

    assert read_apart(["x"], read=look) == {"x": b""}
    kept = [int(word) for word in seen.read_text().strip("[]").split(",")]
    assert lock not in kept
    # The pipe, and the folder that was listed.
    assert len(kept) <= 2
    os.close(lock)


def stuck_at(monkeypatch: pytest.MonkeyPatch, machine: Path, address: PciAddress) -> None:
    """Let the machine be the live one, with a function that the kernel keeps locked."""

    def read(path: str) -> bytes:
        if f"/{address}/" in path:
            time.sleep(600)
        return Path(path).read_bytes()

    monkeypatch.setattr(
        sysfs, "read_apart", lambda paths, deadline: read_apart(paths, deadline=0.3, read=read)
    )
    whole = PciReader.__init__

    def live(self: PciReader, root: Path) -> None:
        whole(self, root)
        self.top = None

    monkeypatch.setattr(PciReader, "__init__", live)


@pytest.mark.parametrize("stuck", [GPU, OTHER])
def test_a_locked_card_is_named_and_not_lent(
    monkeypatch: pytest.MonkeyPatch, machine: Path, stuck: PciAddress
) -> None:
    """Whether it stands first or last: the others are read all the same."""
    before = read_host(machine)
    stuck_at(monkeypatch, machine, stuck)
    host = read_host(machine)
    other = OTHER if stuck == GPU else GPU
    whole, locked = (host.devices[each] for each in (other, stuck))
    assert whole == before.devices[other]
    assert (locked.locked, locked.binding.override) == (True, None)
    assert any("the kernel keeps it locked" in line for line in host.unreadable)
    reasons = {
        gpu.address: [
            each.id for each in assess_lending(host, gpu, loans={}, preflight=Preflight())
        ]
        for gpu in host.gpus
    }
    assert reasons == {other: [], stuck: ["unbind-stuck"]}


def test_a_machine_that_answers_is_read_as_before(
    monkeypatch: pytest.MonkeyPatch, machine: Path
) -> None:
    before = read_host(machine)
    stuck_at(monkeypatch, machine, PciAddress.parse("0000:7f:00.0"))
    assert read_host(machine) == before


def test_the_gate_to_the_kernel_does_not_wait_either(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(Path("/"))
    monkeypatch.setattr(Kernel, "present", lambda self, address: True)
    monkeypatch.setattr("gpupt.edges.kernel.read_apart", lambda paths: {})
    with pytest.raises(DeadlineExceeded, match=r"keeps .* locked"):
        kernel.binding(GPU)
