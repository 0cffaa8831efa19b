"""A sysfs tree in a folder that reacts to writes as the kernel does, with faults to inject.

The rules are those of drivers/base/bus.c and drivers/pci/pci-driver.c: an override is
matched by name alone; ``drivers_probe`` succeeds also when no driver took the function;
``bind`` of a bound function is EBUSY, of one that does not match ENODEV.  All state is in
the tree, so a killed process loses none of it.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import RLock
from typing import NoReturn

from gpupt.edges.kernel import Kernel, refused_write, stuck


@dataclass(frozen=True)
class Function:
    """A PCI function to plant; ``more`` are further files of its folder."""

    address: str
    id: str
    class_code: int
    driver: str | None = None
    override: str | None = None
    group: int | None = None
    numa: int = -1
    boot_vga: int | None = None
    subsystem: str = "10de:16c1"
    revision: int = 0xA1
    link: tuple[int, int, float, float] | None = None
    bars: tuple[tuple[int, int, int], ...] = ()
    resets: str | None = None
    physfn: str | None = None
    lost: bool = False
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """Something that goes wrong when ``operation`` meets ``address``.

    ``effect`` is an errno, ``silent`` (success, nothing happened), ``stuck``, ``lost`` (the
    card falls off the bus), or ``kill-before`` and ``kill-after`` (SIGKILL of the process);
    ``times`` None: always.
    """

    operation: str
    address: str
    effect: int | str
    times: int | None = None


class FakeKernel(Kernel):
    """A kernel over a planted tree.  ``drivers`` maps a driver to the ids it knows; which
    driver a probe finds is decided by that order.  ``writes`` keeps what was written."""

    def __init__(
        self,
        root: Path,
        *,
        drivers: Mapping[str, Sequence[str]],
        loadable: Sequence[str] = (),
        faults: Sequence[Fault] = (),
    ) -> None:
        super().__init__(root)
        self.ids = {name: set(ids) for name, ids in drivers.items()}
        self.loadable = set(loadable)
        self.faults = list(faults)
        self.writes: list[tuple[str, str]] = []
        # Held while a write is at work: no death of the process falls into it, as none does
        # with the kernel's own.
        self.at_work = RLock()

    def die(self) -> NoReturn:
        """SIGKILL of the process, between the writes of its other threads."""
        with self.at_work:
            os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("SIGKILL comes back to nobody")

    def load_module(self, name: str) -> None:
        if name not in self.loadable:
            super().load_module(name)
        plant_driver(self.root, name)

    def write(self, path: PurePosixPath, text: str, *, deadline: float) -> None:
        with self.at_work:
            self.take(path, text, deadline=deadline)

    def take(self, path: PurePosixPath, text: str, *, deadline: float) -> None:
        target = self.inside(path)
        if not target.exists():
            raise refused_write(path, text.strip(), errno.ENOENT)
        word = text.strip()
        self.writes.append((f"/{path}", word))
        if path.parts[1] == "class" or path.name == "d3cold_allowed":
            fault = self.fault("attribute", str(path))
            if fault is not None and isinstance(fault.effect, int):
                raise refused_write(path, word, fault.effect)
            if fault is None:
                target.write_text(f"{word}\n")
            return
        if path.parts[2] == "platform":
            (target.parent / word).unlink()
            return
        operation = path.name
        address = path.parts[4] if operation in {"driver_override", "reset"} else word
        fault = self.fault(operation, address)
        if fault is not None and fault.effect == "kill-before":
            self.die()
        if fault is not None and fault.effect == "stuck":
            raise stuck(path, word, deadline)
        if fault is not None and isinstance(fault.effect, int):
            raise refused_write(path, word, fault.effect)
        if fault is not None and fault.effect == "lost":
            self.lose(address)
        if fault is None or fault.effect != "silent":
            number = self.react(operation, address, word=word, driver=path.parent.name)
            if number:
                raise refused_write(path, word, number)
        if fault is not None and fault.effect == "kill-after":
            self.die()

    def fault(self, operation: str, address: str) -> Fault | None:
        for fault in self.faults:
            if (fault.operation, fault.address) == (operation, address) and fault.times != 0:
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    def react(self, operation: str, address: str, *, word: str, driver: str) -> int:
        """0 or an errno."""
        folder = self.root / "sys/bus/pci/devices" / address
        if not folder.exists():
            return errno.ENODEV
        bound = self.driver_of(address)
        if operation == "driver_override":
            (folder / "driver_override").write_text(f"{word or '(null)'}\n")
        elif operation == "unbind":
            if bound != driver:
                return errno.ENODEV
            (folder / "driver").unlink()
        elif operation == "drivers_probe":
            chosen = next((name for name in self.ids if self.matches(name, address)), None)
            if bound is None and chosen is not None:
                self.attach(address, chosen)
        elif operation == "bind":
            if not self.matches(driver, address):
                return errno.ENODEV
            if bound is not None:
                return errno.EBUSY
            self.attach(address, driver)
        elif operation != "reset":
            return errno.EINVAL
        return 0

    def lose(self, address: str) -> None:
        """Let the card fall off the bus: config space reads all ones."""
        config = self.root / "sys/bus/pci/devices" / address / "config"
        config.write_bytes(b"\xff" * len(config.read_bytes()))

    def matches(self, driver: str, address: str) -> bool:
        folder = self.root / "sys/bus/pci/devices" / address
        if not (self.root / "sys/bus/pci/drivers" / driver).is_dir():
            return False
        override = (folder / "driver_override").read_text().strip()
        if override != "(null)":
            return override == driver
        return id_of(folder) in self.ids.get(driver, ())

    def driver_of(self, address: str) -> str | None:
        link = self.root / "sys/bus/pci/devices" / address / "driver"
        return os.readlink(link).rpartition("/")[2] if link.is_symlink() else None

    def attach(self, address: str, driver: str) -> None:
        folder = self.root / "sys/bus/pci/devices" / address
        (folder / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")

    def tree(self) -> dict[str, str]:
        """Everything in the tree, for comparison: files by their text, links by their target."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_symlink():
                found[name] = f"→ {os.readlink(path)}"
            elif path.is_file():
                found[name] = path.read_bytes().hex()
        return found


