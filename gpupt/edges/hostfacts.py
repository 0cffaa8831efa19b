"""Reads what doctor must know beyond the PCI bus, from /proc, /sys, /etc and /lib/modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from gpupt.edges.holders import read_holders, vfio_to_be_had
from gpupt.edges.tree import Reader
from gpupt.errors import GpuptError
from gpupt.model.facts import Guest, HostFacts, MemoryLimits, Reserved, StuckUnbind, VfioClaim
from gpupt.model.host import Host
from gpupt.model.pci import PciAddress, PciId

MODPROBE = ("etc/modprobe.d", "run/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d")


def read_facts(
    root: Path,
    host: Host,
    *,
    kvm: str | None = None,
    libvirt: GpuptError | None = None,
    guests: Sequence[Guest] = (),
    unread: Mapping[str, str] | None = None,
) -> HostFacts:
    """The facts of the machine under ``root``.

    ``kvm`` and ``libvirt`` are what is wrong with these, found out elsewhere, and ``guests``
    what libvirt tells; ``unread`` says why checks of these could not run.
    """
    reader = Reader(root)
    skipped = dict(unread or {})
    chips = interrupt_chips(reader)
    if chips is None:
        skipped["intremap-off"] = "/proc/interrupts shows it on x86 only"
    functions = {address for gpu in host.gpus for address in (gpu.address, *gpu.companions)}
    limits = memory_limits(reader)
    if limits is None:
        skipped["memlock"] = "/proc/self/limits is not readable"
    release = reader.text("proc/sys/kernel/osrelease")
    aliases = reader.whole(f"lib/modules/{release}/modules.alias")
    if not aliases:
        skipped["wrong-vfio-flavour"] = "the running kernel's modules.alias is not readable"
    if host.gpus and all(device.reset_methods is None for device in host.devices.values()):
        skipped["no-reset"] = "this kernel has no reset_method files (before 5.15)"
    kernel = kernel_version(release)
    if kernel is None:
        skipped["slow-bar-map"] = "/proc/sys/kernel/osrelease is not readable"
    bits = address_bits(reader)
    if bits is None:
        skipped["guest-bar-window"] = "/proc/cpuinfo shows no address sizes (x86 does)"
    if not (root / "proc/1").exists():
        for name in ("device-held", "iommufd-busy", "unbind-stuck"):
            skipped[name] = "no processes under this root"
    facts = HostFacts(
        interrupt_chips=chips,
        unsafe_interrupts=reader.text(
            "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
        )
        in {"Y", "1"},
        vfio=vfio_to_be_had(reader),
        holders=read_holders(reader, host, functions, whole=True),
        framebuffers=tuple(reader.whole("proc/fb").splitlines()),
        boot_framebuffers=boot_framebuffers(reader, functions),
        claims=tuple(vfio_claims(reader, host.kernel_cmdline)),
        reserved=tuple(reserved_regions(reader, host)),
        flavours=flavours(reader, functions, aliases=aliases),
        hugepages=hugepages(reader),
        limits=limits,
        stuck=tuple(stuck_unbinds(reader)),
        kvm=kvm,
        libvirt=libvirt,
        guests=tuple(guests),
        address_bits=bits,
        kernel=kernel,
        unread=skipped,
    )
    denied = [path for path in reader.denied if path.endswith("/fd")]
    if denied and not any(each.pid for held in facts.holders.values() for each in held):
        skipped["device-held"] = f"{len(denied)} processes may be looked into by root only"
        skipped["iommufd-busy"] = skipped["device-held"]
    return facts


def kernel_version(release: str | None) -> tuple[int, int] | None:
    """The two numbers that a release such as ``6.12.41+deb13-amd64`` begins with."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", release or "")
    return None if found is None else (int(found[1]), int(found[2]))


def address_bits(reader: Reader) -> int | None:
    """The bits of a physical address, from ``address sizes : 46 bits physical, …``."""
    bits = word_of(reader, "proc/cpuinfo", row="address sizes", word=3)
    return int(bits) if bits is not None and bits.isdecimal() and 32 <= int(bits) <= 64 else None


def interrupt_chips(reader: Reader) -> frozenset[str] | None:
    """The interrupt controllers in use, ``IR-…`` where interrupts are remapped; None where
    /proc/interrupts names none of x86's."""
    found = set()
    for line in reader.whole("proc/interrupts").splitlines():
        for word in line.split():
            if word.startswith(("IR-", "IO-APIC", "PCI-MSI", "HPET-MSI", "DMAR-MSI", "AMD-Vi")):
                found.add(word)
    return frozenset(found) or None


def boot_framebuffers(reader: Reader, functions: Iterable[PciAddress]) -> dict[PciAddress, str]:
    """Functions whose memory the firmware's framebuffer is in, from /proc/iomem."""
    found: dict[PciAddress, str] = {}
    names = {str(address): address for address in functions}
    above: PciAddress | None = None
    depth = 0
    for line in reader.whole("proc/iomem").splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.partition(" : ")[2]
        if name in names:
            above, depth = names[name], indent
        elif above is not None and indent <= depth:
            above = None
        elif above is not None and name in {"BOOTFB", "efifb", "simplefb", "vesafb", "simpledrm"}:
            found[above] = name
    return found


