"""Whether KVM really runs a guest: found out by running one, for /dev/kvm may be there,
answer, create a virtual machine, and never run its first instruction."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpupt.edges.process import run
from gpupt.errors import DeadlineExceeded, Failed

DEVICE = Path("/dev/kvm")
SECTOR = 512
ORIGIN = 0x7C00  # where the firmware puts the boot sector
EXIT_PORT = 0xF4
TOKEN = 0x21
# isa-debug-exit ends QEMU with twice what was written, plus one.
EXPECTED = TOKEN << 1 | 1
# A processor counts this down in a tenth of a second, emulated or not.  A KVM that interprets
# its guests, because no hardware runs them, needs minutes: it is of no use either.
TURNS = 1 << 27


def boot_code() -> bytes:
    """The guest's program: into long mode, as a kernel goes, count, say so, and stop."""
    gdt = bytes(8) + bytes((0, 0, 0, 0, 0, 0x9A, 0x20, 0))  # null; 64-bit code, ring 0
    real_mode_size = 95
    gdt_at = ORIGIN + real_mode_size + 16
    gdtr_at = gdt_at + len(gdt)
    real_mode = bytes(
        (
            *(0xFA,),  # cli
            *(0x31, 0xC0),  # xor ax, ax
            *(0x8E, 0xD8),  # mov ds, ax
            *(0x8E, 0xC0),  # mov es, ax
            # Page tables at 0x1000: one of each level, and the first 2 MiB mapped on itself.
            *(0x66, 0xBF, *le32(0x1000)),  # mov edi, 0x1000
            *(0x0F, 0x22, 0xDF),  # mov cr3, edi
            *(0x66, 0x31, 0xC0),  # xor eax, eax
            *(0xB9, 0x00, 0x0C),  # mov cx, 0xc00
            *(0x66, 0xF3, 0xAB),  # rep stosd
            *(0x66, 0xC7, 0x06, 0x00, 0x10, *le32(0x2003)),  # mov dword [0x1000], 0x2003
            *(0x66, 0xC7, 0x06, 0x00, 0x20, *le32(0x3003)),  # mov dword [0x2000], 0x3003
            *(0x66, 0xC7, 0x06, 0x00, 0x30, *le32(0x0083)),  # mov dword [0x3000], 0x83
            *(0x0F, 0x20, 0xE0),  # mov eax, cr4
            *(0x0C, 0x20),  # or al, 0x20      PAE
            *(0x0F, 0x22, 0xE0),  # mov cr4, eax
            *(0x66, 0xB9, *le32(0xC0000080)),  # mov ecx, EFER
            *(0x0F, 0x32),  # rdmsr
            *(0x80, 0xCC, 0x01),  # or ah, 1        long mode enabled
            *(0x0F, 0x30),  # wrmsr
            *(0x0F, 0x01, 0x16, *le16(gdtr_at)),  # lgdt
            *(0x0F, 0x20, 0xC0),  # mov eax, cr0
            *(0x66, 0x0D, *le32(0x80000001)),  # or eax, paging and protection
            *(0x0F, 0x22, 0xC0),  # mov cr0, eax
            *(0xEA, *le16(ORIGIN + real_mode_size), 0x08, 0x00),  # jmp to what follows, as 64-bit
        )
    )
    assert len(real_mode) == real_mode_size
    long_mode = bytes(
        (
            *(0xB9, *le32(TURNS)),  # mov ecx, TURNS
            *(0xFF, 0xC9),  # dec ecx
            *(0x75, 0xFC),  # jnz to the dec
            *(0xB0, TOKEN),  # mov al, 0x21
            *(0xE6, EXIT_PORT),  # out 0xf4, al    QEMU exits here
            *(0xF4,),  # hlt             not reached
            *(0xEB, 0xFD),  # jmp to the hlt
        )
    ).ljust(16, b"\x90")
    return real_mode + long_mode + gdt + bytes((*le16(len(gdt) - 1), *le32(gdt_at)))


def le16(number: int) -> bytes:
    return number.to_bytes(2, "little")


def le32(number: int) -> bytes:
    return number.to_bytes(4, "little")


@dataclass(frozen=True, slots=True)
class KvmVerdict:
    """Whether guests run on KVM here, and why that is believed."""

    usable: bool
    why: str


def boot_sector() -> bytes:
    """The 512 bytes the firmware boots: the code, and the mark that makes it bootable."""
    return boot_code().ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def probe_command(qemu: Sequence[str | Path], sector: Path) -> list[str]:
    """How QEMU is called for a guest that counts, writes one byte and is gone."""
    return [
        *(str(word) for word in qemu),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "pc", "-accel", "kvm", "-cpu", "host", "-m", "16"),
        *("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=0x1"),
        *("-drive", f"file={sector},format=raw,if=ide"),
    ]


def probe_kvm(
    qemu: Sequence[str | Path] = ("qemu-system-x86_64",),
    *,
    deadline: float = 15,
    device: Path = DEVICE,
) -> KvmVerdict:
    """Run a guest of one boot sector on KVM and say whether it really ran.

    ``deadline`` in seconds; a guest inside an emulated host needs 20 to 30.  QEMU is gone
    when this returns.  Raises nothing for what it finds: every answer is a verdict.
    """
    if not device.exists():
        return KvmVerdict(False, f"there is no {device}")
    if not os.access(device, os.R_OK | os.W_OK):
        return KvmVerdict(False, f"{device} may not be opened by this user")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpupt-kvm-") as folder:
        sector = Path(folder) / "sector"
        sector.write_bytes(boot_sector())
        try:
            done = run(probe_command(qemu, sector), deadline=deadline, check=False)
        except DeadlineExceeded:
            return KvmVerdict(
                False, f"{device} is there, and a guest on it did not run within {deadline:g} s"
            )
        except Failed as error:
            return KvmVerdict(False, error.brief)
    took = time.monotonic() - start
    if done.status == EXPECTED:
        return KvmVerdict(True, f"a guest ran on it to its end in {took:.1f} s")
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    why = said[0] if said else f"QEMU ended with status {done.status}"
    return KvmVerdict(False, f"{device} runs no guest: {why}")
