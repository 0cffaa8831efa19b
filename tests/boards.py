"""Machines after real boards, function by function, as their owners' ``lspci`` shows them.

Ids, classes, BARs, links, drivers and what sits below what are those of the boards; addresses
are as firmware would give them.  Each tree also holds what names a machine (serial numbers, MAC
addresses, UUIDs), which is in ``SECRETS`` and on no recording.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fakekernel import Function, plant, plant_driver

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# Flags of the resource file: memory of 32 bits, of 64 and prefetchable, and ports.
M32, M64P, M64, PORTS = 0x40200, 0x14220C, 0x140204, 0x40101
UNSET = 0x2000_0000
SERIAL, MAC, UUID = "1324623000042", "5c:25:73:4a:10:0f", "9221d5d1-b60b-a624-bf14-0a1819cfda3b"
SECRETS = (SERIAL, MAC, MAC.replace(":", ""), UUID, "gpu-node-07")
GEN5, GEN4, GEN3 = (16, 16, 32.0, 32.0), (16, 16, 16.0, 16.0), (16, 16, 8.0, 8.0)
NAMES = """\
# as pci.ids has them
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t740c  Aldebaran/MI200 [Instinct MI250X/MI250]
\t74a1  Aqua Vanjaram [Instinct MI300X]
10de  NVIDIA Corporation
\t10f7  TU102 High Definition Audio Controller
\t1ad6  TU102 USB 3.1 Host Controller
\t1ad7  TU102 USB Type-C UCSI Controller
\t1e07  TU102 [GeForce RTX 2080 Ti Rev. A]
\t20b2  GA100 [A100 SXM4 80GB]
\t22a3  GH100 [H100 NVSwitch]
\t2330  GH100 [H100 SXM5 80GB]
\t2520  GA106M [GeForce RTX 3060 Mobile / Max-Q]
\t26b9  AD102GL [L40S]
15b3  Mellanox Technologies
\t1021  MT2910 Family [ConnectX-7]
1a03  ASPEED Technology, Inc.
\t2000  ASPEED Graphics Family
8086  Intel Corporation
\t1592  Ethernet Controller E810-C for QSFP
\t46a6  Alder Lake-P GT2 [Iris Xe Graphics]
144d  Samsung Electronics Co Ltd
\ta80a  NVMe SSD Controller PM9A1/PM9A3/980PRO
"""
# The families of cards, as their functions read.
H100 = Function(
    "0:0.0",
    "10de:2330",
    0x030200,
    "nvidia",
    link=GEN5,
    bars=((0, 16 * MIB, M64P), (2, 128 * GIB, M64P), (4, 32 * MIB, M64P)),
    resets="flr bus",
    more={"sriov_numvfs": "0", "sriov_totalvfs": "16", "d3cold_allowed": "1", "power_state": "D0"},
)
A100 = replace(
    H100,
    id="10de:20b2",
    link=GEN4,
    bars=((0, 16 * MIB, M32), (1, 128 * GIB, M64P), (3, 32 * MIB, M64P)),
)
L40S = replace(
    A100, id="10de:26b9", bars=((0, 16 * MIB, M32), (1, 64 * GIB, M64P), (3, 32 * MIB, M64P))
)
NVSWITCH = Function(
    "0:0.0", "10de:22a3", 0x068000, "nvidia-nvswitch", link=(2, 2, 16.0, 16.0),
    bars=((0, 32 * MIB, M64),), resets="flr bus",
)  # fmt: skip
NIC = Function(
    "0:0.0", "15b3:1021", 0x020700, "mlx5_core", link=GEN5, bars=((0, 32 * MIB, M64P),),
    resets="flr bus",
)  # fmt: skip
NVME = Function(
    "0:0.0", "144d:a80a", 0x010802, "nvme", link=(4, 4, 16.0, 16.0), bars=((0, 16 * KIB, M64),),
    resets="flr bus",
)  # fmt: skip
ETHERNET = Function(
    "0:0.0", "8086:1592", 0x020000, "ice", link=GEN4, bars=((0, 32 * MIB, M64P),),
    resets="flr bus",
)  # fmt: skip
PORT = Function("0:0.0", "8086:352a", 0x060400, "pcieport")
SWITCH = Function("0:0.0", "1000:c030", 0x060400, "pcieport", link=GEN5)
MI300X = Function(
    "0:0.0", "1002:74a1", 0x120000, "amdgpu", link=GEN5, subsystem="1002:74a1", revision=0,
    bars=((0, 256 * GIB, M64P), (2, 2 * MIB, M64P), (4, 256, PORTS), (5, 512 * KIB, M32)),
    resets="flr bus", more={"sriov_numvfs": "0", "sriov_totalvfs": "8", "power_state": "D0"},
)  # fmt: skip
MI250 = replace(
    MI300X, id="1002:740c", class_code=0x038000, link=GEN4, subsystem="1002:0b0c",
    bars=((0, 64 * GIB, M64P), (2, 2 * MIB, M64P), (4, 256, PORTS), (5, 512 * KIB, M32)),
    more={"power_state": "D0"},
)  # fmt: skip
RTX = Function(
    "0:0.0", "10de:1e07", 0x030000, "nvidia", link=(16, 16, 2.5, 8.0), boot_vga=0,
    subsystem="1043:866a",
    bars=((0, 16 * MIB, M32), (1, 256 * MIB, M64P), (3, 32 * MIB, M64P), (5, 128, PORTS)),
    resets="pm bus", more={"d3cold_allowed": "1", "power_state": "D0"},
)  # fmt: skip
SOUND = Function("0:0.1", "10de:10f7", 0x040300, "snd_hda_intel", bars=((0, 16 * KIB, M32),))
USB = Function("0:0.2", "10de:1ad6", 0x0C0330, "xhci_hcd", bars=((0, 256 * KIB, M64P),))
UCSI = Function("0:0.3", "10de:1ad7", 0x0C8000, "nvidia-gpu", bars=((0, 4 * KIB, M32),))


@dataclass
class Board:
    """A machine as it is put together: functions, and the folder of sys/devices that each is in.

    A group of ``None`` is a group of the function's own.
    """

    functions: list[Function] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    groups: int = 0

    def group(self) -> int:
        self.groups += 1
        return self.groups - 1

    def put(self, what: Function, address: str, under: str, *, group: int | None = None) -> str:
        """Put a function at an address, below a place; its own place."""
        number = self.group() if group is None else group
        self.functions.append(replace(what, address=address, group=number))
        self.places[address] = f"{under}/{address}"
        return self.places[address]

    def plant(self, root: Path) -> None:
        """The tree of sysfs, each function in the folder of the bridge above it."""
        plant(root, self.functions, drivers=["vfio-pci"])
        bus = root / "sys/bus/pci"
        for function in self.functions:
            if function.driver is not None:
                plant_driver(root, function.driver)
        for function in sorted(self.functions, key=lambda each: self.places[each.address]):
            place = root / "sys/devices" / self.places[function.address]
            place.parent.mkdir(parents=True, exist_ok=True)
            (root / "sys/devices/pci0000:00" / function.address).rename(place)
            point(bus / "devices" / function.address, place)
            point(
                root / f"sys/kernel/iommu_groups/{function.group}/devices/{function.address}", place
            )
            point(place / "iommu_group", root / f"sys/kernel/iommu_groups/{function.group}")
            if function.driver is not None:
                point(place / "driver", bus / "drivers" / function.driver)
            if function.physfn is not None:
                point(place / "physfn", root / "sys/devices" / self.places[function.physfn])
            with_secrets(place, virtual=function.physfn is not None)


def point(link: Path, target: Path) -> None:
    """Make a relative link, in the place of what is there."""
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))


def with_secrets(place: Path, *, virtual: bool) -> None:
    """The rest of config space with a serial number in it, and the files that name the card.

    A virtual function has no ids in its registers (SR-IOV: they read FFFFh).
    """
    config = bytearray((place / "config").read_bytes())
    if virtual:
        config[:4] = b"\xff" * 4
    (place / "config").write_bytes(bytes(config) + SERIAL.encode().ljust(192, b"\0"))
    (place / "serial_number").write_text(f"{MAC[:8]}-ff-fe-{MAC[9:]}\n")
    (place / "vpd").write_bytes(f"SN {SERIAL}".encode())


def with_rest(
    root: Path, *, cmdline: str = "", kernel: str = "6.8.0-60-generic", bits: int = 46,
    chips: str = "IR-PCI-MSI", fb: str = "0 astdrmfb\n", more: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """What is beside the PCI bus, so that doctor can look at everything but KVM and libvirt."""
    files = {
        "usr/share/misc/pci.ids": NAMES,
        "proc/sys/kernel/osrelease": f"{kernel}\n",
        "proc/sys/kernel/hostname": "gpu-node-07\n",
        "proc/cmdline": f"BOOT_IMAGE=/vmlinuz root=UUID={UUID} ro {cmdline}\n",
        "proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\n"
        f"address sizes\t: {bits} bits physical, 57 bits virtual\n\n" * 2,
        "proc/interrupts": "            CPU0       CPU1\n"
        f"  24:          0          1  {chips}-0000:00:01.0    0-edge      PCIe PME\n",
        "proc/self/limits": "Limit                     Soft Limit           Hard Limit      Units\n"
        "Max locked memory         8388608              unlimited            bytes     \n",
        "proc/self/status": "Name:\tgpupt\nUid:\t0\t0\t0\t0\n",
        "proc/meminfo": "MemTotal:       2113535476 kB\n",
        "proc/fb": fb,
        "proc/swaps": "Filename Type Size Used Priority\n",
        "proc/1/comm": "systemd\n",
        "sys/class/dmi/id/product_uuid": f"{UUID}\n",
        "sys/module/vfio_iommu_type1/parameters/dma_entry_limit": "65535\n",
        f"lib/modules/{kernel}/modules.alias": "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n"
        "alias vfio_pci:v000010DEd00002342sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci\n",
        **(more or {}),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "proc/self/mountinfo").touch()
    (root / "sys/class/iommu/dmar0").mkdir(parents=True, exist_ok=True)


def with_disk(
    root: Path, place: str, *, number: int, mounted: str, multipath: bool = False
) -> None:
    """Mount the first partition of the NVMe disk of a controller; with ``multipath``, as kernels
    with CONFIG_NVME_MULTIPATH show disks of two ports: below no function."""
    controller = root / "sys/devices" / place / f"nvme/nvme{number}"
    controller.mkdir(parents=True)
    (controller / "serial").write_text(f"{SERIAL}\n")
    above = controller
    if multipath:
        above = root / f"sys/devices/virtual/nvme-subsystem/nvme-subsys{number}"
        above.mkdir(parents=True)
        point(above / f"nvme{number}", controller)
    disk = above / f"nvme{number}n1"
    part = disk / f"nvme{number}n1p1"
    (disk / "slaves").mkdir(parents=True)
    part.mkdir()
    for folder, name, target in (
        ("class/block", disk.name, disk),
        ("class/block", part.name, part),
        ("dev/block", f"259:{number}", part),
    ):
        (root / "sys" / folder).mkdir(parents=True, exist_ok=True)
        point(root / "sys" / folder / name, target)
    with (root / "proc/self/mountinfo").open("a") as mounts:
        mounts.write(
            f"{30 + number} 1 259:{number} / {mounted} rw,relatime - ext4 /dev/{part.name} rw\n"
        )


def with_interface(root: Path, place: str, name: str, *, uplink: bool = False) -> None:
    """A network interface on a function; the default route leaves by the uplink."""
    net = root / "sys/devices" / place / "net" / name
    net.mkdir(parents=True)
    (net / "address").write_text(f"{MAC}\n")
    (root / "sys/class/net").mkdir(parents=True, exist_ok=True)
    point(root / "sys/class/net" / name, net)
    if uplink:
        (root / "proc/net").mkdir()
        (root / "proc/net/route").write_text(
            "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
            f"{name}\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
        )


def nvidia_information(root: Path, addresses: Iterable[str]) -> None:
    """What NVIDIA's driver says of its cards under /proc, UUIDs and all."""
    for minor, address in enumerate(addresses):
        file = root / f"proc/driver/nvidia/gpus/{address}/information"
        file.parent.mkdir(parents=True)
        file.write_text(f"GPU UUID: \t GPU-{UUID}\nDevice Minor: \t {minor}\n")