def vfio_claims(reader: Reader, cmdline: str) -> Iterator[VfioClaim]:
    """Where vfio-pci is told to take ids: the command line, and modprobe's configuration."""
    for word in cmdline.split():
        key, _, value = word.partition("=")
        if key.replace("_", "-") == "vfio-pci.ids":
            yield VfioClaim(f"kernel command line: {word}", tuple(ids_in(value)))
    for folder in MODPROBE:
        for name in reader.names(folder):
            if not name.endswith(".conf"):
                continue
            for line in reader.whole(f"{folder}/{name}").splitlines():
                words = line.split()
                if words[:1] != ["options"] or words[1:2] not in (["vfio-pci"], ["vfio_pci"]):
                    continue
                for word in words[2:]:
                    if word.startswith("ids="):
                        yield VfioClaim(f"/{folder}/{name}: {line}", tuple(ids_in(word[4:])))


def ids_in(text: str) -> Iterator[PciId]:
    """The ids of ``10de:2330,10de:10f8:ffff:ffff``; what is no id is left out."""
    for entry in text.strip('"').split(","):
        parts = entry.split(":")
        try:
            yield PciId(int(parts[0], 16), int(parts[1], 16))
        except (IndexError, ValueError):
            continue


def reserved_regions(reader: Reader, host: Host) -> Iterator[Reserved]:
    """The reserved regions of the GPUs' groups."""
    for number in sorted({gpu.device.iommu_group for gpu in host.gpus} - {None}, key=str):
        for line in reader.whole(f"sys/kernel/iommu_groups/{number}/reserved_regions").splitlines():
            try:
                start, end, kind = line.split()
                yield Reserved(int(str(number)), int(start, 16), int(end, 16), kind)
            except ValueError:
                continue


def flavours(
    reader: Reader, functions: Iterable[PciAddress], *, aliases: str
) -> dict[PciAddress, str]:
    """Functions for which the kernel has a VFIO driver more exact than vfio-pci.

    Variant drivers say so by aliases of their own: Documentation/driver-api/vfio.rst and
    libvirt's virPCIDeviceFindBestVFIOVariant read them in the same way.
    """
    known = [
        (parts[1], parts[2])
        for parts in (line.split() for line in aliases.splitlines() if "alias vfio_pci:" in line)
        if len(parts) == 3 and parts[2] != "vfio_pci"
    ]
    found = {}
    for address in functions:
        modalias = reader.text(f"sys/bus/pci/devices/{address}/modalias") or ""
        for pattern, module in known:
            if fnmatchcase(f"vfio_{modalias}", pattern):
                found[address] = module
    return found


def hugepages(reader: Reader) -> dict[int, int]:
    """Bytes of reserved hugepages by NUMA node."""
    found = {}
    folder = "sys/devices/system/node"
    for name in reader.names(folder):
        if not (name.startswith("node") and name[4:].isdecimal()):
            continue
        total = 0
        for size in reader.names(f"{folder}/{name}/hugepages"):
            count = reader.number(f"{folder}/{name}/hugepages/{size}/nr_hugepages", base=10)
            kilobytes = size.removeprefix("hugepages-").removesuffix("kB")
            total += (count or 0) * (int(kilobytes) << 10 if kilobytes.isdecimal() else 0)
        found[int(name[4:])] = total
    return found


def memory_limits(reader: Reader) -> MemoryLimits | None:
    """What this process, and the guests it may start by itself, can lock."""
    hard = word_of(reader, "proc/self/limits", row="Max locked memory", word=4)
    if hard is None or not (hard == "unlimited" or hard.isdecimal()):
        return None
    total = word_of(reader, "proc/meminfo", row="MemTotal:", word=1)
    return MemoryLimits(
        locked=None if hard == "unlimited" else int(hard),
        as_root=effective_user(reader) == 0,
        dma_entries=reader.number(
            "sys/module/vfio_iommu_type1/parameters/dma_entry_limit", base=10
        ),
        total=int(total) << 10 if total is not None and total.isdecimal() else None,
    )


def effective_user(reader: Reader) -> int:
    """The effective user of the process that reads, or that recorded the tree; 0 if not told."""
    user = word_of(reader, "proc/self/status", row="Uid:", word=2)
    return int(user) if user is not None and user.isdecimal() else 0


def word_of(reader: Reader, path: str, *, row: str, word: int) -> str | None:
    """A word of the first line that begins with ``row``; None where there is none."""
    for line in reader.whole(path).splitlines():
        if line.startswith(row):
            return next(iter(line.split()[word:]), None)
    return None


def stuck_unbinds(reader: Reader) -> Iterator[StuckUnbind]:
    """Processes whose kernel stack is inside unbind_store: in state D, or in S where vfio waits
    for the device to be released (vfio_unregister_group_dev)."""
    for name in reader.names("proc"):
        if not name.isdecimal():
            continue
        # proc_pid_stat(5): PID (command) state …; the command may hold spaces and brackets.
        state = (reader.text(f"proc/{name}/stat") or "").rpartition(")")[2].split()
        guest = state[:1] == ["S"] and "vfio" in (reader.text(f"proc/{name}/wchan") or "")
        if not guest and state[:1] != ["D"]:
            continue
        if "unbind_store" in reader.whole(f"proc/{name}/stack"):
            yield StuckUnbind(int(name), reader.text(f"proc/{name}/comm") or "?", guest)
