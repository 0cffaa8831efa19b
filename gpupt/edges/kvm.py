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
EXIT_PORT = 0xF4
TOKEN = 0x21
# isa-debug-exit ends QEMU with twice what was written, plus one.
EXPECTED = TOKEN << 1 | 1

# What the guest runs, in real mode at 0000:7c00, where the firmware has put it.
CODE = bytes(
    (
        *(0xFA,),  # cli              nothing may interrupt
        *(0xBA, EXIT_PORT, 0x00),  # mov dx, 0xf4
        *(0xB0, TOKEN),  # mov al, 0x21
        *(0xEE,),  # out dx, al       QEMU exits here
        *(0xF4,),  # hlt              not reached
        *(0xEB, 0xFD),  # jmp to the hlt
    )
)


@dataclass(frozen=True, slots=True)
class KvmVerdict:
    """Whether guests run on KVM here, and why that is believed."""

    usable: bool
    why: str


def boot_sector() -> bytes:
    """The 512 bytes the firmware boots: the code, and the mark that makes it bootable."""
    return CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def probe_command(qemu: Sequence[str | Path], sector: Path) -> list[str]:
    """How QEMU is called for a guest that writes one byte and is gone."""
    return [
        *(str(word) for word in qemu),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "pc", "-accel", "kvm", "-m", "16"),
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
    why = said[-1] if said else f"QEMU ended with status {done.status}"
    return KvmVerdict(False, f"{device} runs no guest: {why}")
