"""A Linux kernel for machines only: it says a word on the serial port, then waits or goes.

Not a kernel at all but what a boot loader takes for one (Documentation/arch/x86/boot.rst):
real-mode code behind a header.  A guest that boots it is up within two seconds of emulation.
"""

from __future__ import annotations

import struct
from pathlib import Path

WORD = "a tiny guest speaks\r\n"
SECTOR = 512
HEADER = 0x1F1
ENTRY = 0x270
COM1 = 0x3F8
# q35's ACPI power management block, where SeaBIOS puts it (ACPI 6.5, 4.8.3): the power
# button's status and enable bits, and SLP_EN, which with type 0 is S5.
PM1_STATUS, PM1_ENABLE, PM1_CONTROL = 0x600, 0x602, 0x604
BUTTON, SLEEP = 0x0100, 0x2000


def tiny_kernel(*, stays: bool) -> bytes:
    """The kernel's file; ``stays``: it powers the guest off when the button is pressed, else
    once it has spoken."""
    code = bytearray((0xFA, 0xBA, *struct.pack("<H", COM1)))  # cli; mov dx, COM1
    for byte in WORD.encode():
        code += bytes((0xB0, byte, 0xEE))  # mov al, byte; out dx, al
    if stays:
        code += put(PM1_ENABLE, BUTTON)
        # sti; hlt until the BIOS's clock ticks; in ax, PM1_STATUS; test ah, 1; jz back to sti
        code += bytes((0xFB, 0xF4, 0xBA, *struct.pack("<H", PM1_STATUS), 0xED))
        code += bytes((0xF6, 0xC4, 0x01, 0x74, 0xF5))
    code += put(PM1_CONTROL, SLEEP)
    code += bytes((0xF4, 0xEB, 0xFD))  # hlt; jmp to it
    image = bytearray(SECTOR * 4)
    image[HEADER] = 1  # one sector of set-up code behind the first
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x202] = bytes((0xEB, ENTRY - 0x202))  # jmp to the code
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x0203)  # the protocol's version
    image[0x211] = 0x01  # loaded high
    struct.pack_into("<I", image, 0x22C, 0x37FFFFFF)  # where an initrd may end
    image[ENTRY : ENTRY + len(code)] = code
    assert ENTRY + len(code) <= 2 * SECTOR
    return bytes(image)


def put(port: int, value: int) -> bytes:
    """mov dx, port; mov ax, value; out dx, ax"""
    return bytes((0xBA, *struct.pack("<H", port), 0xB8, *struct.pack("<H", value), 0xEF))


def write_tiny_kernel(file: Path, *, stays: bool) -> None:
    file.write_bytes(tiny_kernel(stays=stays))
