"""Synthetic machines for tests, after real ones: an emulated host, a server, a laptop."""

from __future__ import annotations

import tarfile
from pathlib import Path

from fakekernel import FakeKernel, Function, plant, plant_driver

MEMORY = 0x40200
PREFETCHABLE_64 = 0x14220C
GIB = 1 << 30
NAMES = """\
# as pci.ids has them
10de  NVIDIA Corporation
\t1eb8  TU104GL [Tesla T4]
\t1f11  TU106M [GeForce RTX 2060 Mobile]
\t22a3  GH100 [H100 NVSwitch]
\t2330  GH100 [H100 SXM5 80GB]
1234  Unknown, of QEMU
\t1111  Standard VGA
1a03  ASPEED Technology, Inc.
\t2000  ASPEED Graphics Family
8086  Intel Corporation
\t3e9b  CoffeeLake-H GT2 [UHD Graphics 630]
"""


def with_disk(root: Path, controller: str) -> None:
    """Put / on a disk of that controller, and the default route on eth0 where there is one."""
    disk = root / f"sys/devices/pci0000:00/{controller}/block/vda"
    (disk / "vda1").mkdir(parents=True)
    (root / "sys/dev/block").mkdir(parents=True)
    (root / "sys/class/block").mkdir(parents=True)
    place = f"devices/pci0000:00/{controller}/block/vda"
    (root / "sys/dev/block/254:1").symlink_to(f"../../{place}/vda1")
    (root / "sys/class/block/vda1").symlink_to(f"../../{place}/vda1")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(
        "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
        "23 22 0:21 / /proc rw - proc proc rw\n"
    )
    (root / "proc/swaps").write_text("Filename Type Size Used Priority\n")


def with_uplink(root: Path, card: str) -> None:
    """Let the default route leave by eth0 on that card."""
    (root / f"sys/devices/pci0000:00/{card}/net/eth0").mkdir(parents=True)
    (root / "sys/class/net").mkdir(parents=True, exist_ok=True)
    (root / "sys/class/net/eth0").symlink_to(f"../../devices/pci0000:00/{card}/net/eth0")
    (root / "proc/net").mkdir(exist_ok=True)
    (root / "proc/net/route").write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    )


def finish(root: Path) -> None:
    (root / "usr/share/misc").mkdir(parents=True)
    (root / "usr/share/misc/pci.ids").write_text(NAMES)
    (root / "proc/sys/kernel").mkdir(parents=True)
    (root / "proc/sys/kernel/osrelease").write_text("6.12.0-test\n")


def emulated_host(root: Path) -> FakeKernel:
    """Like the emulated host: a data-centre GPU with no driver, a GPU with its sound function
    on host drivers, and the host's own display."""
    plant(
        root,
        [
            Function("0000:00:00.0", "8086:29c0", 0x060000, group=0),
            Function("0000:00:01.0", "1b36:000c", 0x060400, "pcieport", group=1),
            Function("0000:00:02.0", "1b36:000c", 0x060400, "pcieport", group=2),
            Function("0000:00:03.0", "1af4:1041", 0x020000, "virtio-pci", group=3),
            Function("0000:00:04.0", "1af4:1042", 0x010000, "virtio-pci", group=4),
            Function("0000:00:1f.0", "8086:2918", 0x060100, "lpc_ich", group=5),
            Function("0000:00:1f.2", "8086:2922", 0x010601, "ahci", group=5),
            Function(
                "0000:01:00.0",
                "10de:2330",
                0x030200,
                group=12,
                bars=((0, 1 << 20, MEMORY),),
                link=(1, 1, 2.5, 2.5),
                resets="flr bus",
                more={"d3cold_allowed": "1"},
            ),
            Function(
                "0000:02:00.0",
                "10de:1eb8",
                0x038000,
                "bochs-drm",
                group=13,
                bars=((0, 16 << 20, MEMORY | 0x2000), (2, 4096, MEMORY)),
                resets="bus",
            ),
            Function("0000:02:00.1", "10de:10f8", 0x040300, "snd_hda_intel", group=13),
            Function("0000:03:00.0", "1234:1111", 0x030000, "bochs-drm", group=14, boot_vga=1),
        ],
        drivers=["vfio-pci"],
    )
    with_disk(root, "0000:00:04.0")
    with_uplink(root, "0000:00:03.0")
    finish(root)
    return FakeKernel(
        root,
        drivers={
            "bochs-drm": ["1234:1111", "10de:1eb8"],
            "snd_hda_intel": ["10de:10f8"],
            "vfio-pci": [],
            "virtio-pci": ["1af4:1041", "1af4:1042"],
        },
    )


