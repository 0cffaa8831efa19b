"""What kernels show of real machines and no textbook does: disks, displays, recordings."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakekernel import Function, plant
from machines import unpack

from gpupt.edges.hostfacts import address_bits, kernel_version
from gpupt.edges.snapshot import write_snapshot
from gpupt.edges.sysfs import read_host
from gpupt.edges.tree import Reader
from gpupt.model.pci import Link, PciAddress

GPU, DISK, SPARE = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"
FOLDER = f"sys/bus/pci/devices/{GPU}"


def machine(root: Path, *, mounts: str, card: Function | None = None) -> Path:
    """A GPU, and two NVMe disks of which the first has / unless ``mounts`` says otherwise."""
    disk = Function(DISK, "144d:a80a", 0x010802, "nvme", group=2)
    plant(
        root,
        [
            card or Function(GPU, "10de:1eb8", 0x030000, "nvidia", group=1),
            disk,
            Function(SPARE, "144d:a80a", 0x010802, "nvme", group=3),
        ],
    )
    for number, address in ((0, DISK), (1, SPARE)):
        place = f"devices/pci0000:00/{address}/nvme/nvme{number}/nvme{number}n1"
        (root / "sys" / place).mkdir(parents=True)
        for name in (f"class/block/nvme{number}n1", f"dev/block/259:{number}"):
            link = root / "sys" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"../../{place}")
    (root / "proc/self").mkdir()
    (root / "proc/self/mountinfo").write_text(mounts)
    return root


ROOT = "22 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n"


def critical(root: Path) -> dict[str, str]:
    return {str(each.address): each.why for each in read_host(root, whole=True).critical}


def multipath(root: Path, *controllers: tuple[str, str]) -> None:
    """Move the first disk below a subsystem of NVMe, with links to its controllers."""
    subsystem = root / "sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    (subsystem / "nvme0n1/nvme0n1p1").mkdir(parents=True)
    for name, address in controllers:
        (root / f"sys/devices/pci0000:00/{address}/nvme" / name).mkdir(parents=True, exist_ok=True)
        (subsystem / name).symlink_to(f"../../../pci0000:00/{address}/nvme/{name}")
    for name in ("class/block/nvme0n1", "dev/block/259:0"):
        (root / "sys" / name).unlink()
        (root / "sys" / name).symlink_to(
            "../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1"
        )


def test_a_disk_of_nvme_multipath_is_below_its_controllers(tmp_path: Path) -> None:
    machine(tmp_path, mounts=ROOT)
    multipath(tmp_path, ("nvme0", DISK))
    assert critical(tmp_path) == {DISK: "/ is on it"}


def test_a_disk_with_two_paths_needs_both(tmp_path: Path) -> None:
    machine(tmp_path, mounts=ROOT)
    multipath(tmp_path, ("nvme0", DISK), ("nvme1", SPARE))
    assert critical(tmp_path) == {DISK: "/ is on it", SPARE: "/ is on it"}


def test_every_disk_of_a_btrfs_is_needed(tmp_path: Path) -> None:
    machine(tmp_path, mounts="22 1 0:30 / / rw - btrfs /dev/nvme0n1 rw\n")
    devices = tmp_path / "sys/fs/btrfs/4f1e/devices"
    devices.mkdir(parents=True)
    (tmp_path / "sys/fs/btrfs/features").mkdir()
    for name in ("nvme0n1", "nvme1n1"):
        (devices / name).symlink_to(f"../../../../class/block/{name}")
    assert critical(tmp_path) == {DISK: "/ is on it", SPARE: "a mounted btrfs is on it"}


POOL = "23 22 0:40 / /tank rw - zfs tank rw\n"


@pytest.mark.parametrize(
    ("mounts", "why"),
    [
        (ROOT, None),
        (ROOT + POOL, "a ZFS pool is mounted, and this may be part of it"),
        (POOL.replace("/tank", "/"), "the disk of / is not known, and this may be it"),
    ],
)
def test_a_pool_may_be_on_any_disk(tmp_path: Path, mounts: str, why: str | None) -> None:
    root = machine(tmp_path / "live", mounts=mounts)
    assert critical(root).get(SPARE) == why
    # A recording holds it as vaguely as the machine did.
    write_snapshot(root, tmp_path / "file.tar.gz")
    (tmp_path / "again").mkdir()
    unpack(tmp_path / "file.tar.gz", tmp_path / "again")
    assert critical(tmp_path / "again").keys() == critical(root).keys()


@pytest.mark.parametrize(
    ("boot_vga", "boot_display", "expected"),
    [
        ("0", None, False),
        ("0", "1", True),  # the VGA arbiter took another card for it
        (None, "1", True),  # a display of class 0380, of which it knows nothing
        (None, None, None),
        ("1", None, True),
    ],
)
def test_the_drm_device_knows_the_boot_display_better(
    tmp_path: Path, boot_vga: str | None, boot_display: str | None, expected: bool | None
) -> None:
    machine(tmp_path, mounts=ROOT)
    (tmp_path / FOLDER / "drm/card1").mkdir(parents=True)
    for name, text in (("boot_vga", boot_vga), ("drm/card1/boot_display", boot_display)):
        if text is not None:
            (tmp_path / FOLDER / name).write_text(f"{text}\n")
    assert read_host(tmp_path).gpus[0].device.boot_vga is expected
    write_snapshot(tmp_path, tmp_path / "file.tar.gz")
    again = tmp_path / "again"
    again.mkdir()
    unpack(tmp_path / "file.tar.gz", again)
    assert read_host(again).gpus[0].device.boot_vga is expected


@pytest.mark.parametrize(("lanes", "width"), [("16", 16), ("0", None), ("63", None), ("255", None)])
def test_widths_that_are_none(tmp_path: Path, lanes: str, width: int | None) -> None:
    card = Function(GPU, "10de:1eb8", 0x030000, more={"current_link_width": lanes})
    plant(tmp_path, [card])
    assert read_host(tmp_path).gpus[0].device.link == Link(width=width)


def test_memory_without_room_is_a_lack_and_a_port_is_not(tmp_path: Path) -> None:
    plant(tmp_path, [Function(GPU, "10de:1eb8", 0x030000)])
    (tmp_path / FOLDER / "resource").write_text(
        f"{0:#018x} {(16 << 20) - 1:#018x} {0x20040200:#018x}\n"
        f"{0:#018x} {127:#018x} {0x20040101:#018x}\n"
        f"{0x3000:#018x} {0x307F:#018x} {0x40101:#018x}\n"
    )
    bars = read_host(tmp_path).gpus[0].device.bars
    assert [(bar.index, bar.assigned) for bar in bars] == [(0, False), (2, True)]


@pytest.mark.parametrize("resets", ["", None, "flr bus"])
def test_a_recording_keeps_an_empty_answer_apart_from_none(
    tmp_path: Path, resets: str | None
) -> None:
    root = tmp_path / "live"
    plant(root, [Function(GPU, "10de:1eb8", 0x030000, resets=resets)])
    if resets == "":
        # The kernel prints no newline then.
        (root / FOLDER / "reset_method").write_text("")
    write_snapshot(root, tmp_path / "file.tar.gz")
    (tmp_path / "again").mkdir()
    unpack(tmp_path / "file.tar.gz", tmp_path / "again")
    expected = None if resets is None else tuple(resets.split())
    for tree in (root, tmp_path / "again"):
        assert read_host(tree).gpus[0].device.reset_methods == expected


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("address sizes\t: 46 bits physical, 48 bits virtual\n", 46),
        ("processor\t: 0\nBogoMIPS\t: 50\n", None),  # Arm says nothing of it
        ("address sizes\t: none\n", None),
        ("", None),
    ],
)
def test_address_bits(tmp_path: Path, text: str, bits: int | None) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert address_bits(Reader(tmp_path)) == bits


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.12.41+deb13-amd64", (6, 12)), ("6.8.0-60-generic", (6, 8)), ("tip", None), (None, None)],
)
def test_kernel_versions(release: str | None, version: tuple[int, int] | None) -> None:
    assert kernel_version(release) == version


def test_disks_behind_vmd_need_the_function_above_their_domain(tmp_path: Path) -> None:
    machine(tmp_path, mounts=ROOT)
    vmd = tmp_path / "sys/devices/pci0000:00/0000:00:0e.0"
    disk = vmd / "pci10000:e0/10000:e0:06.0/10000:e1:00.0/nvme/nvme0/nvme0n1"
    disk.mkdir(parents=True)
    for name in ("class/block/nvme0n1", "dev/block/259:0"):
        (tmp_path / "sys" / name).unlink()
        (tmp_path / "sys" / name).symlink_to(disk)
    needed = {each.address for each in read_host(tmp_path, whole=True).critical}
    # Bridges in between stay, and are not named.
    assert needed == {PciAddress.parse("00:0e.0"), PciAddress.parse("10000:e1:00.0")}
