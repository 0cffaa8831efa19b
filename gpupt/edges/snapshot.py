"""Records the files that gpupt reads of a machine, to be read again elsewhere by --root.

What names a machine or a person stays behind: serial numbers (PCI config space is cut to its
first 64 bytes), MAC addresses, UUIDs, host names, and every mount but those of disks.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from gpupt.edges.sysfs import PciReader
from gpupt.edges.tree import Reader
from gpupt.errors import Failed
from gpupt.model.pci import PciAddress, PciDevice

ATTRIBUTES = (
    "vendor", "device", "class", "subsystem_vendor", "subsystem_device", "revision",
    "modalias", "numa_node", "boot_vga", "driver_override", "resource", "reset_method",
    "d3cold_allowed", "power_state", "power/runtime_status", "current_link_width",
    "max_link_width", "current_link_speed", "max_link_speed", "sriov_numvfs", "sriov_totalvfs",
)  # fmt: skip
LINKS = ("driver", "iommu_group", "physfn")
ALWAYS = (
    "proc/fb", "proc/iomem", "proc/self/limits", "proc/meminfo", "proc/sys/kernel/osrelease",
    "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
    "sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
)  # fmt: skip
# Words of the kernel's command line that bear on passthrough; the rest is nobody's business.
BOOT_WORDS = re.compile(
    r"(\w+_)?iommu|vfio|pci|intremap|nointremap|x2apic|module_blacklist|modprobe|video|nvidia|"
    r"nouveau|amdgpu|i915|radeon|(default_)?huge|nomodeset|kvm|rd\.driver"
)
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|[0-9a-fA-F]{32}")
MAC = re.compile(r"\b([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\b")


def write_snapshot(root: Path, file: Path) -> int:
    """Write the snapshot as a .tar.gz, whole or not at all; the number of its entries."""
    half = file.with_name(f".{file.name}.{os.getpid()}")
    count = 0
    try:
        with tarfile.open(half, "w:gz") as archive:
            for path, content in sorted(entries(root)):
                add(archive, path, content)
                count += 1
        half.replace(file)
    except OSError as error:
        raise Failed(
            f"cannot write {file}",
            details=error.strerror or str(error),
            remedy="name a file in a folder that you may write to",
        ) from None
    finally:
        # Where it may not be made, it may not be looked for either.
        with suppress(OSError):
            half.unlink(missing_ok=True)
    return count


def add(archive: tarfile.TarFile, path: str, content: bytes | str | None) -> None:
    """One entry: bytes are a file, text the target of a link, None a folder."""
    entry = tarfile.TarInfo(path)
    if isinstance(content, bytes):
        entry.size = len(content)
        entry.mode = 0o644
        archive.addfile(entry, io.BytesIO(content))
        return
    entry.mode = 0o755
    entry.type = tarfile.DIRTYPE if content is None else tarfile.SYMTYPE
    entry.linkname = content or ""
    archive.addfile(entry)


def entries(root: Path) -> Iterator[tuple[str, bytes | str | None]]:
    """Everything of the snapshot by its path: files, links and empty folders."""
    reader = PciReader(root)
    for path in ALWAYS:
        yield from small_file(reader, path)
    yield from reduced_files(reader)
    bus = "sys/bus/pci/devices"
    for address in reader.names(bus):
        yield from function(reader, f"{bus}/{address}")
    drivers = {reader.link(f"{bus}/{address}/driver") for address in reader.names(bus)}
    for driver in sorted((drivers | {"vfio-pci"}) - {None}, key=str):
        if os.path.isdir(f"{reader.root}sys/bus/pci/drivers/{driver}"):
            yield f"sys/bus/pci/drivers/{driver}", None
    for group in reader.names("sys/kernel/iommu_groups"):
        for name in ("type", "reserved_regions"):
            yield from small_file(reader, f"sys/kernel/iommu_groups/{group}/{name}")
    for unit in reader.names("sys/class/iommu"):
        yield f"sys/class/iommu/{unit}", None
    for node in reader.names("sys/devices/system/node"):
        for size in reader.names(f"sys/devices/system/node/{node}/hugepages"):
            place = f"sys/devices/system/node/{node}/hugepages/{size}/nr_hugepages"
            yield from small_file(reader, place)
    # Without a bus there is nothing that a disk could be on.
    devices = reader.devices() if reader.names(bus) else {}
    yield from critical_parts(reader, devices)


def reduced_files(reader: Reader) -> Iterator[tuple[str, bytes]]:
    """Long or private files, as far as gpupt reads them."""
    words = [word for word in reader.whole("proc/cmdline").split() if BOOT_WORDS.match(word)]
    yield "proc/cmdline", (" ".join(words) + "\n").encode()
    for line in reader.whole("proc/self/status").splitlines():
        if line.startswith("Uid:"):
            yield "proc/self/status", f"{line}\n".encode()
    for line in reader.whole("proc/cpuinfo").splitlines():
        if line.startswith("address sizes"):
            yield "proc/cpuinfo", f"{line}\n".encode()
            break
    chips = [
        " ".join(word for word in line.split() if not word.strip(":").isdigit())
        for line in reader.whole("proc/interrupts").splitlines()[1:]
    ]
    if chips:
        yield "proc/interrupts", ("\n".join(sorted(set(chips))) + "\n").encode()
    release = reader.text("proc/sys/kernel/osrelease")
    for name in ("modules.alias", "modules.dep", "modules.builtin"):
        path = f"lib/modules/{release}/{name}"
        lines = [
            line
            for line in reader.whole(path).splitlines()
            if "alias vfio_pci:" in line or "/vfio-pci.ko" in line
        ]
        if lines:
            yield path, ("\n".join(lines) + "\n").encode()


def function(reader: Reader, folder: str) -> Iterator[tuple[str, bytes | str | None]]:
    """A PCI function: its attributes, its links, and the head of its config space."""
    for name in ATTRIBUTES:
        yield from small_file(reader, f"{folder}/{name}")
    config = reader.bytes(f"{folder}/config", most=64)
    if config is not None:
        yield f"{folder}/config", config
    for name in LINKS:
        target = reader.link(f"{folder}/{name}")
        if target is not None:
            above = {
                "driver": "../../drivers",
                "iommu_group": "../../../../kernel/iommu_groups",
                "physfn": "..",
            }[name]
            yield f"{folder}/{name}", f"{above}/{target}"
    for kind in ("drm", "graphics", "sound"):
        for name in reader.names(f"{folder}/{kind}"):
            yield f"{folder}/{kind}/{name}", None
            yield from small_file(reader, f"{folder}/{kind}/{name}/boot_display")


def critical_parts(
    reader: Reader, devices: Mapping[PciAddress, PciDevice]
) -> Iterator[tuple[str, bytes | str | None]]:
    """What says which devices the host needs: mounts of disks, and the default route.

    The disks and interfaces get names of their own under the function they are on.
    """
    from gpupt.edges.critical import disks, uplinks

    rows, seen, unknown = [], 0, False
    for address, why in sorted(set(disks(reader, devices))):
        if not why.endswith("is on it"):
            # Which disk it is was not found out, and is not to be on the recording either.
            unknown = True
            continue
        place = f"sys/bus/pci/devices/{address}/block/disk{seen}"
        yield place, None
        yield f"sys/dev/block/259:{seen}", f"../../bus/pci/devices/{address}/block/disk{seen}"
        point = why.removesuffix(" is on it")
        # Only the mount points that every machine has are named.
        known = point if point in {"/", "/boot", "/boot/efi", "/home", "/var", "/usr"} else "/mnt"
        rows.append(f"{seen} 1 259:{seen} / {known} rw - ext4 /dev/disk{seen} rw")
        seen += 1
    rooted = any(" / / " in row for row in rows)
    if unknown:
        rows.append(f"99 1 0:1 / {'/mnt' if rooted else '/'} rw - zfs zfs rw")
    elif not rooted:
        rows.append("99 1 0:1 / / rw - overlay overlay rw")
    yield "proc/self/mountinfo", ("\n".join(rows) + "\n").encode()
    routes = ["Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT"]
    for number, (address, _) in enumerate(sorted(set(uplinks(reader, devices)))):
        yield f"sys/bus/pci/devices/{address}/net/net{number}", None
        yield (
            f"sys/class/net/net{number}",
            f"../../bus/pci/devices/{address}/net/net{number}",
        )
        routes.append(f"net{number}\t00000000\t00000000\t0003\t0\t0\t0\t00000000\t0\t0\t0")
    yield "proc/net/route", ("\n".join(routes) + "\n").encode()


def small_file(reader: Reader, path: str) -> Iterator[tuple[str, bytes]]:
    """A file with what names a machine taken out; nothing where there is none.

    An empty one is recorded: a reset_method that names none is not one that is not told."""
    text = reader.whole(path)
    if text or reader.text(path) == "":
        yield path, MAC.sub("00:00:00:00:00:00", UUID.sub("(removed)", text)).encode()
