"""The gate to our udev rules: ROOT/etc/udev/rules.d/10-gpupt-GPU.rules, one for each GPU.

The files are the truth about which loans outlive a reboot: nothing else records it.  udevd
finds a change by itself (systemd: udev_rules_should_reload), and only at boot does it matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpupt.errors import BadInput, Failed
from gpupt.model.pci import PciAddress
from gpupt.model.persistence import BootRules

FOLDER = "etc/udev/rules.d"
# Early: whatever a later rule starts for the device finds it with vfio-pci.
_NAME = re.compile(r"10-gpupt-(?P<gpu>[0-9a-f:.]+)\.rules")


def rule_file(root: Path, gpu: PciAddress) -> Path:
    """Where the rule of a GPU is."""
    return root / FOLDER / f"10-gpupt-{gpu}.rules"


def read_persistent(root: Path) -> frozenset[PciAddress]:
    """The GPUs that a rule of ours takes at boot."""
    found = set()
    names: list[str] = []
    if is_inside(root):
        with suppress(OSError):
            names = os.listdir(root / FOLDER)
    for name in names:
        known = _NAME.fullmatch(name)
        if known is not None:
            with suppress(BadInput):
                found.add(PciAddress.parse(known["gpu"]))
    # Another spelling of an address is not a name that we give.
    return frozenset(gpu for gpu in found if rule_file(root, gpu).name in names)


def read_boot_rules(root: Path, functions: Iterable[PciAddress] = ()) -> BootRules:
    """Our rules as they are, the places of ``functions``, and why none could be written."""
    rules = {}
    for gpu in sorted(read_persistent(root)):
        try:
            rules[gpu] = rule_file(root, gpu).read_text(encoding="utf-8", errors="replace")
        except OSError:
            # It is there, and says nothing that could be kept: a link to nowhere, or denied.
            rules[gpu] = ""
    udev = any((root / folder / "udev").is_dir() for folder in ("usr/lib", "lib"))
    return BootRules(rules, read_places(root, functions), why_unwritable(root), udev)


def read_places(root: Path, functions: Iterable[PciAddress]) -> dict[PciAddress, str]:
    """Each function's path in the tree of buses, as udev's DEVPATH has it."""
    top = os.path.realpath(root / "sys")
    places = {}
    for address in functions:
        real = os.path.realpath(root / "sys/bus/pci/devices" / str(address))
        if real.startswith(f"{top}/devices/") and os.path.exists(real):
            places[address] = real.removeprefix(top)
    return places


def why_unwritable(root: Path) -> tuple[str, str] | None:
    """Why no rule can be written under a root, and what to do; None: it can.

    Nothing is tried: the first folder that exists is asked."""
    if not is_inside(root):
        return f"/{FOLDER} leads out of {root}", "give the root whose folder that is"
    folder = root / FOLDER
    while not folder.exists() and folder != root:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is no folder", "move it aside"
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return (
            f"{folder} is on a file system that is mounted read-only",
            "have it writable (mount -o remount,rw)",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} may not be written to", "run gpupt as root"
    return None


def write_rule(root: Path, gpu: PciAddress, text: str) -> None:
    """Have the rule of a GPU say ``text``: all of it or nothing, and on the disk when this
    returns.  Raises Failed."""
    file = rule_file(root, gpu)
    with speaking_of(root, file):
        if file.is_symlink():
            raise OSError("it is a symbolic link, which is not ours")
        if not file.exists() or file.read_bytes() != text.encode():
            file.parent.mkdir(parents=True, exist_ok=True)
            new = unfinished(file)
            with new.open("wb") as writing:
                writing.write(text.encode())
                writing.flush()
                os.fsync(writing.fileno())
            new.chmod(0o644)
            new.replace(file)
        unfinished(file).unlink(missing_ok=True)
        sync_folder(file.parent)
        if file.read_bytes() != text.encode():
            raise OSError("it does not say what was written")


def remove_rule(root: Path, gpu: PciAddress) -> None:
    """Have no rule of a GPU; raises Failed."""
    file = rule_file(root, gpu)
    with speaking_of(root, file):
        there = [each for each in (file, unfinished(file)) if os.path.lexists(each)]
        for each in there:
            each.unlink()
        if there:
            sync_folder(file.parent)


def unfinished(file: Path) -> Path:
    """The rule while it is being written: no .rules, so udev does not read it."""
    return file.with_name(f".{file.name}.new")


def is_inside(root: Path) -> bool:
    """Whether the folder of the rules is under the root, links followed."""
    top, folder = os.path.realpath(root), os.path.realpath(root / FOLDER)
    return folder.startswith(f"{top.rstrip('/')}/")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def speaking_of(root: Path, file: Path) -> Iterator[None]:
    """Turn OSError into Failed, naming the file; let none be changed outside the root."""
    if not is_inside(root):
        raise Failed(f"/{FOLDER} leads out of {root}: no rule is changed there")
    try:
        yield
    except OSError as error:
        raise Failed(
            f"the udev rule {file} cannot be changed",
            details=error.strerror or str(error),
            remedy="ls -l shows what is there; its folder must be writable",
        ) from None
