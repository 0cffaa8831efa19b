"""What `gpupt host prepare` knows of a host: how it boots, what it loads, what it limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class BootTool(StrEnum):
    """The distributions' own ways to change the kernel's command line that gpupt knows."""

    UPDATE_GRUB = "update-grub"
    GRUBBY = "grubby"
    KERNEL_INSTALL = "kernel-install"


@dataclass(frozen=True, slots=True)
class InstalledKernel:
    """A kernel that has a boot entry: its release, and the image under /boot or /lib/modules."""

    release: str
    image: str


@dataclass(frozen=True, slots=True)
class Boot:
    """How the host boots.  ``tool`` None: in no way that gpupt changes, and ``why`` says so.

    ``words`` are those that every boot entry has, the kernel line of the next boot; None:
    the entries could not be read.  ``program`` is the tool's path.
    """

    tool: BootTool | None
    why: str
    program: str = ""
    words: frozenset[str] | None = None
    kernels: tuple[InstalledKernel, ...] = ()


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon of libvirt's that cannot raise its guests' limit of locked memory.

    ``locked`` is the limit in bytes that its guests inherit."""

    unit: str
    pid: int
    locked: int


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is only prepared when it is asked for: bytes of hugepages, and a user whose own
    guests (qemu:///session) may lock memory."""

    hugepages: int | None = None
    memlock_user: str | None = None


@dataclass(frozen=True, slots=True)
class PreparationFacts:
    """What prepare is decided from; None: could not be read."""

    boot: Boot
    # From /proc/cpuinfo: GenuineIntel, AuthenticAMD, …, and the processor's flags.
    vendor: str | None = None
    flags: frozenset[str] | None = None
    # The names in /sys/firmware/acpi/tables: DMAR is VT-d's, IVRS AMD-Vi's.
    tables: frozenset[str] | None = None
    kvm: bool = True
    vfio: bool = True
    vfio_built_in: bool = False
    remapped: bool | None = None
    # Modules that are loaded at boot, and the file that says so.
    loaded_at_boot: Mapping[str, str] = field(default_factory=dict)
    memory: int | None = None
    page_size: int | None = None
    # Every vm.nr_hugepages of sysctl's files, in the order in which they are applied.
    reserved_pages: tuple[tuple[str, int], ...] = ()
    daemons: tuple[Daemon, ...] = ()
    memlock_users: frozenset[str] = frozenset()
    # The present text of each file that prepare may have to do with; None: there is none.
    files: Mapping[str, str | None] = field(default_factory=dict)
