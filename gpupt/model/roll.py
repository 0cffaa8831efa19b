"""Rolls, the layers baked from them, and bootable images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True, slots=True)
class Check:
    """A command that proves a roll works on a node: exit 0 within ``deadline`` seconds."""

    name: str
    command: tuple[str, ...]
    roles: tuple[str, ...]
    deadline: int


@dataclass(frozen=True, slots=True)
class Job:
    """Something a roll offers to run on the frontend (``gpupt run NAME JOB``)."""

    name: str
    summary: str
    command: tuple[str, ...]
    deadline: int


@dataclass(frozen=True, slots=True)
class Roll:
    """A named, versioned bundle.  ``packages`` are Debian's, ``sources`` its source packages
    that the role builds from; ``lock`` is the file in the roll's folder that pins Python
    distributions with hashes; ``digest`` covers every file."""

    name: str
    version: str
    summary: str
    needs: tuple[str, ...]
    packages: tuple[str, ...]
    lock: str | None
    checks: tuple[Check, ...]
    jobs: tuple[Job, ...]
    digest: str
    sources: tuple[str, ...] = ()


# The roll that installs gpupt itself: its layer also depends on gpupt's own source.
SELF = "gpupt"
# The roll that builds the emulated host's QEMU; no image is baked from it.
EMULATOR = "emulator"


@dataclass(frozen=True, slots=True)
class Ground:
    """What every layer stands on: Debian's architecture and suite, and gpupt's own source."""

    architecture: str
    suite: str
    source_digest: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One baked roll on top of the layers below it; ``digest`` covers all of them."""

    roll: str
    digest: str
    below: str | None


@dataclass(frozen=True, slots=True)
class Image:
    """A bootable disk with its kernel and initrd beside it; ``digest`` names it.

    ``format`` is qcow2 or raw (a raw image may be a block device, as in the emulated host);
    ``virtual_size`` in bytes."""

    digest: str
    rolls: tuple[str, ...]
    disk: PurePosixPath
    format: str
    virtual_size: int
    kernel: PurePosixPath
    initrd: PurePosixPath
