"""The gate to the kernel's PCI files: each write in a child with a deadline, then read back.

A write to ``unbind`` may never return: the nvidia driver loops for ever while something
holds the card.  So the write happens in a child, and gpupt itself never hangs.
"""

from __future__ import annotations

import errno
import os
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path, PurePosixPath

from gpupt.edges.apart import DEADLINE, read_apart
from gpupt.edges.holders import read_holders
from gpupt.edges.sysfs import PciReader
from gpupt.errors import BadInput, DeadlineExceeded, Failed
from gpupt.model.gpus import identity_of
from gpupt.model.host import Holder, Host
from gpupt.model.pci import DriverBinding, Identity, PciAddress

BUS = PurePosixPath("sys/bus/pci")
# Seconds.  vfio-pci resets a card as it takes it, and a function-level reset may last a
# minute (pci_dev_wait in drivers/pci/pci.c gives it 60 s).
OVERRIDE_DEADLINE = 10.0
ATTRIBUTE_DEADLINE = 10.0
UNBIND_DEADLINE = 45.0
PROBE_DEADLINE = 90.0
RESET_DEADLINE = 90.0
MODULE_DEADLINE = 60.0


class Unsupported(Failed):
    """What the kernel does not do for this device."""


class Kernel:
    """The kernel whose files are under ``root``; raises Failed, DeadlineExceeded."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.reader = PciReader(root)

    def present(self, address: PciAddress) -> bool:
        """Whether the function is on the bus."""
        return (self.root / BUS / "devices" / str(address)).exists()

    def binding(self, address: PciAddress) -> DriverBinding:
        """Who drives the function now and what its override is; raises Failed if it is gone."""
        if not self.present(address):
            raise Failed(
                f"{address} is not on the bus any more",
                remedy="the card was removed or has fallen off the bus; dmesg says when",
            )
        driver = self.reader.link(f"{BUS}/devices/{address}/driver")
        return DriverBinding(driver, self.override(address))

    def override(self, address: PciAddress) -> str | None:
        """The function's driver_override; raises DeadlineExceeded while the kernel holds it."""
        path = f"{BUS}/devices/{address}/driver_override"
        if self.reader.top is not None:
            return self.reader.override(address)
        told = read_apart([f"/{path}"]).get(f"/{path}")
        if told is None:
            raise DeadlineExceeded(
                f"the kernel keeps {address} locked",
                details=f"/{path} was not read within {DEADLINE:g} s",
                remedy="an unbind or a reset of it has not ended; a reboot may be needed",
            )
        said = told.decode("utf-8", errors="replace").strip() if isinstance(told, bytes) else ""
        return None if said in {"", "(null)"} else said

    def identity(self, address: PciAddress) -> Identity | None:
        """What card it is, as the kernel remembers it: a lost one too; None when it is gone."""
        device = self.reader.device(f"{BUS}/devices/{address}", address)
        return None if device is None else identity_of(device)

    def holders(self, address: PciAddress) -> tuple[Holder, ...]:
        """The processes that have a node of the function open, as far as may be looked."""
        device = self.reader.device(f"{BUS}/devices/{address}", address)
        if device is None:
            return ()
        host = Host({address: device}, {}, ())
        return read_holders(PciReader(self.root), host, [address]).get(address, ())

    def has_driver(self, driver: str) -> bool:
        """Whether a PCI driver of that name is registered."""
        return (self.root / BUS / "drivers" / driver).is_dir()

    def set_override(self, address: PciAddress, driver: str | None) -> None:
        """Allow only ``driver`` to bind the function; None lets any matching driver."""
        self.write(
            BUS / "devices" / str(address) / "driver_override",
            f"{driver or ''}\n",
            deadline=OVERRIDE_DEADLINE,
        )

    def unbind(self, address: PciAddress, driver: str) -> None:
        """Take the function from its driver."""
        self.write(BUS / "drivers" / driver / "unbind", f"{address}\n", deadline=UNBIND_DEADLINE)

    def probe(self, address: PciAddress) -> None:
        """Let the bus find a driver; it reports success also when none took the function."""
        self.write(BUS / "drivers_probe", f"{address}\n", deadline=PROBE_DEADLINE)

    def bind(self, address: PciAddress, driver: str) -> None:
        """Bind the function to a driver by name."""
        self.write(BUS / "drivers" / driver / "bind", f"{address}\n", deadline=PROBE_DEADLINE)

    def lost(self, address: PciAddress) -> bool:
        """Whether the function's config space reads all ones: it has fallen off the bus."""
        folder = f"{BUS}/devices/{address}"
        reader = PciReader(self.root)
        reader.foresee([address])
        return reader.lost(folder, virtual=reader.link(f"{folder}/physfn") is not None)

    def resettable(self, address: PciAddress) -> bool:
        """Whether the kernel knows a way to reset the function alone."""
        return (self.root / BUS / "devices" / str(address) / "reset").exists()

    def reset(self, address: PciAddress) -> None:
        """Reset the function, in the first of its ``reset_method`` that works.

        Raises Unsupported where none does: ``bus`` is named for the first function of a card
        that was found before its others were, and cannot be done to it alone.
        """
        self.write(BUS / "devices" / str(address) / "reset", "1\n", deadline=RESET_DEADLINE)

    def attribute(self, path: str) -> str | None:
        """What a file of sysfs holds; None where there is none."""
        return self.reader.text(path)

    def set_attribute(self, path: str, value: str) -> None:
        """Write a file of sysfs."""
        self.write(PurePosixPath(path), f"{value}\n", deadline=ATTRIBUTE_DEADLINE)

    def release_framebuffer(self, driver: str, device: str) -> None:
        """Take a framebuffer of the firmware from its driver; nothing to do once it is gone."""
        folder = PurePosixPath("sys/bus/platform/drivers") / driver
        if (self.root / folder / device).exists():
            self.write(folder / "unbind", f"{device}\n", deadline=UNBIND_DEADLINE)

    def load_module(self, name: str) -> None:
        """Load a module into the running kernel; raises Failed, also for a tree that is none."""
        if self.root.resolve() != Path("/"):
            raise Failed(f"{name} is not loaded in the machine under {self.root}")
        from gpupt.edges.process import run

        run(["modprobe", name], deadline=MODULE_DEADLINE)

    def write(self, path: PurePosixPath, text: str, *, deadline: float) -> None:
        """Write a file under the root in a child that is killed after ``deadline`` seconds.

        Raises BadInput for a path outside the root, Failed with the kernel's word,
        DeadlineExceeded when the child did not come back.
        """
        target = self.inside(path)
        status = write_in_child(target, text.encode(), deadline=deadline)
        if status is None:
            raise stuck(path, text.strip(), deadline)
        if status != 0:
            raise refused_write(path, text.strip(), status)

    def inside(self, path: PurePosixPath) -> Path:
        """The path on this machine; raises BadInput when it leads out of the root's sys/."""
        if path.is_absolute() or ".." in path.parts or path.parts[:1] != ("sys",):
            raise BadInput(f"{path} is not one of the kernel's files")
        real = self.reader.real_path(str(path))
        if real is None or not real.startswith("sys/"):
            raise BadInput(f"{path} leads out of {self.root / 'sys'}, and is not written to")
        return self.root / path


