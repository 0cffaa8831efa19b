"""What draws on the boot display: the kernel's consoles, and the firmware's framebuffer."""

from __future__ import annotations

from gpupt.edges.tree import Reader
from gpupt.model.host import Display

CONSOLES = "sys/class/vtconsole"
PLATFORM = "sys/bus/platform/drivers"
# Drivers of framebuffers that the firmware set up (drivers/video/fbdev, drivers/gpu/drm/sysfb).
FIRMWARE = ("efi-framebuffer", "simple-framebuffer", "vesa-framebuffer")


def read_display(reader: Reader) -> Display:
    """The consoles that draw on a framebuffer, and the framebuffers of the firmware."""
    consoles = tuple(
        f"{CONSOLES}/{name}/bind"
        for name in reader.names(CONSOLES)
        if "frame buffer" in (reader.text(f"{CONSOLES}/{name}/name") or "")
        and reader.text(f"{CONSOLES}/{name}/bind") == "1"
    )
    framebuffers = tuple(
        (driver, name)
        for driver in FIRMWARE
        for name in reader.names(f"{PLATFORM}/{driver}")
        # Devices are called NAME.NUMBER, and stand among bind, unbind, uevent and module.
        if "." in name
    )
    return Display(consoles, framebuffers)