def id_of(folder: Path) -> str:
    vendor, device = ((folder / name).read_text().strip()[2:] for name in ("vendor", "device"))
    return f"{vendor}:{device}"


def plant(root: Path, functions: Sequence[Function], *, drivers: Sequence[str] = ()) -> None:
    """Make the tree of a machine with these functions and these registered drivers."""
    (root / "sys/bus/pci/devices").mkdir(parents=True)
    (root / "sys/class/iommu").mkdir(parents=True)
    for name in dict.fromkeys([*drivers, *(f.driver for f in functions if f.driver)]):
        plant_driver(root, name)
    (root / "sys/bus/pci/drivers_probe").write_text("")
    (root / "proc").mkdir()
    (root / "proc/cmdline").write_text("BOOT_IMAGE=/vmlinuz root=/dev/nvme0n1p2 ro quiet\n")
    for function in functions:
        plant_function(root, function)
    if any(function.group is not None for function in functions):
        (root / "sys/class/iommu/dmar0").mkdir()


def plant_driver(root: Path, name: str) -> None:
    folder = root / "sys/bus/pci/drivers" / name
    folder.mkdir(parents=True, exist_ok=True)
    for control in ("bind", "unbind"):
        (folder / control).write_text("")


def plant_function(root: Path, function: Function) -> None:
    """The folder of one function under sys/devices, and the links to it."""
    place = root / "sys/devices/pci0000:00" / function.address
    place.mkdir(parents=True)
    (root / "sys/bus/pci/devices" / function.address).symlink_to(
        f"../../../devices/pci0000:00/{function.address}"
    )
    vendor, device = function.id.split(":")
    sub_vendor, sub_device = function.subsystem.split(":")
    texts = {
        "vendor": f"0x{vendor}",
        "device": f"0x{device}",
        "class": f"0x{function.class_code:06x}",
        "subsystem_vendor": f"0x{sub_vendor}",
        "subsystem_device": f"0x{sub_device}",
        "revision": f"0x{function.revision:02x}",
        "numa_node": str(function.numa),
        "driver_override": function.override or "(null)",
        "modalias": modalias(function.id, function.class_code, function.subsystem),
        "resource": resource_text(function.bars),
        **function.more,
    }
    if function.boot_vga is not None:
        texts["boot_vga"] = str(function.boot_vga)
    if function.resets is not None:
        texts["reset_method"] = function.resets
        if function.resets:
            texts["reset"] = ""
    if function.link is not None:
        width, most, speed, fastest = function.link
        texts["current_link_width"], texts["max_link_width"] = str(width), str(most)
        texts["current_link_speed"] = f"{speed:.1f} GT/s PCIe"
        texts["max_link_speed"] = f"{fastest:.1f} GT/s PCIe"
    for name, text in texts.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"{text}\n")
    config = bytearray(64)
    struct.pack_into("<HH", config, 0, int(vendor, 16), int(device, 16))
    config[14] = 1 if function.class_code >> 8 == 0x0604 else 0
    (place / "config").write_bytes(b"\xff" * 64 if function.lost else bytes(config))
    if function.driver is not None:
        (place / "driver").symlink_to(f"../../../bus/pci/drivers/{function.driver}")
    if function.physfn is not None:
        (place / "physfn").symlink_to(f"../{function.physfn}")
    if function.group is not None:
        group = root / f"sys/kernel/iommu_groups/{function.group}"
        (group / "devices").mkdir(parents=True, exist_ok=True)
        (group / "type").write_text("DMA-FQ\n")
        (group / "reserved_regions").write_text("0x00000000fee00000 0x00000000feefffff msi\n")
        (group / "devices" / function.address).symlink_to(
            f"../../../../devices/pci0000:00/{function.address}"
        )
        (place / "iommu_group").symlink_to(f"../../../kernel/iommu_groups/{function.group}")


def modalias(ids: str, class_code: int, subsystem: str = "0000:0000") -> str:
    """What the kernel calls such a function when it looks for a driver."""
    numbers = (int(part, 16) for part in f"{ids}:{subsystem}".split(":"))
    return "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{:02X}sc{:02X}i{:02X}".format(
        *numbers, *class_code.to_bytes(3, "big")
    )


def resource_text(bars: Sequence[tuple[int, int, int]]) -> str:
    """The ``resource`` file: 13 rows of start, end and flags; each bar is index, size, flags."""
    rows = [(0, 0, 0)] * 13
    start = 0x20_0000_0000
    for index, size, flags in bars:
        rows[index] = (start, start + size - 1, flags)
        start += size
    return "\n".join(f"0x{a:016x} 0x{b:016x} 0x{flags:016x}" for a, b, flags in rows)