def hgx(root: Path, *, acs: bool = True, lost: str = "") -> None:
    """Two sockets; on each two switches (PEX 89000), with two H100, two ConnectX-7 and an NVMe
    disk each; four NVSwitches; a BMC's display; disk and network of the host apart from them.

    Without ACS on the switches' ports, what is below one switch is one IOMMU group; the default
    route then leaves by a ConnectX-7, and a scratch disk is mounted from below each switch.
    """
    board = Board()
    system = "pci0000:00"
    bmc = board.group()
    bridge = board.put(replace(PORT, id="1a03:1150"), "0000:02:00.0", system, group=bmc)
    board.put(
        Function(
            "0:0.0", "1a03:2000", 0x030000, "ast", numa=0, boot_vga=1,
            bars=((0, 16 * MIB, M32), (1, 256 * KIB, M32), (2, 128, PORTS)),
        ),
        "0000:03:00.0", bridge, group=bmc,
    )  # fmt: skip
    port = board.put(replace(PORT, numa=0), "0000:00:0c.0", system)
    disk = board.put(replace(NVME, numa=0), "0000:01:00.0", port)
    port = board.put(replace(PORT, numa=1), "0000:e2:01.0", "pci0000:e2")
    uplink = board.put(replace(ETHERNET, numa=1), "0000:e3:00.0", port)
    board.put(replace(ETHERNET, numa=1), "0000:e3:00.1", port)
    interfaces: list[str] = []
    scratch: list[str] = []
    gpus: list[str] = []
    for number, bus in enumerate((0x15, 0x3D, 0x97, 0xBD)):
        numa = number // 2
        port = board.put(replace(PORT, numa=numa), f"0000:{bus:02x}:01.0", f"pci0000:{bus:02x}")
        up = board.put(replace(SWITCH, numa=numa), f"0000:{bus + 1:02x}:00.0", port)
        shared = None if acs else board.group()
        for slot, what in enumerate((NIC, H100, NVME, H100, NIC)):
            down = board.put(
                replace(SWITCH, numa=numa), f"0000:{bus + 2:02x}:{slot:02x}.0", up, group=shared
            )
            address = f"0000:{bus + 3 + slot:02x}:00.0"
            made = replace(what, numa=numa, lost=address == lost)
            place = board.put(made, address, down, group=shared)
            {NIC.id: interfaces, NVME.id: scratch}.get(what.id, []).append(place)
            if what.id == H100.id:
                gpus.append(address)
    for number in range(4):
        port = board.put(PORT, f"0000:04:{number:02x}.0", "pci0000:04")
        board.put(NVSWITCH, f"0000:{5 + number:02x}:00.0", port)
    board.plant(root)
    with_rest(root, cmdline="intel_iommu=on iommu=pt pci=realloc", bits=52)
    with_disk(root, disk, number=0, mounted="/", multipath=True)
    if not acs:
        for number, place in enumerate(scratch, 1):
            with_disk(root, place, number=number, mounted=f"/scratch{number}")
    for number, place in enumerate(interfaces):
        with_interface(root, place, f"ibp{number}", uplink=not acs and number == 0)
    with_interface(root, uplink, "enxac1f6b000001", uplink=acs)
    nvidia_information(root, gpus)
    for node in (0, 1):
        pages = root / f"sys/devices/system/node/node{node}/hugepages/hugepages-1048576kB"
        pages.mkdir(parents=True)
        (pages / "nr_hugepages").write_text("512\n")
    if lost:
        # What the kernel makes of registers that read all ones.
        for name, text in (
            ("current_link_width", "63"), ("max_link_width", "63"),
            ("current_link_speed", "Unknown"), ("max_link_speed", "64.0 GT/s PCIe"),
            ("power_state", "unknown"),
        ):  # fmt: skip
            (root / f"sys/bus/pci/devices/{lost}/{name}").write_text(f"{text}\n")


