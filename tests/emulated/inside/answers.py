"""Run in the emulated host: raw writes to the PCI bus's files, and what the kernel answers.

Prints a JSON list for each write: file, text, errno's name or null, and then the driver and
the override of the function.  The unit tests hold FakeKernel to a transcript of it.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

BUS = Path("/sys/bus/pci")
CARD = "0000:02:00.0"
OVERRIDE = f"devices/{CARD}/driver_override"
WRITES = [
    ("drivers_probe", "0000:7f:00.0"),
    ("drivers/vfio-pci/unbind", CARD),
    ("drivers/bochs-drm/unbind", "0000:7f:00.0"),
    ("drivers/vfio-pci/bind", CARD),
    ("drivers/bochs-drm/bind", CARD),
    (OVERRIDE, "vfio-pci"),
    ("drivers_probe", CARD),
    ("drivers/vfio-pci/bind", CARD),
    ("drivers/bochs-drm/unbind", CARD),
    ("drivers/bochs-drm/bind", CARD),
    ("drivers_probe", CARD),
    ("drivers_probe", CARD),
    (OVERRIDE, "none"),
    ("drivers/vfio-pci/unbind", CARD),
    ("drivers_probe", CARD),
    ("drivers/vfio-pci/bind", CARD),
    (OVERRIDE, ""),
    ("drivers/vfio-pci/bind", CARD),
    ("drivers_probe", CARD),
    ("drivers/snd_hda_intel/bind", CARD),
    ("drivers/vfio-pci/bind", "nonsense"),
    (OVERRIDE, "vfio-pci"),
    (OVERRIDE, ""),
    ("drivers/bochs-drm/unbind", CARD),
    ("drivers/bochs-drm/unbind", CARD),
    ("drivers/bochs-drm/bind", CARD),
]


def write(path: str, text: str) -> str | None:
    """The name of the errno, None when the kernel took it."""
    try:
        number = os.open(BUS / path, os.O_WRONLY)
        try:
            os.write(number, f"{text}\n".encode())
        finally:
            os.close(number)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return None


def standing() -> tuple[str | None, str]:
    """The card's driver and override."""
    driver = BUS / "devices" / CARD / "driver"
    name = driver.readlink().name if driver.is_symlink() else None
    return name, (BUS / OVERRIDE).read_text().strip()


if __name__ == "__main__":
    for path, text in WRITES:
        print(json.dumps([path, text, write(path, text), *standing()]))
