"""Names of vendors and devices from the machine's pci.ids, looked up and never parsed whole."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from gpupt.model.host import Gpu, Host
from gpupt.model.pci import PciId

PLACES = ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids", "var/lib/pciutils/pci.ids")


def read_names(root: Path, ids: Iterable[PciId]) -> dict[PciId, str]:
    """``vendor device`` for each id that the tree's pci.ids (else this machine's) knows."""
    wanted = set(ids)
    for folder in (root, Path("/")):
        for place in PLACES:
            try:
                number = os.open(folder / place, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                # Mapped, so that only the part before the last vendor asked for is read.
                database = mmap.mmap(number, 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                continue
            finally:
                os.close(number)
            found = {identifier: find_name(database, identifier) for identifier in wanted}
            return {identifier: name for identifier, name in found.items() if name}
    return {}


def with_names(host: Host, root: Path) -> Host:
    """The host with its GPUs named."""
    names = read_names(root, (gpu.device.id for gpu in host.gpus))
    gpus = tuple(
        Gpu(replace(gpu.device, name=names.get(gpu.device.id)), gpu.companions) for gpu in host.gpus
    )
    return replace(host, gpus=gpus)


def find_name(database: bytes | mmap.mmap, identifier: PciId) -> str | None:
    """The name of one id: the device's line in its vendor's block.

    The file begins with comments, so every vendor's line has a newline before it.
    """
    start = database.find(b"\n%04x  " % identifier.vendor)
    if start < 0:
        return None
    line = database.find(b"\n", start + 1)
    vendor = database[start + 7 : line].decode("utf-8", "replace").strip()
    # A vendor's block ends at the next line that starts with neither tab nor comment.
    here = line
    wanted = b"\t%04x  " % identifier.device
    while 0 <= here < len(database) - 1:
        end = database.find(b"\n", here + 1)
        end = len(database) if end < 0 else end
        text = database[here + 1 : end]
        if text.startswith(wanted):
            return f"{vendor} {text[len(wanted) :].decode('utf-8', 'replace').strip()}"
        if text[:1] not in (b"\t", b"#", b""):
            break
        here = end
    return None