def hgx_no_acs(root: Path) -> None:
    hgx(root, acs=False)


def hgx_one_lost(root: Path) -> None:
    hgx(root, lost="0000:9b:00.0")


def workstation(root: Path) -> None:
    """A Threadripper with four RTX 2080 Ti, each of four functions in a group of its own; the
    console is on the first; the ports (I/O BAR) of the last found no room, which harms nobody."""
    board = Board()
    for number, bus in enumerate((0x01, 0x21, 0x41, 0x61)):
        root_bus = f"pci0000:{bus - 1:02x}"
        # A group of bridges that root ports share, as AMD's root complexes have them.
        dummy = board.group()
        board.put(
            Function("0:0.0", "1022:1482", 0x060000), f"0000:{bus - 1:02x}:01.0", root_bus,
            group=dummy,
        )  # fmt: skip
        port = board.put(replace(PORT, id="1022:1483"), f"0000:{bus - 1:02x}:01.1", root_bus)
        card = board.group()
        flags = PORTS | UNSET if number == 3 else PORTS
        main = replace(
            RTX,
            boot_vga=int(number == 0),
            bars=(*RTX.bars[:3], (5, 128, flags)),
        )
        for function, what in enumerate((main, SOUND, USB, UCSI)):
            board.put(what, f"0000:{bus:02x}:00.{function}", port, group=card)
    port = board.put(replace(PORT, id="1022:1483"), "0000:60:03.1", "pci0000:60")
    disk = board.put(NVME, "0000:62:00.0", port)
    port = board.put(replace(PORT, id="1022:1483"), "0000:40:03.1", "pci0000:40")
    uplink = board.put(
        Function("0:0.0", "1d6a:07b1", 0x020000, "atlantic", resets="pm bus"), "0000:42:00.0", port
    )
    sata = Function("0:0.0", "1022:7901", 0x010601, "ahci", resets="pm bus")
    board.put(sata, "0000:43:00.0", port)
    board.plant(root)
    resource = root / "sys/bus/pci/devices/0000:61:00.0/resource"
    rows = resource.read_text().splitlines()
    rows[5] = f"0x{0:016x} 0x{127:016x} 0x{PORTS | UNSET:016x}"
    resource.write_text("\n".join(rows) + "\n")
    with_rest(
        root, kernel="6.12.41+deb13-amd64", bits=43, fb="0 nvidia-drmdrmfb\n",
        cmdline="amd_iommu=on quiet",
    )  # fmt: skip
    with_disk(root, disk, number=0, mounted="/")
    with_interface(root, uplink, "enp66s0", uplink=True)
    nvidia_information(root, [f"0000:{bus}:00.0" for bus in ("01", "21", "41", "61")])


