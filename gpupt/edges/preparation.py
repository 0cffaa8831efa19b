"""Reads what `gpupt host prepare` is decided from, and keeps the record of what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpupt.actions import Action
from gpupt.edges import codec
from gpupt.edges.bootentries import read_boot
from gpupt.edges.etc import Etc
from gpupt.edges.holders import vfio_to_be_had
from gpupt.edges.hostfacts import interrupt_chips
from gpupt.edges.tree import Reader
from gpupt.errors import Failed
from gpupt.model.preparation import Daemon, PreparationFacts

RECORD = "prepared.json"
# In the order in which a file shadows another of the same name (sysctl.d(5)).
SYSCTL = ("/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d")
MODULES_LOAD = ("/etc/modules-load.d", "/run/modules-load.d", "/usr/lib/modules-load.d")
UNSAFE = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
CAP_SYS_RESOURCE = 24


def read_preparation(root: Path, *, files: Sequence[str], units: Sequence[str]) -> PreparationFacts:
    """The facts of the machine under ``root``; ``files`` are those whose text is wanted, and
    ``units`` libvirt's daemons that start guests."""
    reader, etc = Reader(root), Etc(root)
    vendor, flags = processor(reader)
    tables = reader.names("sys/firmware/acpi/tables")
    chips = interrupt_chips(reader)
    if reader.text(UNSAFE) in {"Y", "1"}:
        # An admin's own decision, which doctor warns of.
        chips = None
    release = reader.text("proc/sys/kernel/osrelease")
    memory = {
        line.partition(":")[0]: int(line.split()[1]) << 10
        for line in reader.whole("proc/meminfo").splitlines()
        if line.startswith(("MemTotal:", "Hugepagesize:"))
    }
    return PreparationFacts(
        boot=read_boot(etc),
        vendor=vendor,
        flags=flags,
        tables=frozenset(tables) or None,
        kvm=etc.exists("/sys/class/misc/kvm"),
        vfio=vfio_to_be_had(reader),
        vfio_built_in="/vfio-pci.ko" in reader.whole(f"lib/modules/{release}/modules.builtin"),
        remapped=None if chips is None else any(chip.startswith("IR-") for chip in chips),
        loaded_at_boot=dict(loaded_at_boot(etc)),
        memory=memory.get("MemTotal"),
        page_size=memory.get("Hugepagesize"),
        reserved_pages=tuple(reserved_pages(etc)),
        daemons=tuple(bound_daemons(reader, etc, units=units)),
        memlock_users=frozenset(memlock_users(etc)),
        files={name: etc.text(name) for name in files},
    )


def processor(reader: Reader) -> tuple[str | None, frozenset[str] | None]:
    """The vendor and the flags of the first processor in /proc/cpuinfo."""
    vendor, flags = None, None
    for line in reader.whole("proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "vendor_id" and vendor is None:
            vendor = value.strip()
        if key.strip() == "flags" and flags is None:
            flags = frozenset(value.split())
    return vendor, flags


def loaded_at_boot(etc: Etc) -> Iterator[tuple[str, str]]:
    """Modules that modules-load.d(5), or Debian's /etc/modules, loads, and where it says so."""
    for name in settings_files(etc, MODULES_LOAD):
        for line in (etc.text(name) or "").splitlines():
            if line.strip() and line.strip()[0] not in "#;":
                yield line.split()[0], name
    for line in (etc.text("/etc/modules") or "").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.split()[0], "/etc/modules"


def settings_files(etc: Etc, folders: Sequence[str]) -> list[str]:
    """The .conf files of some folders in the order of their names; the first folder's wins."""
    found: dict[str, str] = {}
    for folder in folders:
        for name in etc.names(folder, ending=".conf"):
            found.setdefault(name.rpartition("/")[2], name)
    return [found[base] for base in sorted(found)]


def reserved_pages(etc: Etc) -> Iterator[tuple[str, int]]:
    """Every vm.nr_hugepages, in the order in which they are applied at boot."""
    for name in settings_files(etc, SYSCTL):
        for line in (etc.text(name) or "").splitlines():
            key, _, value = line.strip().lstrip("-").partition("=")
            if key.strip().replace("/", ".") == "vm.nr_hugepages" and value.strip().isdigit():
                yield name, int(value)


def bound_daemons(reader: Reader, etc: Etc, *, units: Sequence[str]) -> Iterator[Daemon]:
    """Running daemons with a limit of locked memory and without CAP_SYS_RESOURCE, which
    setrlimit(2) asks for; none whose unit raises the limit from its next start on."""
    for name in reader.names("proc"):
        unit = (reader.text(f"proc/{name}/comm") or "") if name.isdigit() else ""
        if unit not in units or raised_by_unit(etc, unit):
            continue
        status = dict(
            line.split(":", 1) for line in reader.whole(f"proc/{name}/status").splitlines()
            if ":" in line
        )  # fmt: skip
        # A user's own daemon (qemu:///session) runs in no unit of the system's.
        if status.get("Uid", "1").split()[1:2] != ["0"]:
            continue
        may_raise = int(status.get("CapEff", "0").strip() or "0", 16) >> CAP_SYS_RESOURCE & 1
        hard = next(
            (
                line.split()[4]
                for line in reader.whole(f"proc/{name}/limits").splitlines()
                if line.startswith("Max locked memory")
            ),
            "unlimited",
        )
        if not may_raise and hard.isdigit():
            yield Daemon(unit, int(name), int(hard))


def raised_by_unit(etc: Etc, unit: str) -> bool:
    """Whether a drop-in of the unit says that memory may be locked without limit."""
    return any(
        "LimitMEMLOCK=infinity" in (etc.text(name) or "").split()
        for folder in ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system")
        for name in etc.names(f"{folder}/{unit}.service.d", ending=".conf")
    )


def memlock_users(etc: Etc) -> Iterator[str]:
    """Users that limits.conf(5) lets lock memory without limit."""
    for name in ("/etc/security/limits.conf", *etc.names("/etc/security/limits.d", ending=".conf")):
        for line in (etc.text(name) or "").splitlines():
            words = line.split()
            # user, hard or both, item, value
            if (
                len(words) == 4
                and words[1] in {"hard", "-"}
                and words[2] == "memlock"
                and (words[3] in {"unlimited", "infinity", "-1"})
            ):
                yield words[0]


@dataclass(frozen=True, slots=True)
class Written:
    """An action that changed the host, and the folders that were made for its file."""

    action: Action
    made: tuple[str, ...] = ()


def read_record(state: Path) -> tuple[Written, ...]:
    """What was written and not taken back, in order; raises Failed for a damaged record."""
    file = state / RECORD
    try:
        held = json.loads(file.read_text())
        if held["schema"] != 1:
            raise ValueError(f"schema {held['schema']}")
        return tuple(
            Written(codec.from_plain(row["action"]), tuple(row["made"])) for row in held["written"]
        )
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(
            f"{file} cannot be read: it holds what gpupt host prepare wrote",
            details=f"{type(error).__name__}: {error}",
            remedy="move it aside; the files that gpupt wrote say so in their first line",
        ) from None


def write_record(state: Path, rows: Sequence[Written]) -> None:
    """Keep the record on the disk; none where nothing is written.  Raises Failed."""
    plain = {
        "schema": 1,
        "written": [{"action": codec.to_plain(r.action), "made": list(r.made)} for r in rows],
    }
    text = json.dumps(plain, indent=2) + "\n"
    Etc(state).put(f"/{RECORD}", text if rows else None)
