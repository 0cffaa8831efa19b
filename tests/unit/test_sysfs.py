"""A host is read from sysfs alone, and absent is not zero."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fakekernel import Function, plant
from machines import MACHINES, emulated_host, laptop, server, with_disk

from gpupt.edges.holders import read_holders, vfio_to_be_had
from gpupt.edges.sysfs import read_host
from gpupt.edges.tree import Reader
from gpupt.errors import BadInput
from gpupt.model.host import Critical
from gpupt.model.pci import Bar, DriverBinding, Link, PciAddress, PciId


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def test_a_server(tmp_path: Path) -> None:
    server(tmp_path)
    host = read_host(tmp_path)
    assert [str(gpu.address) for gpu in host.gpus][:3] == [
        "0000:02:00.0",
        "0000:19:00.0",
        "0000:3b:00.0",
    ]
    card = host.gpus[-1].device
    assert card.id == PciId(0x10DE, 0x2330)
    assert card.subsystem == PciId(0x10DE, 0x16C1)
    assert card.class_code == 0x030200
    assert card.binding == DriverBinding("nvidia", None)
    assert card.iommu_group == 57
    assert card.numa_node == 1
    assert card.link == Link(16, 16, 32.0, 32.0)
    assert card.bars[1] == Bar(index=2, size=128 << 30, prefetchable=True, bits=64)
    assert card.reset_methods == ("flr", "bus")
    assert card.sriov_numvfs == 0
    assert card.d3cold_allowed is True
    assert card.boot_vga is None
    assert host.groups[57].type == "DMA-FQ"
    assert host.iommu_present


def test_what_the_kernel_does_not_say_is_none(tmp_path: Path) -> None:
    emulated_host(tmp_path)
    card = read_host(tmp_path).gpus[2].device
    assert card.bars == ()
    assert card.reset_methods is None
    assert card.numa_node is None
    assert card.d3cold_allowed is None
    assert card.sriov_numvfs is None
    assert card.link == Link()


def test_no_reset_method_is_not_the_same_as_none_told(tmp_path: Path) -> None:
    plant(tmp_path, [Function("0000:01:00.0", "10de:1eb8", 0x030000, resets="")])
    assert read_host(tmp_path).gpus[0].device.reset_methods == ()


@pytest.mark.parametrize("machine", MACHINES)
def test_modalias_and_separate_files_agree(tmp_path: Path, machine: str) -> None:
    MACHINES[machine](tmp_path)
    by_modalias = read_host(tmp_path, whole=True)
    for file in tmp_path.glob("sys/devices/pci0000:00/*/modalias"):
        file.unlink()
    assert read_host(tmp_path, whole=True) == by_modalias


def test_a_lost_card(tmp_path: Path) -> None:
    plant(tmp_path, [Function("0000:01:00.0", "10de:1eb8", 0x030000, lost=True)])
    assert read_host(tmp_path).gpus[0].device.lost
    config = bytearray(64)
    config[14] = 0x7F
    (tmp_path / "sys/bus/pci/devices/0000:01:00.0/config").write_bytes(config)
    assert read_host(tmp_path).gpus[0].device.lost


def test_a_sleeping_card_is_not_taken_for_lost(tmp_path: Path) -> None:
    asleep = {"power_state": "D3cold", "power/runtime_status": "suspended"}
    plant(tmp_path, [Function("0000:01:00.0", "10de:1eb8", 0x030000, lost=True, more=asleep)])
    assert not read_host(tmp_path).gpus[0].device.lost


def test_a_bar_with_no_room(tmp_path: Path) -> None:
    plant(tmp_path, [Function("0000:01:00.0", "10de:1eb8", 0x030000)])
    resource = tmp_path / "sys/bus/pci/devices/0000:01:00.0/resource"
    resource.write_text("0x0000000000000000 0x00000003ffffffff 0x000000000014220c\n")
    (bar,) = read_host(tmp_path).gpus[0].device.bars
    assert (bar.size, bar.assigned) == (16 << 30, False)


def test_the_functions_of_a_card_and_its_group(tmp_path: Path) -> None:
    laptop(tmp_path)
    host = read_host(tmp_path)
    assert [str(address) for address in host.gpus[1].companions] == [
        "0000:01:00.1",
        "0000:01:00.2",
        "0000:01:00.3",
    ]
    assert host.groups[1].members[0] == at("00:01.0")
    assert host.devices[at("00:01.0")].is_bridge
    assert not host.devices[at("00:00.0")].is_bridge


def test_no_pci_bus(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no PCI bus"):
        read_host(tmp_path)


def test_the_disk_of_root_and_the_way_out_are_critical(tmp_path: Path) -> None:
    emulated_host(tmp_path)
    assert read_host(tmp_path, whole=True).critical == (
        Critical(at("00:03.0"), "the default route leaves by it (eth0)"),
        Critical(at("00:04.0"), "/ is on it"),
    )


def nvme_machine(root: Path) -> Path:
    plant(
        root,
        [
            Function("0000:01:00.0", "10de:1eb8", 0x030000, "nvidia", group=1),
            Function("0000:02:00.0", "144d:a80a", 0x010802, "nvme", group=2),
            Function("0000:03:00.0", "144d:a80a", 0x010802, "nvme", group=3),
            Function("0000:04:00.0", "8086:1592", 0x020000, "ice", group=4),
        ],
    )
    (root / "proc/self").mkdir()
    return root


def block(root: Path, name: str, *, on: str | None = None, slaves: tuple[str, ...] = ()) -> None:
    """Plant a block device, on a PCI function or on other block devices."""
    place = f"devices/pci0000:00/{on}/block/{name}" if on else f"devices/virtual/block/{name}"
    (root / "sys" / place / "slaves").mkdir(parents=True)
    for folder in ("class/block", "dev/block"):
        (root / "sys" / folder).mkdir(parents=True, exist_ok=True)
    (root / f"sys/class/block/{name}").symlink_to(f"../../{place}")
    for slave in slaves:
        (root / "sys" / place / "slaves" / slave).symlink_to(f"../../../../../{slave}")


def critical_in(root: Path) -> dict[str, str]:
    return {str(found.address): found.why for found in read_host(root, whole=True).critical}


def test_disks_through_lvm_luks_and_raid(tmp_path: Path) -> None:
    root = nvme_machine(tmp_path)
    block(root, "nvme0n1", on="0000:02:00.0")
    block(root, "nvme1n1", on="0000:03:00.0")
    block(root, "md0", slaves=("nvme0n1", "nvme1n1"))
    block(root, "dm-0", slaves=("md0",))
    (root / "sys/dev/block/253:0").symlink_to("../../devices/virtual/block/dm-0")
    (root / "proc/self/mountinfo").write_text("22 1 253:0 / / rw - xfs /dev/mapper/vg-root rw\n")
    assert critical_in(root) == {"0000:02:00.0": "/ is on it", "0000:03:00.0": "/ is on it"}


def test_btrfs_is_found_by_its_source_and_swap_by_its_device(tmp_path: Path) -> None:
    root = nvme_machine(tmp_path)
    block(root, "nvme0n1", on="0000:02:00.0")
    block(root, "nvme1n1", on="0000:03:00.0")
    (root / "proc/self/mountinfo").write_text("22 1 0:30 / / rw - btrfs /dev/nvme0n1 rw\n")
    (root / "proc/swaps").write_text("Filename Type\n/dev/nvme1n1 partition 1 0 -2\n")
    assert critical_in(root) == {"0000:02:00.0": "/ is on it", "0000:03:00.0": "swap is on it"}


def test_a_root_that_names_no_device_makes_every_controller_critical(tmp_path: Path) -> None:
    root = nvme_machine(tmp_path)
    (root / "proc/self/mountinfo").write_text("22 1 0:30 / / rw - zfs rpool/ROOT rw\n")
    assert list(critical_in(root)) == ["0000:02:00.0", "0000:03:00.0"]


def test_a_diskless_host_has_no_critical_disk(tmp_path: Path) -> None:
    root = nvme_machine(tmp_path)
    (root / "proc/self/mountinfo").write_text("22 1 0:30 / / rw - nfs4 server:/root rw\n")
    assert critical_in(root) == {}


def test_the_default_route_through_a_bridge_over_a_bond(tmp_path: Path) -> None:
    root = nvme_machine(tmp_path)
    (root / "proc/self/mountinfo").write_text("22 1 0:30 / / rw - overlay overlay rw\n")
    nets = root / "sys/class/net"
    card = root / "sys/devices/pci0000:00/0000:04:00.0/net/ens4"
    card.mkdir(parents=True)
    for name in ("br0", "bond0"):
        (root / f"sys/devices/virtual/net/{name}").mkdir(parents=True)
    nets.mkdir(parents=True)
    (nets / "ens4").symlink_to("../../devices/pci0000:00/0000:04:00.0/net/ens4")
    for name in ("br0", "bond0"):
        (nets / name).symlink_to(f"../../devices/virtual/net/{name}")
    (root / "sys/devices/virtual/net/br0/brif/bond0").mkdir(parents=True)
    (root / "sys/devices/virtual/net/bond0/lower_ens4").symlink_to(card)
    (root / "proc/net").mkdir()
    (root / "proc/net/ipv6_route").write_text(
        f"{'0' * 32} 00 {'0' * 32} 00 {'f' * 32} 00000400 00000001 00000000 00000003     br0\n"
    )
    assert critical_in(root) == {"0000:04:00.0": "the default route leaves by it (br0)"}


def test_who_holds_a_card(tmp_path: Path) -> None:
    kernel = laptop(tmp_path)
    gpu, sound = at("01:00.0"), at("01:00.1")
    folder = tmp_path / "sys/bus/pci/devices"
    (folder / str(gpu) / "drm/renderD129").mkdir(parents=True)
    (folder / str(sound) / "sound/card1/controlC1").mkdir(parents=True)
    information = tmp_path / f"proc/driver/nvidia/gpus/{gpu}/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA GeForce RTX 2060\nDevice Minor: \t 3\n")
    for pid, node, command in (
        (711, "/dev/nvidia3", "python3"),
        (702, "/dev/dri/renderD129", "Xorg"),
        (703, "/dev/nvidia0", "other"),
        (704, "/dev/snd/controlC1", "pipewire"),
    ):
        (tmp_path / f"proc/{pid}/fd").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/fd/7").symlink_to(node)
        (tmp_path / f"proc/{pid}/comm").write_text(f"{command}\n")
    found = read_holders(Reader(tmp_path), read_host(tmp_path), [gpu, sound])
    assert [(h.pid, h.command, h.node) for h in found[gpu]] == [
        (702, "Xorg", "/dev/dri/renderD129"),
        (711, "python3", "/dev/nvidia3"),
    ]
    assert [h.command for h in found[sound]] == ["pipewire"]
    # On vfio-pci the node is the group's.
    kernel.set_override(gpu, "vfio-pci")
    kernel.unbind(gpu, "nvidia")
    kernel.probe(gpu)
    (tmp_path / "proc/705/fd").mkdir(parents=True)
    (tmp_path / "proc/705/fd/9").symlink_to("/dev/vfio/1")
    (tmp_path / "proc/705/comm").write_text("qemu-system-x86\n")
    found = read_holders(Reader(tmp_path), read_host(tmp_path), [gpu])
    assert "qemu-system-x86" in [holder.command for holder in found[gpu]]


def test_vfio_is_looked_for_among_the_modules(tmp_path: Path) -> None:
    plant(tmp_path, [])
    assert not vfio_to_be_had(Reader(tmp_path))
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/osrelease").write_text("6.12.0\n")
    modules = tmp_path / "lib/modules/6.12.0/modules.dep"
    modules.parent.mkdir(parents=True)
    modules.write_text("kernel/drivers/vfio/pci/vfio-pci-core.ko: x\n")
    assert not vfio_to_be_had(Reader(tmp_path))
    modules.write_text("kernel/drivers/vfio/pci/vfio-pci.ko.xz: x\n")
    assert vfio_to_be_had(Reader(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root is denied nothing")
def test_what_is_denied_is_named(tmp_path: Path) -> None:
    emulated_host(tmp_path)
    (tmp_path / "sys/bus/pci/devices/0000:02:00.0/config").chmod(0)
    assert read_host(tmp_path).unreadable == ("/sys/bus/pci/devices/0000:02:00.0/config",)


def test_a_partition_counts_as_its_disk(tmp_path: Path) -> None:
    plant(tmp_path, [Function("0000:02:00.0", "144d:a80a", 0x010802, "nvme", group=2)])
    with_disk(tmp_path, "0000:02:00.0")
    assert critical_in(tmp_path) == {"0000:02:00.0": "/ is on it"}