def old_kernel(root: Path) -> None:
    """The workstation on Linux 4.19: no reset_method, no power_state, no d3cold_allowed."""
    workstation(root)
    for name in ("reset_method", "reset", "power_state", "d3cold_allowed"):
        for file in root.glob(f"sys/bus/pci/devices/*/{name}"):
            file.unlink()
    (root / "proc/sys/kernel/osrelease").write_text("4.19.0-27-amd64\n")


def sleeping_laptop(root: Path) -> None:
    """A laptop whose display is on Intel's GPU, its NVIDIA card in D3cold: the registers of a
    card without power read all ones, and what the kernel makes of them is no link."""
    board = Board()
    port = board.put(replace(PORT, id="8086:460d"), "0000:00:01.0", "pci0000:00")
    board.put(
        Function(
            "0:0.0", "8086:46a6", 0x030000, "i915", boot_vga=1, subsystem="17aa:3b12",
            bars=((0, 16 * MIB, M64), (2, 256 * MIB, M64P), (4, 64, PORTS)), resets="flr",
        ),
        "0000:00:02.0", "pci0000:00",
    )  # fmt: skip
    card = board.group()
    asleep = {
        "d3cold_allowed": "1", "power_state": "D3cold", "power/runtime_status": "suspended",
        "current_link_width": "63", "max_link_width": "63",
        "current_link_speed": "Unknown", "max_link_speed": "16.0 GT/s PCIe",
    }  # fmt: skip
    board.put(
        Function(
            "0:0.0", "10de:2520", 0x030000, "nvidia", boot_vga=0, lost=True, resets="bus",
            bars=((0, 16 * MIB, M32), (1, 8 * GIB, M64P), (3, 32 * MIB, M64P), (5, 128, PORTS)),
            more=asleep,
        ),
        "0000:01:00.0", port, group=card,
    )  # fmt: skip
    board.put(
        replace(SOUND, id="10de:228e", lost=True, more=asleep), "0000:01:00.1", port, group=card
    )
    # VMD: the disks' domain is below a function of the processor, and in its group.
    vmd = board.group()
    place = board.put(
        Function("0:0.0", "8086:467f", 0x010400, "vmd"), "0000:00:0e.0", "pci0000:00", group=vmd
    )
    port = board.put(
        replace(PORT, id="8086:09ab"), "10000:e0:06.0", f"{place}/pci10000:e0", group=vmd
    )
    disk = board.put(NVME, "10000:e1:00.0", port, group=vmd)
    wifi = board.put(
        Function("0:0.0", "8086:51f0", 0x028000, "iwlwifi", resets="flr"), "0000:00:14.3",
        "pci0000:00",
    )  # fmt: skip
    board.plant(root)
    with_rest(root, kernel="6.12.41+deb13-amd64", bits=39, fb="0 i915drmfb\n", cmdline="quiet")
    with_disk(root, disk, number=0, mounted="/")
    with_interface(root, wifi, "wlp0s20f3", uplink=True)


