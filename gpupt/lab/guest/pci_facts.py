"""Run inside the emulated host (python3 - < this file): PCI facts as one JSON object.

It reads sysfs by itself and knows nothing of gpupt: what gpupt says of the drivers before
and after is judged by it.  The standard library alone, for Python 3.10 or later.
"""

import json
import os
import platform

DEVICES = "/sys/bus/pci/devices"


def text(path: str) -> str | None:
    """The attribute's text, or None where it is not there."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def link(path: str) -> str | None:
    """The last part of what a link points to, or None."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None


def function(address: str) -> dict[str, str | None]:
    """One PCI function."""
    folder = os.path.join(DEVICES, address)
    parent = os.path.basename(os.path.dirname(os.path.realpath(folder)))
    override = text(os.path.join(folder, "driver_override"))
    return {
        "address": address,
        "vendor": text(os.path.join(folder, "vendor")),
        "device": text(os.path.join(folder, "device")),
        "class": text(os.path.join(folder, "class")),
        "driver": link(os.path.join(folder, "driver")),
        "override": None if override in (None, "(null)", "") else override,
        "group": link(os.path.join(folder, "iommu_group")),
        "port": parent if os.path.isdir(os.path.join(DEVICES, parent)) else None,
    }


def os_name() -> str:
    """The distribution's name for people."""
    for line in (text("/etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return ""


print(
    json.dumps(
        {
            "functions": [function(address) for address in sorted(os.listdir(DEVICES))],
            "iommus": sorted(os.listdir("/sys/class/iommu")),
            "kernel": platform.release(),
            "distribution": os_name(),
            "cpus": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "name": platform.node(),
        }
    )
)
