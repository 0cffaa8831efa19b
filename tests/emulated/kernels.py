"""Puts the same writes to the real kernel and to FakeKernel, in the emulated host.

Prints a JSON list: for each write, what either said and how every function was bound after.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path, PurePosixPath

from fakekernel import FakeKernel, Function, plant

from gpupt.edges.kernel import Kernel
from gpupt.errors import Failed
from gpupt.model.pci import PciAddress

GPU, SOUND, H100 = "0000:02:00.0", "0000:02:00.1", "0000:01:00.0"
DEVICES, DRIVERS = "sys/bus/pci/devices", "sys/bus/pci/drivers"
FUNCTIONS = (
    Function(GPU, "10de:1eb8", 0x030200, "bochs-drm", group=12),
    Function(SOUND, "10de:10f8", 0x040300, "snd_hda_intel", group=12),
    Function(H100, "10de:2330", 0x030200, "uio_pci_generic", group=11),
)
IDS = {
    "bochs-drm": ("10de:1eb8",),
    "snd_hda_intel": ("10de:10f8",),
    "uio_pci_generic": ("10de:2330",),
    "vfio-pci": (),
}


def writes() -> list[tuple[str, str]]:
    """Every file gpupt writes, in right order and in wrong ones, and home again."""
    override = f"{DEVICES}/{GPU}/driver_override"
    probe = "sys/bus/pci/drivers_probe"
    found = [
        (override, "vfio-pci"),
        (probe, GPU),  # bound already: nothing happens, no error
        (f"{DRIVERS}/bochs-drm/unbind", GPU),
        (f"{DRIVERS}/bochs-drm/unbind", GPU),  # a second time
        (f"{DRIVERS}/bochs-drm/bind", GPU),  # the override names another
        (probe, GPU),
        (f"{DRIVERS}/vfio-pci/bind", GPU),  # bound already
        (f"{DRIVERS}/bochs-drm/unbind", GPU),  # it is not that driver's
        (f"{DRIVERS}/vfio-pci/unbind", GPU),
        (override, "no-such-driver"),
        (probe, GPU),  # no driver takes it: no error
        (override, ""),
        (probe, GPU),
        (f"{DRIVERS}/bochs-drm/unbind", GPU),
        (f"{DRIVERS}/vfio-pci/bind", GPU),  # it knows no ids
        (f"{DRIVERS}/bochs-drm/bind", GPU),
        (probe, "0000:7f:00.0"),  # not on the bus
        (f"{DRIVERS}/bochs-drm/unbind", "0000:7f:00.0"),
        (f"{DEVICES}/0000:7f:00.0/driver_override", "vfio-pci"),
        (f"{DRIVERS}/no-such-driver/bind", GPU),
    ]
    for address, driver in ((SOUND, "snd_hda_intel"), (H100, "uio_pci_generic")):
        override = f"{DEVICES}/{address}/driver_override"
        found += [
            (override, "vfio-pci"),
            (f"{DRIVERS}/{driver}/unbind", address),
            (probe, address),
            (f"{DRIVERS}/vfio-pci/unbind", address),
            (override, ""),
            (probe, address),
        ]
    return found


def outcome(kernel: Kernel, path: str, text: str) -> dict[str, object]:
    """What the kernel said to the write, and every binding after it."""
    said = ""
    try:
        kernel.write(PurePosixPath(path), f"{text}\n", deadline=60)
    except Failed as error:
        said = error.brief
    bindings = {
        function.address: kernel.binding(PciAddress.parse(function.address))
        for function in FUNCTIONS
    }
    return {
        "said": said,
        "bindings": {address: [b.driver, b.override] for address, b in bindings.items()},
    }


def main() -> None:
    real = Kernel()
    real.load_module("vfio-pci")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        plant(root, FUNCTIONS, drivers=list(IDS))
        fake = FakeKernel(root, drivers=IDS)
        rows = [
            {
                "write": f"{path} ← {text}",
                "real": outcome(real, path, text),
                "fake": outcome(fake, path, text),
            }
            for path, text in writes()
        ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