def sixteen(root: Path) -> None:
    """Sixteen A100 in four PCI domains, two of a kind in the same places of each; the disks
    behind Intel's VMD, in a domain of 32 bits."""
    board = Board()
    gpus = []
    for domain in range(4):
        for bus in (0x09, 0x0A, 0x10, 0x9F):
            root_bus = f"pci{domain:04x}:{bus - 1:02x}"
            port = board.put(PORT, f"{domain:04x}:{bus - 1:02x}:1f.0", root_bus)
            address = f"{domain:04x}:{bus:02x}:00.0"
            gpus.append(address)
            board.put(replace(A100, numa=domain // 2), address, port)
    vmd = board.group()
    place = board.put(
        Function("0:0.0", "8086:201d", 0x010400, "vmd", numa=0), "0000:64:05.5", "pci0000:64",
        group=vmd,
    )  # fmt: skip
    port = board.put(PORT, "10000:00:02.0", f"{place}/pci10000:00", group=vmd)
    disk = board.put(replace(NVME, numa=0), "10000:01:00.0", port, group=vmd)
    port = board.put(PORT, "0000:b0:01.0", "pci0000:b0")
    uplink = board.put(replace(ETHERNET, numa=1), "0000:b1:00.0", port)
    board.plant(root)
    with_rest(root, kernel="6.16.3-generic", fb="", cmdline="intel_iommu=on")
    with_disk(root, disk, number=0, mounted="/")
    with_interface(root, uplink, "ens1f0", uplink=True)
    nvidia_information(root, gpus)


def instinct(root: Path, *, card: Function, buses: tuple[int, ...]) -> None:
    """AMD's accelerators on two EPYCs, each behind a root port of its own."""
    board = Board()
    for number, bus in enumerate(buses):
        numa = number * 2 // len(buses)
        port = board.put(
            replace(PORT, id="1022:14ab", numa=numa), f"0000:{bus - 1:02x}:01.1",
            f"pci0000:{bus - 1:02x}",
        )  # fmt: skip
        board.put(replace(card, numa=numa), f"0000:{bus:02x}:00.0", port)
    port = board.put(replace(PORT, id="1022:14ab", numa=0), "0000:c0:03.1", "pci0000:c0")
    disk = board.put(replace(NVME, numa=0), "0000:c1:00.0", port)
    bridge = board.group()
    port = board.put(replace(PORT, id="1a03:1150"), "0000:c2:00.0", "pci0000:c0", group=bridge)
    display = Function("0:0.0", "1a03:2000", 0x030000, "ast", numa=0, boot_vga=1)
    board.put(display, "0000:c3:00.0", port, group=bridge)
    port = board.put(replace(PORT, id="1022:14ab", numa=1), "0000:d0:03.1", "pci0000:d0")
    uplink = board.put(replace(ETHERNET, numa=1), "0000:d1:00.0", port)
    board.plant(root)
    with_rest(root, cmdline="amd_iommu=on iommu=pt", bits=52)
    with_disk(root, disk, number=0, mounted="/")
    with_interface(root, uplink, "eno1np0", uplink=True)


def mi300x(root: Path) -> None:
    instinct(root, card=MI300X, buses=(0x05, 0x26, 0x46, 0x65, 0x85, 0xA6, 0xC6, 0xE5))


def mi250(root: Path) -> None:
    """Each module has two dies, and each die is a GPU to the host."""
    instinct(root, card=MI250, buses=(0x29, 0x2C, 0x59, 0x5C, 0x89, 0x8C, 0xB9, 0xBC))


def sriov(root: Path) -> None:
    """Two L40S, one with four virtual functions (NVIDIA vGPU), and a network card with two; each
    in a group of its own."""
    board = Board()
    port = board.put(replace(PORT, numa=0), "0000:40:01.0", "pci0000:40")
    whole = replace(L40S, numa=0, more={**L40S.more, "sriov_numvfs": "4", "sriov_totalvfs": "32"})
    board.put(whole, "0000:41:00.0", port)
    unknown = {
        "current_link_width": "0", "max_link_width": "0", "current_link_speed": "Unknown",
        "max_link_speed": "Unknown", "power_state": "D0",
    }  # fmt: skip
    virtual = replace(
        whole, physfn="0000:41:00.0", link=None, more=unknown, resets="flr",
        bars=((0, 256 * KIB, M64P), (2, 16 * GIB, M64P), (4, 32 * MIB, M64P)),
    )  # fmt: skip
    for number in range(4, 8):
        board.put(virtual, f"0000:41:00.{number}", port)
    port = board.put(replace(PORT, numa=1), "0000:c0:01.0", "pci0000:c0")
    board.put(replace(L40S, numa=1), "0000:c1:00.0", port)
    port = board.put(replace(PORT, numa=1), "0000:d0:01.0", "pci0000:d0")
    uplink = board.put(
        replace(ETHERNET, numa=1, more={"sriov_numvfs": "2", "sriov_totalvfs": "64"}),
        "0000:d1:00.0", port,
    )  # fmt: skip
    for number in range(2):
        board.put(
            replace(ETHERNET, id="8086:1889", driver="iavf", physfn="0000:d1:00.0", link=None),
            f"0000:d1:01.{number}", port,
        )  # fmt: skip
    port = board.put(replace(PORT, numa=0), "0000:50:01.0", "pci0000:50")
    disk = board.put(replace(NVME, numa=0), "0000:51:00.0", port)
    board.plant(root)
    with_rest(root, cmdline="intel_iommu=on", fb="")
    with_disk(root, disk, number=0, mounted="/")
    with_interface(root, uplink, "ens5f0", uplink=True)
    nvidia_information(root, ["0000:41:00.0", "0000:c1:00.0"])


BOARDS: Mapping[str, Callable[[Path], None]] = {
    "hgx": hgx,
    "hgx_no_acs": hgx_no_acs,
    "hgx_one_lost": hgx_one_lost,
    "workstation": workstation,
    "old_kernel": old_kernel,
    "sleeping_laptop": sleeping_laptop,
    "sixteen": sixteen,
    "mi300x": mi300x,
    "mi250": mi250,
    "sriov": sriov,
}
