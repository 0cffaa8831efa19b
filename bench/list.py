#!/usr/bin/env python3
"""``gpupt list`` against lspci and virsh, on generated machines of 8, 64 and 1024 functions.

Each run is a new process over files in the page cache.  lspci reads the same generated tree.
virsh cannot: it asks the libvirtd of this machine about this machine's own devices, and its
cost per device is scaled to the size of the tree (said beside the figure).
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from timing import Timing, gpupt, machine, ratio, time_command

SIZES = (8, 64, 1024)
# as on a GPU server: a root port, a card and its audio function on one bus, and so on
KINDS = (
    ("0x8086", "0x352a", "0x060400", "pcieport"),
    ("0x10de", "0x2330", "0x030200", "nvidia"),
    ("0x10de", "0x22ba", "0x040300", "snd_hda_intel"),
    ("0x8086", "0x1592", "0x020000", "ice"),
)
MODALIAS = "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{:02X}sc{:02X}i{:02X}"


def make_tree(root: Path, count: int, *, gpus: int | None = None) -> Path:
    """A machine with ``count`` PCI functions under ``root``; one in four is a GPU, or so many."""
    bus = root / "sys/bus/pci"
    (bus / "devices").mkdir(parents=True)
    (root / "proc").mkdir()
    (root / "proc/cmdline").write_text("quiet intel_iommu=on\n")
    for driver in {kind[3] for kind in KINDS}:
        (bus / "drivers" / driver).mkdir(parents=True)
    for number in range(count):
        plant(root, number, gpus=count if gpus is None else gpus)
    return root


def plant(root: Path, number: int, *, gpus: int) -> None:
    """One function: its folder under sys/devices and the links the kernel makes to it."""
    kind = number % len(KINDS)
    if number // len(KINDS) >= gpus and kind in {1, 2}:
        kind = 3
    vendor, device, class_code, driver = KINDS[kind]
    card, function = number // 2, number % 2
    address = f"{card // 8192:04x}:{card // 32 % 256:02x}:{card % 32:02x}.{function}"
    folder = root / "sys/devices/pci0000:00" / address
    folder.mkdir(parents=True)
    group = root / f"sys/kernel/iommu_groups/{card}"
    (group / "devices").mkdir(parents=True, exist_ok=True)
    (group / "type").write_text("DMA-FQ\n")
    files = {
        "vendor": vendor,
        "device": device,
        "class": class_code,
        "subsystem_vendor": vendor,
        "subsystem_device": "0x1626",
        "revision": "0xa1",
        "driver_override": "(null)",
        "numa_node": str(card % 2),
        # What the kernel tells of a function in one read; every real sysfs has it.
        "modalias": MODALIAS.format(
            *(int(part, 16) for part in (vendor, device, vendor, "0x1626")),
            *bytes.fromhex(class_code[2:]),
        ),
        "irq": "16",
        "enable": "1",
        "current_link_speed": "32.0 GT/s PCIe",
        "max_link_speed": "32.0 GT/s PCIe",
        "current_link_width": "16",
        "max_link_width": "16",
        "reset_method": "flr bus",
        "resource": "\n".join(
            f"0x{start:016x} 0x{start + size - 1 if size else 0:016x} 0x{flags:016x}"
            for start, size, flags in ((0x200000000000, 1 << 37, 0x14220C), *((0, 0, 0),) * 12)
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
    ids = (int(vendor, 16), int(device, 16), 0x0407, 0x0010, 0xA1, int(class_code, 16))
    head = struct.pack("<HHHHB", *ids[:5]) + ids[5].to_bytes(3, "little")
    (folder / "config").write_bytes(head.ljust(256, b"\0"))
    os.symlink(f"../../../bus/pci/drivers/{driver}", folder / "driver")
    os.symlink(f"../../../kernel/iommu_groups/{card}", folder / "iommu_group")
    os.symlink(f"../../../devices/pci0000:00/{address}", root / "sys/bus/pci/devices" / address)
    os.symlink(f"../../../../devices/pci0000:00/{address}", group / "devices" / address)


def time_virsh(repeats: int) -> tuple[Timing, Timing, Timing, int] | None:
    """virsh on this machine: the list, dumpxml in a process for each, dumpxml in one process."""
    if shutil.which("virsh") is None:
        return None
    virsh = ["virsh", "-q", "-c", "qemu:///system"]
    try:
        listed = subprocess.run(
            [*virsh, "nodedev-list", "--cap", "pci"], capture_output=True, text=True, timeout=60,
            check=True,
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    names = listed.stdout.split()
    if not names:
        return None
    each = time_command(
        "virsh nodedev-dumpxml of one device",
        [*virsh, "nodedev-dumpxml", names[0]],
        repeats=repeats,
    )
    batch = time_command(
        f"virsh nodedev-dumpxml of {len(names)} in one process",
        [*virsh, "; ".join(f"nodedev-dumpxml {name}" for name in names)],
        repeats=repeats,
    )
    whole = time_command("virsh nodedev-list", [*virsh, "nodedev-list", "--cap", "pci"],
                         repeats=repeats)  # fmt: skip
    return whole, each, batch, len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print(machine())
    virsh = time_virsh(repeats)
    if virsh is None:
        print("virsh: not compared: no virsh, or no libvirtd answers at qemu:///system")
    else:
        whole, each, batch, count = virsh
        empty = time_command("virsh that does nothing", ["virsh", "-q", "-c", "qemu:///system",
                             "uri"], repeats=repeats)  # fmt: skip
        print(whole, each, batch, empty, sep="\n")
        each_in_one = max((batch.best - empty.best) / count, 0.0)
        print(f"scaled from this machine's own {count} PCI devices; in one process a device")
        print(f"costs {1000 * each_in_one:.2f} ms")
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="gpupt-bench-") as folder:
            tree = make_tree(Path(folder), size)
            print(f"\n{size} functions")
            # a state folder of its own: a machine that has lent nothing
            words = [gpupt(), "--state", tree / "state", "--root", tree, "list"]
            ours = time_command("gpupt list", words, repeats=repeats)
            print(ours)
            if shutil.which("lspci"):
                theirs = time_command(
                    "lspci -Dnn",
                    ["lspci", "-A", "linux-sysfs", "-O", f"sysfs.path={tree}/sys/bus/pci", "-Dnn"],
                    repeats=repeats,
                )
                print(theirs)
                goal = "at most 8 at 64 functions"
                ratio("gpupt list / lspci -Dnn", ours.best / theirs.best, target=goal)
                ratio("the same in processor time", ours.cpu / theirs.cpu, target=goal)
            else:
                print("lspci: not compared: it is not installed")
            if virsh is not None:
                apart = whole.best + size * each.best
                name = "gpupt list / virsh list + dumpxml for each"
                ratio(name, ours.best / apart, target="less than 1")
                together = whole.best + empty.best + size * each_in_one
                name = "gpupt list / virsh list + all dumpxml in one process"
                ratio(name, ours.best / together, target="none set")


if __name__ == "__main__":
    main()