def stuck(path: PurePosixPath, text: str, deadline: float) -> DeadlineExceeded:
    """The error for a write that the kernel did not finish."""
    return DeadlineExceeded(
        f"the kernel did not finish {path.name} of {text} within {deadline:g} s",
        details=(f"/{path} ← {text}", "something still holds the device, or its driver hangs"),
        remedy="do not retry; stop what holds it (gpupt doctor names it); a reboot may be needed",
    )


def refused_write(path: PurePosixPath, text: str, number: int) -> Failed:
    """The error for a write that the kernel answered with an errno."""
    name = errno.errorcode.get(number, str(number))
    denied = number in {errno.EACCES, errno.EPERM, errno.EROFS}
    kind = Unsupported if number == errno.ENOTTY else Failed
    return kind(
        f"the kernel refused {path.name}: {os.strerror(number)} ({name})",
        details=f"/{path} ← {text or '(empty)'}",
        remedy="run gpupt as root" if denied else "dmesg holds the kernel's reason",
    )


def write_in_child(target: Path, data: bytes, *, deadline: float) -> int | None:
    """0, the errno, or None when the child had to be killed after ``deadline`` seconds."""
    with warnings.catch_warnings():
        # The child makes system calls only, so it is safe beside this process's threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 255
        try:
            # A terminal's Ctrl-C is for the parent, which undoes; the write is let finish.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            number = os.open(target, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            os.write(number, data)
            os.close(number)
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    return wait_for(child, until=time.monotonic() + deadline)


def wait_for(child: int, *, until: float) -> int | None:
    """A child's exit status; None when it was killed at ``until`` (it may linger in state D)."""
    pause = 0.0002
    try:
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 255
            if time.monotonic() >= until:
                break
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
    except KeyboardInterrupt:
        # Let the write come to its end for a moment, so that undo meets a settled device.
        wait_for(child, until=min(until, time.monotonic() + 5))
        raise
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    time.sleep(0.01)
    with suppress(ChildProcessError):
        os.waitpid(child, os.WNOHANG)
    return None