def server(root: Path) -> FakeKernel:
    """Eight H100 on two NUMA nodes, with four NVSwitches, on the nvidia driver."""
    functions = [
        Function("0000:02:00.0", "1a03:2000", 0x030000, "ast", group=40, numa=0, boot_vga=1),
        Function("0000:03:00.0", "144d:a80a", 0x010802, "nvme", group=41, numa=0),
        Function("0000:04:00.0", "15b3:1021", 0x020000, "mlx5_core", group=42, numa=0),
    ]
    for number, bus in enumerate((0x19, 0x3B, 0x4C, 0x5D, 0x9B, 0xBB, 0xCB, 0xDB)):
        functions.append(
            Function(
                f"0000:{bus:02x}:00.0",
                "10de:2330",
                0x030200,
                "nvidia",
                group=50 + number,
                numa=number // 4,
                link=(16, 16, 32.0, 32.0),
                bars=(
                    (0, 16 << 20, PREFETCHABLE_64),
                    (2, 128 * GIB, PREFETCHABLE_64),
                    (4, 32 << 20, PREFETCHABLE_64),
                ),
                resets="flr bus",
                more={"sriov_numvfs": "0", "sriov_totalvfs": "16", "d3cold_allowed": "1"},
            )
        )
    functions += [
        Function(f"0000:{bus:02x}:00.0", "10de:22a3", 0x068000, "nvidia-nvswitch", group=60 + bus)
        for bus in (0x83, 0x84, 0x85, 0x86)
    ]
    plant(root, functions, drivers=["vfio-pci"])
    with_disk(root, "0000:03:00.0")
    with_uplink(root, "0000:04:00.0")
    finish(root)
    return FakeKernel(root, drivers={"nvidia": ["10de:2330"], "ast": ["1a03:2000"], "vfio-pci": []})


def laptop(root: Path) -> FakeKernel:
    """An integrated GPU with the display, and a card of four functions behind a root port."""
    plant(
        root,
        [
            Function("0000:00:00.0", "8086:3ec4", 0x060000, "skl_uncore", group=0),
            Function("0000:00:01.0", "8086:1901", 0x060400, "pcieport", group=1),
            Function("0000:00:02.0", "8086:3e9b", 0x030000, "i915", group=2, boot_vga=1),
            Function(
                "0000:01:00.0",
                "10de:1f11",
                0x030000,
                "nvidia",
                group=1,
                boot_vga=0,
                link=(8, 16, 2.5, 8.0),
                bars=((0, 16 << 20, MEMORY), (1, 256 << 20, PREFETCHABLE_64)),
                resets="pm bus",
                more={"d3cold_allowed": "1"},
            ),
            Function("0000:01:00.1", "10de:10f9", 0x040300, "snd_hda_intel", group=1),
            Function("0000:01:00.2", "10de:1ada", 0x0C0330, "xhci_hcd", group=1),
            Function("0000:01:00.3", "10de:1adb", 0x0C8000, "nvidia-gpu", group=1),
            Function("0000:02:00.0", "144d:a808", 0x010802, "nvme", group=15),
            Function("0000:03:00.0", "8086:2723", 0x028000, "iwlwifi", group=16),
        ],
        drivers=["vfio-pci"],
    )
    with_disk(root, "0000:02:00.0")
    with_uplink(root, "0000:03:00.0")
    finish(root)
    plant_driver(root, "nouveau")
    return FakeKernel(
        root,
        drivers={
            "i915": ["8086:3e9b"],
            "nouveau": ["10de:1f11"],
            "nvidia": ["10de:1f11"],
            "nvidia-gpu": ["10de:1adb"],
            "snd_hda_intel": ["10de:10f9"],
            "vfio-pci": [],
            "xhci_hcd": ["10de:1ada"],
        },
    )


MACHINES = {"emulated_host": emulated_host, "server": server, "laptop": laptop}


def unpack(file: Path, folder: Path) -> None:
    """Unpack a snapshot of ours; Debian 12's Python has no extraction filters yet."""
    with tarfile.open(file) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
